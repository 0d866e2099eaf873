"""LoHa: the change of a weight is an entrywise product of two low-rank matrices (Hyeon-Woo et al. 2022)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.peft.parameter.ranked import Ranked
from effzoo.registry import peft
from effzoo.sites import HookContext, Linear, PeftModule, Positionwise, Site


class HadamardProduct(Positionwise, PeftModule):
    """y' = y + s ((B1 A1) * (B2 A2)) x; merged, the weight changes by s (B1 A1) * (B2 A2), of rank r^2 at most."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float):
        super().__init__()
        self.scale, self.delta_rank = scale, min(rank * rank, inputs, outputs)
        self.A1, self.A2 = (nn.Parameter(torch.empty(rank, inputs)) for _ in range(2))
        self.B1, self.B2 = (nn.Parameter(torch.zeros(outputs, rank)) for _ in range(2))
        for factor in (self.A1, self.A2, self.B1):  # B2 is 0, so the change is
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def change(self) -> Tensor:
        return self.scale * (self.B1 @ self.A1) * (self.B2 @ self.A2)

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        return y + F.linear(x, self.change())

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        B1, A1, B2, A2 = (factor.to(weight) for factor in (self.B1, self.A1, self.B2, self.A2))
        return self.scale * (B1 @ A1) * (B2 @ A2), None


@peft.register("loha", "fedpara")
class LoHa(Ranked):
    """W' = W + (alpha / rank) (B1 A1) * (B2 A2), an entrywise product: factors of rank r make a change of
    rank r^2.

    rank: r of each of the two products.
    alpha: None for the rank, so that the scale is 1.

    The change is composed in every step, one matrix of the size of W per site. The paper names the factors
    X1 Y1^T and X2 Y2^T; the name LoHa, and the scale alpha / r, come from the LyCORIS library.
    """

    paper = "Hyeon-Woo et al. 2022, FedPara: Low-rank Hadamard product, arXiv:2108.06098, section 2.2, proposition 1"
    learning_rate = 2e-3

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Linear)
        return HadamardProduct(site.in_features, site.out_features, self.rank, self.scale)
