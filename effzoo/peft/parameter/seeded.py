"""Frozen matrices that follow from a seed, so that no file holds them, and that all sites share (VeRA, RandLoRA)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Shared(nn.Module):
    """A and B of all sites, uniform in [-bound, bound], drawn one after the other by a CPU generator.

    A, B: (shape, bound).
    seed: of the generator.
    like: a tensor on whose device they come to lie; on the meta device they are shapes alone.
    """

    A: Tensor
    B: Tensor

    def __init__(self, A: tuple[Sequence[int], float], B: tuple[Sequence[int], float], seed: int, like: Tensor):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        for name, (shape, bound) in (("A", A), ("B", B)):
            matrix = torch.empty(tuple(shape), device="meta" if like.is_meta else "cpu")
            if not like.is_meta:
                matrix = matrix.uniform_(-bound, bound, generator=draw).to(like.device)
            self.register_buffer(name, matrix, persistent=False)
