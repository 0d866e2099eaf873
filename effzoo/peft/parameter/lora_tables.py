"""LoRA where the vocabulary is: on embeddings, and on language-model heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.peft.parameter.lora import LowRank
from effzoo.sites import Growing, HookContext, PeftModule, longer


class LowRankHead(Growing, LowRank):
    """y' = W x + s B A x at a language-model head, whose outputs grow with the vocabulary."""

    def grow(self, weight: Tensor | None, bias: Tensor | None) -> None:
        assert weight is not None
        self.B = longer(self.B, self.B.new_zeros(len(weight), self.B.shape[1]))


class _OfTokens(Growing, PeftModule):
    """A [rank, tokens], which starts at 0, and B [dim, rank], normal: what never occurs in training stays as it is."""

    def __init__(self, tokens: int, dim: int, rank: int, scale: float):
        super().__init__()
        self.scale, self.delta_rank = scale, min(rank, tokens, dim)
        self.A = nn.Parameter(torch.zeros(rank, tokens))
        self.B = nn.Parameter(torch.randn(dim, rank))

    def grow(self, weight: Tensor | None, bias: Tensor | None) -> None:
        assert weight is not None
        self.A = longer(self.A, self.A.new_zeros(len(self.A), len(weight)), dim=1)


class LowRankEmbedding(_OfTokens):
    """e_i' = e_i + s B A[:, i] for token i of an embedding [tokens, dim]; only tokens that are read are computed."""

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        return y + self.scale * F.embedding(x, self.A.T) @ self.B.T

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        return self.scale * (self.B.to(weight) @ self.A.to(weight)).T, None


class LowRankLookup(LowRankEmbedding):
    """The same for lookups alone, where a language-model head reads the table without the change.

    No change of the one table does that, so it cannot be merged.
    """

    def delta(self, weight: Tensor, bias: Tensor | None) -> None:
        return None


class LowRankTable(_OfTokens):
    """W' = W + s (B A)^T for a table [tokens, dim] that a language-model head reads too."""

    def weight(self, weight: Tensor) -> Tensor:
        return weight + self.scale * self.A.to(weight).T @ self.B.to(weight).T
