"""VeRA: random matrices that all layers share, frozen, and two trained vectors a layer (Kopiczko et al. 2024)."""

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


class Vectors(Positionwise, PeftModule):
    """y' = y + b * B (d * (A x)), with the first columns of A and the first rows of B that the site needs."""

    def __init__(self, inputs: int, outputs: int, start: float, shared: Shared):
        super().__init__()
        self.inputs, self.outputs, self.shared = inputs, outputs, shared
        rank = len(shared.A)
        self.delta_rank = min(rank, inputs, outputs)
        self.d = nn.Parameter(torch.full((rank,), start))
        self.b = nn.Parameter(torch.zeros(outputs))

    def matrices(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.shared.A[:, : self.inputs].to(like), self.shared.B[: self.outputs].to(like)

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        A, B = self.matrices(self.d)
        return y + self.b * ((self.d * (x @ A.T)) @ B.T)

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B = self.matrices(weight)
        return (self.b.to(weight)[:, None] * B) @ (self.d.to(weight)[:, None] * A), None


@peft.register("vera")
class VeRA(Method):
    """W' = W + diag(b) B diag(d) A: A [rank, in] and B [out, rank] are random, frozen and shared by all sites; b and d
    are trained.

    rank: of A and B.
    start: of every entry of d; b starts at 0.
    seed: of A and B, which are drawn from it whenever the adapter is attached; so a file holds b and d alone.

    It trains out + rank numbers for each matrix. A site smaller than the largest takes the first columns of A and the
    first rows of B.
    """

    paper = "Kopiczko et al. 2024, VeRA: Vector-based random matrix adaptation, arXiv:2310.11454, section 3.1, eq. 2"
    accepts = (Linear,)
    default_targets = ("attn.q*", "attn.v*")
    learning_rate = 1e-2
    size = "rank"

    def __init__(
        self,
        *,
        rank: Count = 256,
        start: Positive = 0.1,
        seed: Seed = 0,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(targets=targets, layers=layers)
        self.rank, self.start, self.seed = rank, start, seed

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        sites = [cast(Linear, site) for site in found.values()]
        inputs, outputs = max(site.in_features for site in sites), max(site.out_features for site in sites)
        A = (self.rank, inputs), math.sqrt(6 / inputs)  # of variance 2 / columns
        B = (outputs, self.rank), math.sqrt(6 / self.rank)
        self.shared = Shared(A, B, self.seed, sites[0].weight)

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Linear)
        return Vectors(site.in_features, site.out_features, self.start, self.shared)
