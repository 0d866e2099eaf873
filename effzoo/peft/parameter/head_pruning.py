"""Pruning attention heads by a gate on each head's output (Michel et al. 2019; Voita et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from effzoo.annotations import NotNegative, Number, Probability
from effzoo.peft.method import Batches, Layers, Modules, Targets, examples
from effzoo.peft.parameter.hard_concrete import drawn_gate, open_probability, still_gate
from effzoo.peft.parameter.mask_scores import check_choice, top
from effzoo.peft.training_hooks import TrainingHooks
from effzoo.registry import peft
from effzoo.sites import Counted, HookContext, Linear, PeftModule, Positionwise, Site

LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3


class HeadGates(Positionwise, Counted, PeftModule):
    """o(xi * heads): one gate xi per head of the input of W_O; merged, the head's columns of W_O change by xi."""

    delta_rank = None

    def __init__(self, site: Linear, alpha: float | None):
        super().__init__()
        self.heads, self.width = site.heads, site.in_features // site.heads
        self.alpha: nn.Parameter | None = (
            None if alpha is None else nn.Parameter(site.weight.new_full((site.heads,), alpha))
        )
        self.gate: Tensor | nn.Parameter | None
        self.register_buffer("gate", site.weight.new_ones(site.heads) if alpha is None else None)

    @property
    def draws_weights(self) -> bool:
        """Whether gates are drawn in each training pass."""
        return self.alpha is not None

    def gates(self) -> Tensor:
        """xi [heads]."""
        if self.alpha is None:
            assert self.gate is not None
            return self.gate
        return drawn_gate(self.alpha, LOW, HIGH, TEMPERATURE) if self.training else still_gate(self.alpha, LOW, HIGH)

    def before(self, x: Tensor, context: HookContext) -> Tensor:
        return x * self.gates().repeat_interleave(self.width).to(x)

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gates = self.gates() if self.alpha is None else still_gate(self.alpha, LOW, HIGH)
        return weight * (gates.to(weight).repeat_interleave(self.width) - 1), None

    def changed(self, weight: Tensor | None, bias: Tensor | None) -> int:
        """How many entries of the site merging may change: the columns of gated heads; in training of all heads."""
        heads = self.heads if self.alpha is not None or self.gate is None else int((self.gate != 1).sum())
        return 0 if weight is None else heads * self.width * weight.shape[0]

    def finish(self) -> None:
        """Keep the gates of evaluation, one number a head."""
        if self.alpha is not None:
            self.gate, self.alpha = still_gate(self.alpha.detach(), LOW, HIGH), None


@peft.register("head_pruning", "heads")
class HeadPruning(TrainingHooks):
    """MultiHead(x) = W_O [xi_1 head_1, ..., xi_h head_h]: a head whose gate xi is 0 is pruned.

    mode: "gates", trained hard-concrete gates with stretch (-0.1, 1.1) and temperature 2/3, and the loss grows by
        penalty * sum P(xi != 0) (Voita); "importance", nothing but the task head is trained, and `calibrate` sets the
        gates of the heads with the lowest I_h = 1/N sum_i |dL_i / dxi_h|, divided by its L2 norm over the layer, to 0
        (Michel).
    share: of the heads, over all layers together, that `importance` prunes.
    penalty: lambda of `gates`.
    alpha: where `gates` start; from 2.4 on they are open in evaluation.

    The heads themselves are not trained; add another method for that: `head_pruning|lora`. Merged, the columns of W_O
    of a pruned head are 0: the model computes what it would without that head. Weight decay pulls alpha towards
    half-open gates.
    """

    paper = (
        "Michel et al. 2019, Are sixteen heads really better than one?, arXiv:1905.10650, section 4; Voita et al. "
        "2019, arXiv:1905.09418, section 6"
    )
    accepts = (Linear,)
    default_targets = ("attn.o", "cross.o")
    learning_rate = 2e-1  # of alpha, which has far to go: at 5e-2 no gate closes in a hundred steps

    def __init__(
        self,
        *,
        mode: str = "gates",
        share: Probability = 0.3,
        penalty: NotNegative = 0.003,
        alpha: Number = 3.0,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(targets=targets, layers=layers)
        self.mode = check_choice("head_pruning", "mode", mode, ("gates", "importance"))
        self.mode = mode
        self.share, self.weight, self.alpha = share, penalty, alpha
        self.identity_at_init = mode == "importance" or alpha >= 2.4

    def hooks_in_use(self) -> set[str]:
        return super().hooks_in_use() - ({"calibrate"} if self.mode == "gates" else set())

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Linear)
        return HeadGates(site, self.alpha if self.mode == "gates" else None)

    def penalty(self, modules: Modules) -> Tensor | None:
        alphas = [
            module.alpha for module in modules.values() if isinstance(module, HeadGates) and module.alpha is not None
        ]
        if not alphas:
            return None
        return self.weight * open_probability(torch.cat([*alphas]), LOW, HIGH, TEMPERATURE).sum()

    def calibrate(self, model: nn.Module, modules: Modules, batches: Batches) -> None:
        gated = cast("Mapping[str, HeadGates]", modules)
        scores = importance(model, gated, batches)
        total = sum(len(score) for score in scores)
        pruned = top([-score for score in scores], round(self.share * total)) if round(self.share * total) else None
        with torch.no_grad():
            gates = scores[0].new_ones(total)
            if pruned is not None:
                gates[pruned] = 0
            for module, own in zip(
                gated.values(), torch.split(gates, [module.heads for module in gated.values()]), strict=True
            ):
                assert module.gate is not None
                module.gate.copy_(own)

    def finish(self, modules: Modules) -> None:
        for module in modules.values():
            assert isinstance(module, HeadGates)
            module.finish()


def importance(model: nn.Module, gated: Mapping[str, HeadGates], batches: Batches) -> list[Tensor]:
    """I_h of the heads of every layer, at gates of 1: the mean over examples of |dL / dxi_h|, divided by the layer's
    norm."""
    before = [module.gate for module in gated.values()]
    for module in gated.values():  # for the time being parameters, which is what reversible blocks pass gradients to
        del module.gate
        module.gate = nn.Parameter(
            torch.ones_like(next(gate for gate in before if gate is not None)[:1]).expand(module.heads).clone()
        )
    try:
        scores = [torch.zeros_like(cast(Tensor, module.gate)) for module in gated.values()]
        for example in examples(batches):
            gradients = torch.autograd.grad(
                model(**example).loss, [cast(Tensor, module.gate) for module in gated.values()]
            )
            for score, gradient in zip(scores, gradients, strict=True):
                score += gradient.abs()
    finally:
        for module, gate in zip(gated.values(), before, strict=True):
            del module.gate
            module.register_buffer("gate", gate)
    return [score.detach() / score.detach().norm().clamp(min=1e-30) for score in scores]
