"""LLaMA-Adapter: gated attention to prompt tokens in the upper layers (Zhang et al. 2023, arXiv:2303.16199)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from effzoo.annotations import Count, NotNegative, Whole
from effzoo.peft.input.layer import keys_and_values, layers_of
from effzoo.peft.method import Layers, Method, Targets
from effzoo.registry import peft
from effzoo.sites import HookContext, Memory, MemorySite, PeftModule, Site, sites


class GatedPromptTokens(PeftModule):
    """Prompt tokens p [length, width] and a gate g [heads] of one layer."""

    def __init__(self, length: int, width: int, heads: int, std: float):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(length, width) * std)
        self.gate = nn.Parameter(torch.zeros(heads))

    def memory(self, context: HookContext) -> Memory:
        return keys_and_values(context, self.tokens, self.gate.tanh())


@peft.register("llama_adapter")
class LlamaAdapter(Method):
    """head_i + tanh(g_i) Attn(x W_q, p W_k, p W_v): prompt tokens p with a softmax of their own, added before W_o.

    length: prompt tokens per layer.
    skip: how many of the lowest layers have none, at most all but one (the paper: 2 of 32); `layers` says instead which
        ones have.
    std: of the normal distribution that the prompt tokens start from.

    The gates g start at 0, so nothing changes at the start, and until a gate has moved, its prompt tokens get no
    gradient (section 3.2, eq. 6 to 8; the gate of a head is that of the released code). The layer's own projections
    make keys and values of them, which are not rotated in rotary models.
    """

    paper = "Zhang et al. 2023, LLaMA-Adapter, arXiv:2303.16199, section 3"
    accepts = (MemorySite,)
    default_targets = ("attn.memory",)
    size = "length"
    learning_rate = 2e-2

    def __init__(
        self,
        *,
        length: Count = 10,
        skip: Whole = 2,
        std: NotNegative = 1.0,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(targets=targets, layers=layers)
        self.length, self.skip, self.std = length, skip, std

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        self.found = layers_of(self.name, model, found)
        depth = 1 + max((site.layer for _, site in sites(model) if site.layer is not None), default=0)
        self.lowest = min(self.skip, depth - 1) if self.layers is None else 0

    def make(self, site: Site) -> PeftModule | None:
        if site.layer is not None and site.layer < self.lowest:
            return None
        layer = self.found[id(site)]
        return GatedPromptTokens(self.length, layer.width, layer.heads, self.std)
