"""Prompts in every layer, read through the layer's own projections (Liu et al. 2021, P-tuning v2, arXiv:2110.07602)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from effzoo.annotations import Count, NotNegative
from effzoo.peft.input.layer import Starts, layers_of, read_through, start_from_activations
from effzoo.peft.method import Batches, Layers, Modules, Targets
from effzoo.peft.training_hooks import TrainingHooks
from effzoo.registry import peft
from effzoo.sites import HookContext, Memory, MemorySite, PeftModule, Site


class DeepPromptTokens(Starts):
    """Trained prompt tokens [length, width] of one layer; what the layer makes of them is its memory."""

    def __init__(self, length: int, width: int, std: float):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(length, width) * std)

    def memory(self, context: HookContext) -> Memory | None:
        return None if self.looks(context) else read_through(context, self.tokens)

    def start(self, rows: Tensor, context: HookContext) -> None:
        self.tokens.copy_(rows)


@peft.register("deep_prompt", "p_tuning_v2")
class DeepPrompt(TrainingHooks):
    """head_i = Attn(x W_q, [p W_k, x W_k], [p W_v, x W_v]): `length` trained rows p per layer, read through the layer's
    own projections.

    It is what a prompt does whose rows are replaced before each layer. And it is a prefix with (P_k, P_v) = (p W_k, p
    W_v), biases included, of half as many numbers: keys and values are tied to one row, and lie in what the projections
    reach. `prefix` trains both freely, which is how the paper's code does it. LoRA on W_k or W_v acts on the rows too.
    Keys are not turned in rotary models; Longformer uses its local projections, for global queries as well.

    length: rows per layer.
    init: "activations", the layer's inputs at the first `length` tokens of the training data, by `calibrate`;
        "normal", with standard deviation std, which also stands there until data have been seen.
    std: of that. Layer inputs have about 1, after their norm; but random rows of that size disturb: with them 100
        steps of MiniLM on film reviews end below a trained head alone.
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
