"""LoRA: a low-rank change of a weight matrix (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.errors import OptionError
from effzoo.peft.method import Layers, Method, Targets
from effzoo.registry import peft
from effzoo.sites import Linear, PeftModule, Site


class LowRank(PeftModule):
    """y' = y + s B A dropout(x), with A [rank, in] and B [out, rank]; the change of the weight is s B A."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float, dropout: float):
        super().__init__()
        self.scale, self.dropout, self.delta_rank = scale, dropout, rank
        self.A = nn.Parameter(torch.empty(rank, inputs))
        self.B = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        return y + self.scale * F.linear(F.linear(x, self.A), self.B)

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.scale * self.B.to(weight) @ self.A.to(weight), None


@peft.register("lora")
class LoRA(Method):
    """W' = W + (alpha / rank) B A, with A of shape [rank, in] and B of shape [out, rank]; B starts at 0.

    rank: of the change. alpha: scale numerator, default the rank, so that the scale is 1. dropout: on the input of A.

    The default targets are the queries and values as in the paper; on Longformer `attn.q*` also takes the global projections
    (give `attn.q` for the local ones alone).
    """

    paper = "Hu et al. 2021, LoRA, arXiv:2106.09685, section 4.1"
    accepts = (Linear,)
    default_targets = ("attn.q*", "attn.v*")

    def __init__(self, *, rank: int = 8, alpha: float | None = None, dropout: float = 0.0, targets: Targets = None, layers: Layers = None):
        super().__init__(targets=targets, layers=layers)
        if rank < 1:
            raise OptionError(f"lora: rank is at least 1, got {rank}")
        if not 0 <= dropout < 1:
            raise OptionError(f"lora: dropout is in [0, 1), got {dropout}")
        self.rank, self.scale, self.dropout = rank, (rank if alpha is None else alpha) / rank, dropout

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Linear)
        return LowRank(site.in_features, site.out_features, self.rank, self.scale, self.dropout)
