"""Domains: every sequence belongs to one, and each domain maps symbols to labels in its own way. What routing has to
find out is known here."""

from __future__ import annotations

import torch
from torch import Tensor

from effzoo.errors import OptionError


def domains(
    batch: int, length: int, symbols: int, count: int, generator: torch.Generator, *, variant: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences [batch, length + 1] that begin with a mark of their domain, the label of every symbol, and the domains
    [batch].

    Ids: 0 pads, 1 to `count` are the marks, then come the symbols. The label of symbol s in domain d is p_d(s), p_d a
        permutation of all symbols, the same for every call; the mark has none (-100). variant: another number gives
        every domain another permutation. Raises OptionError.
    """
    if length < 1 or symbols < 2 or count < 1:
        raise OptionError(
            f"domains needs length and count of at least 1 and two symbols, got {length}, {count} and {symbols}"
        )
    draw = torch.Generator().manual_seed(variant)
    tables = torch.stack([torch.randperm(symbols, generator=draw) for _ in range(count)])
    domain = torch.randint(count, (batch,), generator=generator)
    drawn = torch.randint(symbols, (batch, length), generator=generator)
    ids = torch.cat([1 + domain[:, None], 1 + count + drawn], dim=1)
    labels = torch.nn.functional.pad(tables[domain[:, None], drawn], (1, 0), value=-100)
    return ids, labels, domain
