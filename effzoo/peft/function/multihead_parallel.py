"""Multi-head parallel adapters: a small bottleneck for each attention head (He et al. 2022, section 4.4)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor, nn

from effzoo.annotations import Count, NonZero
from effzoo.peft.function.houlsby import ACTIVATIONS, check_bottleneck
from effzoo.peft.input.layer import layers_of
from effzoo.peft.method import Layers, Method
from effzoo.registry import peft
from effzoo.sites import HookContext, Linear, PeftModule, Site


class HeadBottlenecks(PeftModule):
    """head_i' = head_i + s W_up^i sigma(W_down^i x), before W_O; x is the input of the attention layer.

    W_down: [heads, bottleneck, dim].
    W_up: [heads, head_dim, bottleneck].
    """

    def __init__(self, dim: int, heads: int, head_dim: int, bottleneck: int, activation: str, scale: float):
        super().__init__()
        self.scale, self.activation = scale, ACTIVATIONS[activation]()
        self.down = nn.Parameter(torch.empty(heads, bottleneck, dim))
        self.up = nn.Parameter(torch.zeros(heads, head_dim, bottleneck))
        nn.init.uniform_(self.down, -1 / math.sqrt(dim), 1 / math.sqrt(dim))

    def before(self, x: Tensor, context: HookContext) -> Tensor:
        assert context.x is not None  # it hangs on the output of an attention layer
        narrow = self.activation(torch.einsum("bnd,hrd->bnhr", context.x.to(x), self.down))
        added = torch.einsum("bnhr,hdr->bnhd", narrow, self.up)
        return x + self.scale * rearrange(added, "b n h d -> b n (h d)")


@peft.register("multihead_parallel", "multi_head_parallel_adapter")
class MultiHeadParallel(Method):
    """head_i' = head_i + s W_up^i sigma(W_down^i x): one bottleneck per head reads the attention layer's input x.

    bottleneck: inner width of one head's; heads bottleneck (dim + head_dim) parameters a layer.
    activation: sigma.
    scale: s.

    This is what a prefix is in the unified view, but for the softmax (its table 1), and the paper compares the two.
    W_up starts at 0.
    """

    paper = (
        "He et al. 2022, Towards a unified view of parameter-efficient transfer learning, arXiv:2110.04366, section 4.4"
    )
    accepts = (Linear,)
    default_targets = ("attn.o",)
    size = "bottleneck"
    learning_rate = 1e-3

    def __init__(self, *, bottleneck: Count = 4, activation: str = "relu", scale: NonZero = 1.0, layers: Layers = None):
        super().__init__(layers=layers)
        check_bottleneck("multihead_parallel", bottleneck, activation)
        self.bottleneck, self.activation, self.scale = bottleneck, activation, scale

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        self.widths = {key: layer.width for key, layer in layers_of(self.name, model, found).items()}

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Linear)
        head_dim = site.in_features // site.heads
        return HeadBottlenecks(
            self.widths[id(site)], site.heads, head_dim, self.bottleneck, self.activation, self.scale
        )
