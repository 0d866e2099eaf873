"""Experts over ranks: each rank routes its own tokens; losses and room are those of the tokens of all."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from effzoo.errors import IncompatibleError
from effzoo.parallel.ranks import Split, all_reduced, total
from effzoo.routing import Router, TokensOverRanks
from effzoo.routing.balanced import Base


def check(router: Router, training: bool) -> None:
    """Raise IncompatibleError for a router that chooses among the tokens of all ranks together."""
    if not router.alone or (training and isinstance(router, Base)):
        raise IncompatibleError(
            f"router {router.name!r} assigns all tokens together, of which a rank has some; use 'switch', 'top_k' or "
            "'soft', or one rank"
        )


def tokens_of_all(split: Split, valid: Tensor | None, batch: int, device: torch.device) -> TokensOverRanks:
    """What routers need of other ranks.

    valid bool[batch, n]: the tokens of the whole sequence; None: all.
    """
    sizes = torch.tensor([end - first for first, end in split.pieces()], device=device)
    piece = torch.arange(len(sizes), device=device).repeat_interleave(sizes)
    group = (torch.arange(batch, device=device)[:, None] * len(sizes) + piece).flatten()
    if valid is not None:
        group = group[split.own(valid).flatten()]
    count = batch * split.n if valid is None else int(valid.sum())
    return TokensOverRanks(count, partial(total, split=split), partial(_places, split, group, batch))


def _places(split: Split, group: Tensor, batch: int, chosen: Tensor) -> Tensor:
    """`TokensOverRanks.places`; group int[tokens]: example of a token times the pieces of a rank, plus its piece."""
    pieces, experts = len(split.pieces()), chosen.shape[1]
    counts = chosen.new_zeros(batch * pieces, experts, dtype=torch.int64).index_add_(0, group, chosen.long())
    held = chosen.new_zeros(batch, split.ranks * pieces, experts, dtype=torch.int64)
    numbers = [split.bounds.index(first) for first, _ in split.pieces()]
    held[:, numbers] = counts.view(batch, pieces, experts)
    everyone = all_reduced(held, split.group)
    before = (everyone.flatten(0, 1).cumsum(dim=0) - everyone.flatten(0, 1)).view_as(everyone)
    offset = before[:, numbers].flatten(0, 1) - (counts.cumsum(dim=0) - counts)
    return chosen.long().cumsum(dim=0) + offset[group]
