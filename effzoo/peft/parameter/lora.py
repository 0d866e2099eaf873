"""LoRA: a low-rank change of a weight matrix (Hu et al. 2021, arXiv:2106.09685).

The method of the paper, on linear layers. What is registered as `lora` is `lora_everywhere.py`: the same on embeddings,
convolutions and heads, with ranks by role and other starts.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.annotations import Count, Positive, Probability
from effzoo.peft.method import Layers, Method, Targets
from effzoo.sites import Growing, HookContext, Linear, PeftModule, Positionwise, Site, longer


class LowRank(Positionwise, Growing, PeftModule):
    """y' = y + s B A dropout(x), with A [rank, in] and B [out, rank]; merged, W' = W + s B A."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float, dropout: float = 0.0):
        super().__init__()
        self.scale, self.dropout, self.delta_rank = scale, dropout, min(rank, inputs, outputs)
        self.A = nn.Parameter(torch.empty(rank, inputs))
        self.B = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        return y + F.linear(self.scale * F.linear(x, self.A), self.B)  # the scale meets the narrow product

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.scale * self.B.to(weight) @ self.A.to(weight), None

    def grow(self, weight: Tensor | None, bias: Tensor | None) -> None:
        assert weight is not None
        self.B = longer(self.B, self.B.new_zeros(len(weight), self.B.shape[1]))


class LoRA(Method):
    """W' = W + s B A, with s = alpha / rank, A of shape [rank, in] and B of shape [out, rank]; B starts at 0.

    rank: of the change.
    alpha: scale numerator, default the rank, so that the scale is 1.
    dropout: on the input of A.
    """

    paper = "Hu et al. 2021, LoRA, arXiv:2106.09685, section 4.1"
    accepts: ClassVar[tuple[type[Site], ...]] = (Linear,)
    default_targets = ("attn.q*", "attn.v*")
    learning_rate = 1e-3
    size = "rank"

    def __init__(
        self,
        *,
        rank: Count = 8,
        alpha: Positive | None = None,
        dropout: Probability = 0.0,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(targets=targets, layers=layers)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Linear)
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        return LowRank(site.in_features, site.out_features, self.rank, scale, self.dropout)
