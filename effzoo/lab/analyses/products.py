"""Operations of x A B in its two orders, as torch counts them (Hu et al. 2021, LoRA, arXiv:2106.09685, section 4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def in_turn(n: int, dim: int, rank: int) -> int:
    """Operations of (x A) B for x [n, dim], A [dim, rank], B [rank, dim]: 4 n dim rank."""
    return _operations(n, dim, rank, lambda x, a, b: (x @ a) @ b)


def product_first(n: int, dim: int, rank: int) -> int:
    """Operations of x (A B): 2 rank dim^2 + 2 n dim^2."""
    return _operations(n, dim, rank, lambda x, a, b: x @ (a @ b))


def _operations(n: int, dim: int, rank: int, compute: Callable[[Tensor, Tensor, Tensor], Tensor]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        compute(torch.empty(n, dim), torch.empty(dim, rank), torch.empty(rank, dim))
    return counter.get_total_flops()
