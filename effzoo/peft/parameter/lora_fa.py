"""LoRA-FA: LoRA whose first factor stays as it was drawn (Zhang et al. 2023, arXiv:2308.03303)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from effzoo.peft.parameter.ranked import Ranked
from effzoo.registry import peft
from effzoo.sites import HookContext, Linear, PeftModule, Positionwise, Site


class FrozenA(Positionwise, PeftModule):
    """y' = y + s B A x with A [rank, in] frozen; merged, W' = W + s B A.

    The backward pass needs A x [.., rank] alone, not x.
    """

    A: Tensor

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float):
        super().__init__()
        self.scale, self.delta_rank = scale, min(rank, inputs, outputs)
        A = torch.empty(rank, inputs)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        self.register_buffer("A", A)
        self.B = nn.Parameter(torch.zeros(outputs, rank))

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        return y + self.scale * (x @ self.A.T) @ self.B.T

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.scale * self.B.to(weight) @ self.A.to(weight), None


@peft.register("lora_fa")
class LoRAFA(Ranked):
    """y = W x + (alpha / rank) B A x, where B [out, rank] is trained and A [rank, in] stays as it was drawn.

    rank: of the change.
    alpha: None for the rank, so that the scale is 1.

    It trains out * rank numbers for each matrix, and keeps A x [rank] of each token for the backward pass in place of
    x [in]. The file holds A too.
    """

    paper = "Zhang et al. 2023, LoRA-FA: Memory-efficient low-rank adaptation, arXiv:2308.03303, section 3.1"
    learning_rate = 2e-3

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Linear)
        return FrozenA(site.in_features, site.out_features, self.rank, self.scale)
