"""Parallel adapters: a bottleneck that reads a sub-layer's input and adds to its output (He et al. 2022)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from effzoo.annotations import Count, NonZero
from effzoo.peft.function.houlsby import ACTIVATIONS, check_bottleneck
from effzoo.peft.method import Layers, Method, Targets
from effzoo.registry import peft
from effzoo.sites import Branch, HookContext, PeftModule, Positionwise, Site


class ParallelBottleneck(Positionwise, PeftModule):
    """y' = y + s (W_up sigma(W_down x + b_down) + b_up), x the sub-layer's input.

    W_down: [bottleneck, dim].
    W_up: [dim, bottleneck], which starts at 0.
    """

    def __init__(self, dim: int, bottleneck: int, activation: str, scale: float, learned: bool):
        super().__init__()
        self.down, self.up = nn.Linear(dim, bottleneck), nn.Linear(bottleneck, dim)
        self.activation = ACTIVATIONS[activation]()
        self.scale = nn.Parameter(torch.tensor(float(scale))) if learned else float(scale)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        return y + self.scale * self.up(self.activation(self.down(x)))


@peft.register("parallel", "parallel_adapter")
class Parallel(Method):
    """y = f(x) + s W_up sigma(W_down x) at the feed-forward f: the adapter reads what the sub-layer reads.

    bottleneck: inner width; 2 bottleneck dim + bottleneck + dim parameters a site.
    activation: sigma; relu in the paper.
    scale: s.
    learned: train s, from there on, one for each site.

    The paper finds this place better than after the sub-layer, and the feed-forward better than attention
    (`targets=attn.branch`; sections 4.3 and 4.4). W_up starts at 0, so the output is unchanged at first.
    """

    paper = (
        "He et al. 2022, Towards a unified view of parameter-efficient transfer learning, arXiv:2110.04366, section 3.3"
    )
    accepts = (Branch,)
    default_targets = ("mlp.branch",)
    size = "bottleneck"
    learning_rate = 1e-3

    def __init__(
        self,
        *,
        bottleneck: Count = 64,
        activation: str = "relu",
        scale: NonZero = 1.0,
        learned: bool = False,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(targets=targets, layers=layers)
        check_bottleneck(self.name, bottleneck, activation)
        self.bottleneck, self.activation, self.scale, self.learned = bottleneck, activation, scale, learned

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Branch)
        return ParallelBottleneck(site.dim, self.bottleneck, self.activation, self.scale, self.learned)


@peft.register("scaled_parallel", "scaled_parallel_adapter")
class ScaledParallel(Parallel):
    """y = f(x) + s W_up sigma(W_down x) with s = 4: the form that the paper takes for feed-forward layers.

    bottleneck: inner width.
    activation: sigma.
    scale: s, 4 in the paper.
    learned: train s, from there on.
    """

    paper = "He et al. 2022, arXiv:2110.04366, section 4.5"

    def __init__(
        self,
        *,
        bottleneck: Count = 64,
        activation: str = "relu",
        scale: NonZero = 4.0,
        learned: bool = False,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(
            bottleneck=bottleneck, activation=activation, scale=scale, learned=learned, targets=targets, layers=layers
        )
