"""Multi-head parallel adapters: a small bottleneck beside each attention head (He et al. 2022, arXiv:2110.04366, section 4.4)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor, nn

from effzoo.annotations import Count, NonZero
from effzoo.errors import IncompatibleError
from effzoo.peft.function.houlsby import ACTIVATIONS, check_bottleneck
from effzoo.peft.input.layer import layers_of
from effzoo.peft.method import Layers, Method
from effzoo.registry import peft
from effzoo.sites import KeysValues, Linear, Memory, PeftModule, Seen, Site


class Input:
    """The present input of an attention layer, handed from its memory site, which sees it, to its output, which does not."""

    x: Tensor | None = None


class Catch(PeftModule):
    """Takes the layer's input; adds no keys."""

    def __init__(self, held: Input):
        super().__init__()
        self.held = held

    def remember(self, seen: Seen) -> KeysValues | None:
        self.held.x = seen.x
        return None


class HeadBottlenecks(PeftModule):
    """head_i' = head_i + s W_up^i sigma(W_down^i x), W_down [heads, bottleneck, dim] and W_up [heads, head_dim, bottleneck], before W_O."""

    by_position = False

    def __init__(self, held: Input, dim: int, heads: int, head_dim: int, bottleneck: int, activation: str, scale: float):
        super().__init__()
        self.held, self.scale, self.activation = held, scale, ACTIVATIONS[activation]()
        self.down, self.up = nn.Parameter(torch.empty(heads, bottleneck, dim)), nn.Parameter(torch.zeros(heads, head_dim, bottleneck))
        nn.init.uniform_(self.down, -1 / math.sqrt(dim), 1 / math.sqrt(dim))

    def before(self, x: Tensor) -> Tensor:
        layer_input, self.held.x = self.held.x, None
        if layer_input is None or layer_input.shape[:-1] != x.shape[:-1]:
            raise IncompatibleError("multihead_parallel sees its layer's input for whole batches only; run rows with other adapters apart")
        narrow = self.activation(torch.einsum("bnd,hrd->bnhr", layer_input.to(x), self.down))
        added = torch.einsum("bnhr,hdr->bnhd", narrow, self.up)
        return x + self.scale * rearrange(added, "b n h d -> b n (h d)")


@peft.register("multihead_parallel", "multi_head_parallel_adapter")
class MultiHeadParallel(Method):
    """head_i' = head_i + s W_up^i sigma(W_down^i x): beside attention, one bottleneck per head, which reads the layer's input.

    bottleneck: inner width of one head's; heads bottleneck (dim + head_dim) parameters a layer. activation: sigma. scale: s.

    This is what a prefix is in the unified view, but for the softmax (its table 1), and the paper compares the two. W_up starts at 0.
    """

    paper = "He et al. 2022, Towards a unified view of parameter-efficient transfer learning, arXiv:2110.04366, section 4.4"
    accepts = (Memory, Linear)
    default_targets = ("attn.memory", "attn.o")
    size = "bottleneck"
    learning_rate = 1e-3

    def __init__(self, *, bottleneck: Count = 4, activation: str = "relu", scale: NonZero = 1.0, layers: Layers = None):
        super().__init__(layers=layers)
        check_bottleneck("multihead_parallel", bottleneck, activation)
        self.bottleneck, self.activation, self.scale = bottleneck, activation, scale

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        memories = {path: site for path, site in found.items() if isinstance(site, Memory)}
        widths = layers_of(self.name, model, memories)
        self.width = {path.rpartition(".")[0]: widths[id(site)].width for path, site in memories.items()}
        self.path = {id(site): path.rpartition(".")[0] for path, site in found.items()}
        self.held = {path: Input() for path in self.width}

    def make(self, site: Site) -> PeftModule:
        layer = self.path[id(site)]
        if isinstance(site, Memory):
            return Catch(self.held[layer])
        assert isinstance(site, Linear)
        head_dim = site.in_features // site.heads
        return HeadBottlenecks(self.held[layer], self.width[layer], site.heads, head_dim, self.bottleneck, self.activation, self.scale)
