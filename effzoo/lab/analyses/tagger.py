"""A small encoder that labels every symbol of generated sequences, on which modules and routers are tried, and
sequences of two factors (hybrid routing: Pfeiffer et al. 2023, Modular deep learning, arXiv:2302.11529, section 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effzoo.architectures import Transformer
from effzoo.builder import build
from effzoo.errors import OptionError


def tagger(symbols: int, marks: int, length: int, *, layers: int = 2, **options: Any) -> Transformer:
    """An encoder 64 wide that gives every position one of `symbols` labels.

    marks: ids from 1 on that are no symbols.
    length: positions, those of marks among them.
    options: as for `effzoo.build`.
    """
    model: Transformer = build(
        "bert", task="token_classification", num_labels=symbols, layers=layers, dim=64, heads=4, mlp=64,
        vocab=1 + marks + symbols, max_length=length, dropout=0.0, attention_dropout=0.0, norm="pre", types=0,
        **options,
    )  # fmt: skip
    return model


def composed(
    batch: int, length: int, symbols: int, languages: int, tasks: int, generator: torch.Generator, *, variant: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences [batch, length + 2] that begin with marks of their language and their task, the label of every symbol,
    and the pair's number [batch].

    Ids: 0 pads, then come the marks of languages, those of tasks, and the symbols. The label of symbol s is
        q_t(p_l(s)), with permutations p_l of the language and q_t of the task, the same for every call; marks have none
        (-100). Pair l tasks + t is language l with task t.

    variant: another number gives other permutations.

    Raises OptionError for sizes below 1.
    """
    if min(length, symbols, languages, tasks) < 1:
        raise OptionError(f"sizes are at least 1, got {length}, {symbols}, {languages} and {tasks}")
    draw = torch.Generator().manual_seed(variant)
    p, q = (torch.stack([torch.randperm(symbols, generator=draw) for _ in range(n)]) for n in (languages, tasks))
    pair = torch.randint(languages * tasks, (batch,), generator=generator)
    language, task = (pair // tasks)[:, None], (pair % tasks)[:, None]
    drawn = torch.randint(symbols, (batch, length), generator=generator)
    ids = torch.cat([1 + language, 1 + languages + task, 1 + languages + tasks + drawn], dim=1)
    labels = torch.nn.functional.pad(q[task, p[language, drawn]], (2, 0), value=-100)
    return ids, labels, pair


@torch.no_grad()
def right(model: Transformer, ids: Tensor, labels: Tensor, task_ids: Tensor | None = None) -> float:
    """The share of labels that the model finds, in evaluation mode; those below 0 are not counted."""
    mode = model.training
    model.eval()
    try:
        predicted = model(input_ids=ids, task_ids=task_ids).logits.argmax(dim=-1)
    finally:
        model.train(mode)
    return float((predicted == labels)[labels >= 0].float().mean())
