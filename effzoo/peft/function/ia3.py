"""(IA)3: learned vectors rescale keys, values and the feed-forward's hidden units (Liu et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effzoo.peft.method import Layers, Method, Targets
from effzoo.registry import peft
from effzoo.sites import HookContext, Keys, Linear, PeftModule, Positionwise, Site


class ScaleOutput(Positionwise, PeftModule):
    """y' = l * y; merged, the weights and the bias of each output are multiplied by its l."""

    delta_rank = None

    def __init__(self, size: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        return y * self.scale

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        change = self.scale.to(weight) - 1
        return change[:, None] * weight, None if bias is None else change * bias


class ScaleInput(Positionwise, PeftModule):
    """y' = W (l * x) + b; merged, the weights of each input are multiplied by its l."""

    delta_rank = None

    def __init__(self, size: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def before(self, x: Tensor, context: HookContext) -> Tensor:
        return x * self.scale

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * (self.scale.to(weight) - 1), None


@peft.register("ia3")
class IA3(Method):
    """softmax(q (l_k * k)^T / sqrt(d)) (l_v * v) and W_2 (l_ff * act(W_1 x)): three vectors per block, starting at 1.

    On `mlp.down` the vector multiplies the input, that is the hidden units after the activation, as in the paper; on
    any other target it multiplies the output.

    Where keys are normalised queries (LSH, the role `attn.keys`) it multiplies the normalised keys, and queries and
    buckets stay as they are. That is no change of the one projection of both, so such a vector cannot be merged;
    `targets=(attn.v*, mlp.down)` leaves it out. The keys and values of a prefix or a prompt are not scaled: they are no
    projections.
    """

    paper = (
        "Liu et al. 2022, Few-shot parameter-efficient fine-tuning is better and cheaper, arXiv:2205.05638, section 3.3"
    )
    accepts = (Linear, Keys)
    learning_rate = 5e-3  # factors near 1 barely move at the rates of matrices
    default_targets = ("attn.k*", "attn.v*", "mlp.down")

    def __init__(self, *, targets: Targets = None, layers: Layers = None):
        super().__init__(targets=targets, layers=layers)

    def make(self, site: Site) -> PeftModule:
        if isinstance(site, Keys):
            return ScaleOutput(site.dim)
        assert isinstance(site, Linear)
        return ScaleInput(site.in_features) if site.role.endswith("mlp.down") else ScaleOutput(site.out_features)
