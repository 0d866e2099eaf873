"""VeRA: random matrices that all layers share, frozen, and two trained vectors a layer (Kopiczko et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from effzoo.annotations import Count, Positive, Seed
from effzoo.peft.method import Layers, Method, Targets
from effzoo.registry import peft
from effzoo.sites import HookContext, Linear, PeftModule, Positionwise, Site


class Shared(nn.Module):
    """A [rank, inputs] and B [outputs, rank] of all sites, uniform with the variance 2 / columns, from a seed.

    seed: of a CPU generator, so that no file holds them; None makes shapes alone, on the meta device.
    """

    A: Tensor
    B: Tensor

    def __init__(self, inputs: int, outputs: int, rank: int, seed: int | None):
        super().__init__()
        draw = None if seed is None else torch.Generator().manual_seed(seed)
        for name, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            if draw is None:
                drawn = torch.empty(shape, device="meta")
            else:
                bound = math.sqrt(6 / shape[1])
                drawn = torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=draw)
            self.register_buffer(name, drawn, persistent=False)


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
        weight = sites[0].weight
        self.shared = Shared(inputs, outputs, self.rank, None if weight.is_meta else self.seed).to(weight.device)

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Linear)
        return Vectors(site.in_features, site.out_features, self.start, self.shared)
