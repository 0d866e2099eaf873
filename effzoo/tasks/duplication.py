"""Duplication: repeat a random word (Kitaev et al. 2020, Reformer, arXiv:2001.04451, section 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from effzoo.errors import OptionError


def duplication(batch: int, word: int, symbols: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences 0 w 0 w and their labels, both [batch, 2 (word + 1)].

    w: `word` symbols drawn uniformly from 1 to `symbols`. Labels are the sequence itself where the symbol can be known,
        in the second w, and -100 elsewhere; a causal model shifts them itself. Chance is 1 / symbols.
    """
    if word < 1 or symbols < 2:
        raise OptionError(f"duplication needs word of at least 1 and symbols of at least 2, got {word} and {symbols}")
    drawn = torch.randint(1, symbols + 1, (batch, word), generator=generator)
    half = torch.nn.functional.pad(drawn, (1, 0))
    ids = torch.cat([half, half], dim=1)
    labels = ids.clone()
    labels[:, : word + 2] = -100
    return ids, labels
