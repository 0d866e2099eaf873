"""RandLoRA: a change of full rank from a few random matrices, of which scales are trained (Albert et al. 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from effzoo.annotations import Count, Positive, Seed
from effzoo.peft.method import Layers, Method, Targets
from effzoo.peft.parameter.seeded import Shared
from effzoo.registry import peft
from effzoo.sites import HookContext, Linear, PeftModule, Positionwise, Site


class ScaledBases(Positionwise, PeftModule):
    """y' = y + s D x with D = sum_i B_i diag(scales_i) A diag(stretches_i), transposed where in > out.

    scales: [bases, rank].
    stretches: [bases, min(in, out)].
    """

    delta_rank = None  # bases * rank is min(in, out) or more

    def __init__(self, inputs: int, outputs: int, bases: int, scale: float, shared: Shared):
        super().__init__()
        self.small, self.large = sorted((inputs, outputs))
        self.wide, self.scale, self.shared = inputs > outputs, scale, shared
        self.scales = nn.Parameter(torch.zeros(bases, -(-self.small // bases)))
        self.stretches = nn.Parameter(torch.full((bases, self.small), 1 / self.small))

    def factors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """B_1 ... B_n side by side [large, bases * rank], and the scaled and stretched A below each other."""
        rank = self.scales.shape[1]
        A, B = self.shared.A[:rank, : self.small].to(like), self.shared.B[: self.large, :, :rank].to(like)
        stretched = self.scales.to(like)[:, :, None] * A * self.stretches.to(like)[:, None, :]
        return B.flatten(1), stretched.flatten(0, 1)

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        B, A = self.factors(self.scales)
        return y + self.scale * ((x @ B) @ A if self.wide else (x @ A.T) @ B.T)

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        B, A = self.factors(weight)
        return self.scale * ((B @ A).T if self.wide else B @ A), None


@peft.register("randlora")
class RandLoRA(Method):
    """W' = W + s sum_i B_i Lambda_i A Gamma_i: A [rank, in] and B_i [out, rank] are random, frozen and shared by all
    sites; the diagonal matrices Lambda_i and Gamma_i are trained. The change has full rank.

    bases: terms of the sum; the rank of each is min(in, out) / bases, rounded up, so more of them train more.
    scale: s.
    seed: of A and B, which are drawn from it whenever the adapter is attached; so a file holds the trained ones alone.

    It trains bases * (min(in, out) + rank) numbers for each matrix. Where in > out, the change is transposed, so that
    Gamma is on the smaller side. Lambda starts at 0. A smaller site takes the first rows and columns of A and B, whose
    entries are uniform with variance 1.
    """

    paper = "Albert et al. 2025, RandLoRA: Full-rank parameter-efficient fine-tuning, arXiv:2502.00987"
    accepts = (Linear,)
    default_targets = ("attn.q*", "attn.v*")
    learning_rate = 2e-3
    size = "bases"

    def __init__(
        self, *, bases: Count = 8, scale: Positive = 20.0, seed: Seed = 0, targets: Targets = None,
        layers: Layers = None,
    ):  # fmt: skip
        super().__init__(targets=targets, layers=layers)
        self.bases, self.scale, self.seed = bases, scale, seed

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        sites = [cast(Linear, site) for site in found.values()]
        small = max(min(site.in_features, site.out_features) for site in sites)
        large = max(max(site.in_features, site.out_features) for site in sites)
        rank, bound = -(-small // self.bases), math.sqrt(3)  # of variance 1
        shapes = (rank, small), (large, self.bases, rank)
        self.shared = Shared((shapes[0], bound), (shapes[1], bound), self.seed, sites[0].weight)

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Linear)
        return ScaledBases(site.in_features, site.out_features, self.bases, self.scale, self.shared)
