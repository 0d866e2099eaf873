"""A second task made of any texts, which a body that knows topics has to learn: do the words stand in their order?"""

from __future__ import annotations

import torch

from effzoo.lab.fit import Examples

AS_IT_IS, SHUFFLED = 0, 1


def word_order(examples: Examples, *, seed: int = 0) -> Examples:
    """Every second text with its tokens in a random order (label 1), the others as they are (label 0).

    <cls> first and <sep> last stay in place.

    examples: texts as `input_ids` and `attention_mask` with padding on the right.
    seed: of the orders; which texts have one is not drawn, so that no order of batches can go with the labels.
    """
    draw = torch.Generator().manual_seed(seed)
    ids = examples.inputs["input_ids"].clone()
    labels = torch.zeros(len(examples), dtype=torch.long)
    labels[1::2] = SHUFFLED
    for row in range(1, len(examples), 2):
        inside = int(examples.inputs["attention_mask"][row].sum()) - 2
        ids[row, 1 : 1 + inside] = ids[row, 1 : 1 + inside][torch.randperm(inside, generator=draw)]
    return Examples({**examples.inputs, "input_ids": ids}, labels)
