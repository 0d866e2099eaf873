"""LoRA on embeddings: of rows that are looked up, and of a table that a language-model head reads too."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.sites import Growing, HookContext, PeftModule, longer


class LowRankEmbedding(Growing, PeftModule):
    """Row i' = row i + s B A[:, i] of an embedding [rows, dim], with A [rank, rows] and B [dim, rank]; only the rows
    that are read are computed.

    A starts at 0 and B normal, so that rows which never occur in training stay exactly as they are.
    """

    def __init__(self, rows: int, dim: int, rank: int, scale: float):
        super().__init__()
        self.scale, self.delta_rank = scale, min(rank, rows, dim)
        self.A = nn.Parameter(torch.zeros(rank, rows))
        self.B = nn.Parameter(torch.randn(dim, rank))

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        return y + F.linear(self.scale * F.embedding(x, self.A.T), self.B)

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.scale * (self.B.to(weight) @ self.A.to(weight)).T, None

    def grow(self, weight: Tensor | None, bias: Tensor | None) -> None:
        assert weight is not None
        self.A = longer(self.A, self.A.new_zeros(len(self.A), len(weight)), dim=1)


class LowRankLookup(LowRankEmbedding):
    """The same for lookups alone where a language-model head reads the table too, without the change: no change of the
    one table does that."""

    def delta(self, weight: Tensor, bias: Tensor | None) -> None:  # type: ignore[override]
        return None


class LowRankTable(Growing, PeftModule):
    """The same change where a language-model head reads the whole table too: W' = W + s (B A)^T, by the hook `weight`,
    which both see."""

    def __init__(self, rows: int, dim: int, rank: int, scale: float):
        super().__init__()
        self.scale, self.delta_rank = scale, min(rank, rows, dim)
        self.A = nn.Parameter(torch.zeros(rank, rows))
        self.B = nn.Parameter(torch.randn(dim, rank))

    def weight(self, weight: Tensor) -> Tensor:
        return weight + self.scale * self.A.to(weight).T @ self.B.to(weight).T

    def grow(self, weight: Tensor | None, bias: Tensor | None) -> None:
        assert weight is not None
        self.A = longer(self.A, self.A.new_zeros(len(self.A), len(weight)), dim=1)
