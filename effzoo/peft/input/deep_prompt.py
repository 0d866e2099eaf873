"""Prompts in every layer, read through the layer's own projections (Liu et al. 2021, P-tuning v2, arXiv:2110.07602)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from effzoo.annotations import Count, NotNegative
from effzoo.peft.input.layer import StartsFromActivations, keys_and_values, layers_of, start_from_activations
from effzoo.peft.method import Batches, Layers, Modules, Targets
from effzoo.peft.training_hooks import TrainingHooks
from effzoo.registry import peft
from effzoo.sites import HookContext, Memory, MemorySite, PeftModule, Site


class DeepPromptTokens(StartsFromActivations):
    """Prompt tokens p [length, width] of one layer; their keys and values are its memory."""

    def __init__(self, length: int, width: int, std: float):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(length, width) * std)

    def memory(self, context: HookContext) -> Memory | None:
        return None if self.collects(context) else keys_and_values(context, self.tokens)

    def start(self, tokens: Tensor, context: HookContext) -> None:
        self.tokens.copy_(tokens)


@peft.register("deep_prompt", "p_tuning_v2")
class DeepPrompt(TrainingHooks):
    """head_i = Attn(x W_q, [p W_k, x W_k], [p W_v, x W_v]): `length` prompt tokens p per layer, by its own projections.

    length: prompt tokens per layer.
    init: "activations", the layer's inputs at the first `length` tokens of the training data, by `calibrate`; "normal",
        with standard deviation std, which is also what stands there until data have been seen.
    std: of "normal". Layer inputs have about 1, after their norm, but random tokens of that size disturb: with them 100
        steps of MiniLM on film reviews end below a trained head alone.

    It is what a prompt does whose tokens are replaced before each layer. And it is a prefix with (P_k, P_v) = (p W_k, p
    W_v), biases included, of half as many numbers: keys and values are tied to one token, and lie in what the
    projections reach. `prefix` trains both freely, which is how the paper's code does it.

    LoRA on W_k or W_v acts on the prompt tokens too. Keys are not rotated in rotary models; Longformer uses its local
    projections, for global queries as well.
    """

    paper = "Liu et al. 2021, P-tuning v2, arXiv:2110.07602, section 3"
    identity_at_init = False
    accepts = (MemorySite,)
    default_targets = ("attn.memory",)
    size = "length"
    learning_rate = 2e-2

    def __init__(
        self,
        *,
        length: Count = 16,
        init: Literal["activations", "normal"] = "activations",
        std: NotNegative = 0.3,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(targets=targets, layers=layers)
        self.length, self.init, self.std = length, init, std

    def hooks_in_use(self) -> set[str]:
        return super().hooks_in_use() if self.init == "activations" else set()

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        self.widths = {key: layer.width for key, layer in layers_of(self.name, model, found).items()}

    def make(self, site: Site) -> PeftModule:
        return DeepPromptTokens(self.length, self.widths[id(site)], self.std)

    def calibrate(self, model: nn.Module, modules: Modules, batches: Batches) -> None:
        start_from_activations(self.name, model, modules, self.length, batches)
