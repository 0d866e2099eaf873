"""DoRA: a trained length and a low-rank change of direction for each output of a weight (Liu et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from effzoo.annotations import Count, Positive
from effzoo.peft.method import Layers, Method, Targets
from effzoo.peft.parameter.lora_everywhere import by_role, check_rank, scaling
from effzoo.registry import peft
from effzoo.sites import Linear, PeftModule, Site


class DecomposedWeight(PeftModule):
    """W' = m V / ||V|| with V = W + s B A, the norm of each output's weights, a constant in the backward pass."""

    delta_rank = None  # scaling each output changes all of W

    def __init__(self, weight: Tensor, rank: int, scale: float):
        super().__init__()
        self.scale = scale
        self.A = nn.Parameter(torch.empty(rank, weight.shape[1]))
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank))
        self.magnitude = nn.Parameter(weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).norm(dim=1))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def weight(self, weight: Tensor) -> Tensor:
        direction = weight + self.scale * (self.B.to(weight) @ self.A.to(weight))
        # an output of zeros stays one, instead of NaN
        length = direction.detach().norm(dim=1).clamp(min=torch.finfo(weight.dtype).tiny)
        return (self.magnitude.to(weight) / length)[:, None] * direction


@peft.register("dora")
class DoRA(Method):
    """W' = m (W + s B A) / ||W + s B A||, with a trained length m for each output, which starts as ||W||.

    rank: of the change of direction; one number or by role, as in lora.
    alpha: s = alpha / rank; one number or by role, None for the rank.
    rslora: s = alpha / sqrt(rank).

    No gradient goes through the norm, as the paper advises to save memory (section 4.3). The weight is composed by the
    hook `weight`, one matrix of its size per site and step; there is no dropout on B A, because the norm would have to
    know it. The paper's m holds the norms of the columns of W [in, out]; here W is [out, in].
    """

    paper = "Liu et al. 2024, DoRA: Weight-decomposed low-rank adaptation, arXiv:2402.09353, eq. 5, 11"
    accepts = (Linear,)
    default_targets = ("attn.q*", "attn.v*")
    learning_rate = 1e-3
    size = "rank"

    def __init__(
        self,
        *,
        rank: Count | Mapping[str, Count] = 8,
        alpha: Positive | Mapping[str, Positive] | None = None,
        rslora: bool = False,
        targets: Targets = None,
        layers: Layers = None,
    ):
        check_rank(self.name, rank)
        super().__init__(
            targets=tuple(rank) if isinstance(rank, Mapping) and targets is None else targets, layers=layers
        )
        self.rank, self.alpha, self.rslora = rank, alpha, rslora

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Linear)
        rank = by_role(self.name, "rank", self.rank, site.role)
        return DecomposedWeight(site.weight, rank, scaling(self.name, rank, self.alpha, self.rslora, site.role))
