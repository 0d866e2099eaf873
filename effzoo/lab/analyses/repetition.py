"""Reformer's duplication task: models with so many rounds of hashing, trained on 0 w 0 w, and how much of the second w
they know.

Kitaev et al. 2020, Reformer, arXiv:2001.04451, section 5 and table 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from effzoo.architectures import Transformer
from effzoo.attention.lsh import LSH
from effzoo.builder import build
from effzoo.errors import IncompatibleError, OptionError
from effzoo.tasks import duplication

FULL = "full"


def repeater(rounds: str, *, word: int, symbols: int, chunk: int, dim: int = 64, heads: int = 4) -> Transformer:
    """One causal layer with shared queries and keys that hashes in some rounds ("1", ...), or sees all ("full").

    The parameters do not depend on the rounds: weights trained with some fit all.

    Raises OptionError for other rounds.
    """
    if rounds != FULL and not (rounds.isdigit() and int(rounds)):
        raise OptionError(f"rounds are 'full' or a number of at least 1 as a string, got {rounds!r}")
    length = 2 * (word + 1)
    spec: dict[str, Any] = {"name": "lsh", "rounds": 1, "chunk": length, "buckets": 2}
    if rounds != FULL:
        spec |= {"rounds": int(rounds), "chunk": chunk, "buckets": 2 * length // chunk}
    model: Transformer = build(
        "gpt2", attention=spec, task="causal_lm", layers=1, dim=dim, heads=heads, mlp=dim, vocab=symbols + 1,
        max_length=length, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return model


def rehash(model: Transformer, seed: int) -> None:
    """Draw other rotations in every layer. Raises IncompatibleError where a layer does not hash."""
    for core in model.cores():
        if not isinstance(core, LSH):
            raise IncompatibleError(f"attention {core.name!r} does not hash; use 'lsh'")
        core.resample(seed)


def stream(model: Transformer, *, batch: int, word: int, symbols: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches without end; with each the model's hashes are drawn anew, so that it cannot adapt to one draw."""
    draw, step = torch.Generator().manual_seed(seed), 0
    while True:
        ids, labels = duplication(batch, word, symbols, draw)
        rehash(model, step)
        step += 1
        yield {"input_ids": ids, "labels": labels}


@torch.no_grad()
def repeated(
    model: Transformer, *, word: int, symbols: int, batches: int = 5, batch: int = 128, seed: int = 10**6
) -> float:
    """The share of symbols of the second w that have the largest logit, over new words and new hashes."""
    mode = model.training
    model.eval()
    right = total = 0
    try:
        for _, drawn in zip(
            range(batches), stream(model, batch=batch, word=word, symbols=symbols, seed=seed), strict=False
        ):
            rehash(model, seed + total)
            predicted, wanted = model(drawn["input_ids"]).logits[:, :-1].argmax(dim=-1), drawn["labels"][:, 1:]
            right += int(((predicted == wanted) & (wanted != -100)).sum())
            total += int((wanted != -100).sum())
    finally:
        model.train(mode)
    return right / total
