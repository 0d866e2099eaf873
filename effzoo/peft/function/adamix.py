"""AdaMix: several adapters, one drawn at random for each pass, averaged at the end (Wang et al. 2022)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.annotations import Count, Few, NotNegative, Positive
from effzoo.devices import sent
from effzoo.peft.function.houlsby import ACTIVATIONS, check_bottleneck
from effzoo.peft.method import Layers, Modules, Targets
from effzoo.peft.training_hooks import TrainingHooks
from effzoo.registry import peft
from effzoo.sites import Branch, HookContext, PeftModule, Positionwise, Site


class Projections(nn.Module):
    """Linear layers, weights [experts, out, in] and biases [experts, out]: one drawn in training, else their mean."""

    def __init__(self, experts: int, inputs: int, outputs: int, std: float):
        super().__init__()
        self.weights = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.biases = nn.Parameter(torch.zeros(experts, outputs))
        nn.init.trunc_normal_(self.weights, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(self.weights) > 1:
            # of the CPU, replayed where a block is computed once more
            drawn = torch.randint(len(self.weights), (1,), device="cpu")
            drawn = sent(drawn, x.device)
            return F.linear(x, self.weights.index_select(0, drawn)[0], self.biases.index_select(0, drawn)[0])
        return F.linear(x, self.weights.mean(dim=0), self.biases.mean(dim=0))

    def merge(self) -> None:
        """Replace the experts by their mean."""
        self.weights = nn.Parameter(self.weights.detach().mean(dim=0, keepdim=True))
        self.biases = nn.Parameter(self.biases.detach().mean(dim=0, keepdim=True))


class MixtureOfAdapters(Positionwise, PeftModule):
    """y' = y + W_up^(j) sigma(W_down^(i) y), i and j drawn anew in each training pass; in evaluation the means."""

    def __init__(self, down: Projections, up: Projections, activation: str):
        super().__init__()
        self.down, self.up, self.activation = down, up, ACTIVATIONS[activation]()

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        return y + self.up(self.activation(self.down(y)))


@peft.register("adamix")
class AdaMix(TrainingHooks):
    """y' = y + W_up^(j) sigma(W_down^(i) y) after the feed-forward, i and j drawn anew in each site and training pass.

    bottleneck: inner width of an expert.
    experts: how many pairs.
    share: "down" or "up", a single such projection instead of several, or none; the paper shares one of them in its
        variants.
    consistency: weight of the symmetric divergence of two passes over each batch, which draw other experts (section
        3.3), so that training costs two passes; 0 for a single pass.
    activation: sigma.
    std: of the truncated normal that the weights start from.

    Evaluation uses the mean of the experts' weights, as the finished adapter does, which stores and costs what one
    adapter does (section 3.4). Where adapters are chosen by row, the rows of one adapter draw together. Experts are
    slices of one tensor: weight decay and Adam's moments act on those that were not drawn, too.
    """

    paper = (
        "Wang et al. 2022, AdaMix: MixtureOfAdapters-of-adaptations for parameter-efficient model tuning, "
        "arXiv:2205.12410, section 3"
    )
    identity_at_init = False
    accepts = (Branch,)
    default_targets = ("mlp.branch",)
    size = "bottleneck"
    learning_rate = 3e-3  # an expert takes part in one of `experts` passes

    def __init__(
        self,
        *,
        bottleneck: Count = 16,
        experts: Few = 4,
        share: Literal["down", "up"] | None = None,
        consistency: NotNegative = 1.0,
        activation: str = "gelu",
        std: Positive = 1e-2,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(targets=targets, layers=layers)
        check_bottleneck("adamix", bottleneck, activation)
        self.bottleneck, self.experts, self.share, self.activation = bottleneck, experts, share, activation
        self.std = std
        self.consistency = consistency

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Branch)
        down = Projections(1 if self.share == "down" else self.experts, site.dim, self.bottleneck, self.std)
        up = Projections(1 if self.share == "up" else self.experts, self.bottleneck, site.dim, self.std)
        return MixtureOfAdapters(down, up, self.activation)

    def finish(self, modules: Modules) -> None:
        for module in modules.values():
            assert isinstance(module, MixtureOfAdapters)
            module.down.merge()
            module.up.merge()
