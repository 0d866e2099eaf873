"""Intrinsic dimension: all weights move in one random subspace of few dimensions (Li et al. 2018, arXiv:1804.08838)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from effzoo.annotations import Count, Seed
from effzoo.errors import OptionError
from effzoo.peft.method import Layers, Method, Targets
from effzoo.peft.parameter.fastfood import Fastfood, power_of_two
from effzoo.registry import peft
from effzoo.sites import PeftModule, Site

DENSE_LIMIT = 2**26  # entries of a dense P: 256 MiB in float32


class DenseProjection(nn.Module):
    """P theta for one tensor, with the part of P that belongs to it, [entries, dim]."""

    P: Tensor

    def __init__(self, P: Tensor):
        super().__init__()
        self.register_buffer("P", P, persistent=False)

    def forward(self, theta: Tensor) -> Tensor:
        return self.P.to(theta) @ theta


class Subspace(PeftModule):
    """W' = W + lambda P theta, and the same for the bias, with P of each tensor's own.

    theta: [dim], one for all sites.
    factor: lambda, one for all tensors of a layer; None for 1.
    projections: {of_weight, of_bias: P}.
    """

    delta_rank = None

    def __init__(self, theta: nn.Parameter, factor: nn.Parameter | None, projections: Mapping[str, nn.Module]):
        super().__init__()
        self.theta, self.factor = theta, factor
        self.projections = nn.ModuleDict(projections)

    def weight(self, weight: Tensor) -> Tensor:
        return self.moved("weight", weight)

    def bias(self, bias: Tensor) -> Tensor:
        return self.moved("bias", bias)

    def moved(self, name: str, start: Tensor) -> Tensor:
        step: Tensor = self.projections[f"of_{name}"](self.theta.to(start)).view(start.shape)
        return start + (step if self.factor is None else self.factor.to(start) * step)


@peft.register("intrinsic", "fastfood", "intrinsic_dimension")
class Intrinsic(Method):
    """theta_D = theta_0 + P theta_d: `dim` numbers theta_d move all D numbers of the targets through a random P [D,
    dim].

    dim: d.
    projection: "fastfood", H G Pi H S for each tensor, in D log D time and D memory (section S7); "dense", a normal P
        whose columns have length 1, for small models: dim * D is at most 2^26.
    seed: of P, which is drawn from it whenever the adapter is attached, on the CPU with a generator of its own; so a
        file holds theta_d alone.

    theta_d starts at 0. The scale of both projections is the same: the entries of P have the variance 1 / D over all
    targets together, so a step of theta_d moves theta_D by the same length. The targets are the weights and biases of
    all blocks; the papers also move the embeddings (`targets=*`), which are most of a small model and would take most
    of the time.
    """

    paper = (
        "Li et al. 2018, Measuring the intrinsic dimension of objective landscapes, arXiv:1804.08838, section 2 and S7"
    )
    default_targets = ("attn.*", "mlp.*")
    learning_rate = 1e-1  # above the 3e-2 of other code, whose P has unit columns in each tensor: here they are shorter
    size = "dim"
    structured = False

    def __init__(
        self,
        *,
        dim: Count = 1000,
        projection: Literal["fastfood", "dense"] = "fastfood",
        seed: Seed = 0,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(targets=targets, layers=layers)
        self.dim, self.projection, self.seed = dim, projection, seed

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        places = [site for site in found.values() if site.base()]
        parameters = [parameter for site in places for parameter in site.base().values()]
        self.total = sum(parameter.numel() for parameter in parameters)
        layers = sorted({-1 if site.layer is None else site.layer for site in places}) if self.structured else []
        if self.dim <= len(layers):
            raise OptionError(
                f"{self.name}: dim={self.dim} must hold one factor for each of {len(layers)} layers "
                "and more; give a larger dim"
            )
        self.theta = nn.Parameter(torch.zeros(self.dim - len(layers)))
        self.factors = {layer: nn.Parameter(torch.ones(())) for layer in layers}
        seeds = torch.randint(
            2**32, (len(parameters),), generator=torch.Generator().manual_seed(self.seed), device="cpu"
        ).tolist()
        self.seeds = {id(parameter): seed for parameter, seed in zip(parameters, seeds, strict=True)}
        if self.projection == "dense":
            self._check_dense()
            squares = torch.zeros(len(self.theta), dtype=torch.float64, device=parameters[0].device)
            for parameter in parameters:
                squares += self._drawn(parameter).square().sum(dim=0)
            self.lengths = squares.sqrt()

    def make(self, site: Site) -> PeftModule | None:
        base = site.base()
        if not base:
            return None
        factor = self.factors.get(-1 if site.layer is None else site.layer)
        return Subspace(
            self.theta, factor, {f"of_{name}": self._projection(parameter) for name, parameter in base.items()}
        )

    def _projection(self, parameter: Tensor) -> nn.Module:
        if self.projection == "dense":
            return DenseProjection(self._drawn(parameter) / self.lengths)
        seed = None if parameter.is_meta else self.seeds[id(parameter)]
        return Fastfood(parameter.numel(), len(self.theta), self._scale(parameter), seed)

    def _scale(self, parameter: Tensor) -> float:
        """Length of a column over all padded entries, so that its entries have the variance 1 / D."""
        return math.sqrt(power_of_two(max(parameter.numel(), len(self.theta))) / self.total)

    def _drawn(self, parameter: Tensor) -> Tensor:
        """The part of a dense P that belongs to one tensor, [entries, dim], before the columns are normalised."""
        shape = parameter.numel(), len(self.theta)
        if parameter.is_meta:
            return torch.empty(shape, dtype=torch.float64, device="meta")
        draw = torch.Generator().manual_seed(self.seeds[id(parameter)])
        return torch.randn(shape, generator=draw, dtype=torch.float64, device="cpu").to(parameter.device)

    def _check_dense(self) -> None:
        if self.total * self.dim > DENSE_LIMIT:
            raise OptionError(
                f"{self.name}: a dense P for {self.total:,} numbers and dim={self.dim} has {self.total * self.dim:,} "
                f"entries, the limit is {DENSE_LIMIT:,}; use projection='fastfood', fewer targets, or a smaller dim"
            )


@peft.register("said", "intrinsic_said")
class SAID(Intrinsic):
    """theta_D of layer i = theta_0 + lambda_i P theta_(d - m), with a trained factor for each of the m layers, 1 at
    first.

    dim: d, of which m are the factors.
    projection: "fastfood" or "dense", as in intrinsic.
    seed: of P, as in intrinsic.

    Tensors outside the blocks, when they are targets, share one factor.
    """

    paper = (
        "Aghajanyan et al. 2020, Intrinsic dimensionality explains the effectiveness of language model "
        "fine-tuning, arXiv:2012.13255, section 3.2"
    )
    structured = True
    size = "dim"  # `within` tries small sizes first, and those that cannot hold the factors are refused
