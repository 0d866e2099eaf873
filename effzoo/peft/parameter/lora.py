"""LoRA: a low-rank change of a weight matrix (Hu et al. 2021, arXiv:2106.09685).

The method of the paper, on linear layers. What is registered as `lora` is `lora_everywhere.py`: the same on embeddings,
heads and convolutions, with ranks by role and other starts.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.annotations import Count, Positive, Probability
from effzoo.peft.method import Layers, Method, Targets
from effzoo.sites import HookContext, Linear, PeftModule, Positionwise, Site


class LowRank(Positionwise, PeftModule):
    """y' = W x + s B A x, with A [rank, in] and B [out, rank]; merged, W' = W + s B A."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float, dropout: float = 0.0):
        super().__init__()
        self.scale, self.dropout, self.delta_rank = scale, dropout, min(rank, inputs, outputs)
        self.A = nn.Parameter(torch.empty(rank, inputs))
        self.B = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        return y + self.scale * (x @ self.A.T) @ self.B.T  # y = W x + b is what the site computes

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        return self.scale * self.B.to(weight) @ self.A.to(weight), None


class LoRA(Method):
    """y = W x + (alpha / rank) B A x, with A [rank, in] and B [out, rank], which starts at 0.

    rank: of the change.
    alpha: None for the rank, so that the scale is 1.
    dropout: on the input of A.
    """

    paper = "Hu et al. 2021, LoRA, arXiv:2106.09685, section 4.1"
    accepts: ClassVar[tuple[type[Site], ...]] = (Linear,)
    default_targets = ("attn.q*", "attn.v*")
    learning_rate = 1e-3
    size = "rank"

    def __init__(
        self, *, rank: Count = 8, alpha: Positive | None = None, dropout: Probability = 0.0,
        targets: Targets = None, layers: Layers = None,
    ):  # fmt: skip
        super().__init__(targets=targets, layers=layers)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Linear)
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        return LowRank(site.in_features, site.out_features, self.rank, scale, self.dropout)
