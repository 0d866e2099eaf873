"""How well a classifier does on examples it was not trained on: accuracy and loss from one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from effzoo.lab.fit import Examples, bfloat16_is_faster, logits


class Score(NamedTuple):
    """accuracy: the share of examples whose label has the largest logit. loss: the mean cross entropy in nats."""

    accuracy: float
    loss: float


def score(model: nn.Module, examples: Examples, *, bfloat16: bool | None = None) -> Score:
    """Accuracy and loss.

    bfloat16: under autocast; None where that is faster here and the weights are float32.
    """
    if bfloat16 is None:
        bfloat16 = next(model.parameters()).dtype == torch.float32 and bfloat16_is_faster()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        answers = logits(model, examples)
    loss = nn.functional.cross_entropy(answers, examples.labels)
    return Score(float((answers.argmax(dim=-1) == examples.labels).float().mean()), float(loss))
