"""Magnitude pruning: the largest weights are kept and trained (Zhu & Gupta 2017, arXiv:1710.01878).

With rewinding it is the lottery ticket (Frankle & Carbin 2019, arXiv:1803.03635).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from effzoo.annotations import Few, Fraction, Probability, Share
from effzoo.errors import OptionError
from effzoo.peft.method import Layers, Modules, Targets
from effzoo.peft.parameter.mask_scores import (
    MATRICES,
    check_choice,
    check_window,
    cubic,
    has_values,
    pack_bits,
    through,
    top_masks,
    unpack_bits,
)
from effzoo.peft.training_hooks import Stage, TrainingHooks
from effzoo.registry import peft
from effzoo.sites import Counted, Linear, Packed, PeftModule, Site

STEPS = 50  # of the schedule: choosing costs a pass over all weights


class PrunedWeight(Packed, Counted, PeftModule):
    """W' = M * phi: phi starts as a copy of W; what the mask M leaves out is 0, whatever the optimizer does to it.

    Stored, once finished, as the bits of the mask and the kept values.
    """

    delta_rank = None

    def __init__(self, weight: Tensor):
        super().__init__()
        self.finished = False
        self.own = nn.Parameter(weight.detach().clone())
        self.mask: Tensor
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))

    def weight(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, self.own, torch.zeros_like(self.own))

    def finish(self) -> None:
        """Write the zeros into the copy."""
        self.finished = True
        with torch.no_grad():
            self.own.masked_fill_(~self.mask, 0.0)

    def changed(self, weight: Tensor | None, bias: Tensor | None) -> int:
        """How many entries of the site merging may change: pruned or trained, all of the matrix."""
        return self.own.numel()

    def packed(self) -> dict[str, Tensor] | None:
        if not self.finished:
            return None
        # in a model without memory nobody knows how many
        kept = self.own[self.mask] if has_values(self.mask) else self.own.flatten()
        return {"bits": pack_bits(self.mask), "values": kept}

    def unpack(self, tensors: dict[str, Tensor]) -> None:
        mask, values = unpack_bits(tensors["bits"].to(self.mask.device), self.mask.shape), tensors["values"]
        if values.shape != (int(mask.sum()),):
            raise ValueError(f"the mask keeps {int(mask.sum())} weights, got values of shape {tuple(values.shape)}")
        self.mask.copy_(mask)
        self.own.zero_()
        self.own[mask] = values.to(self.own)


class RewoundWeight(PrunedWeight):
    """`PrunedWeight` with the weights to which the kept ones return."""

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        self.start: Tensor | None
        self.register_buffer("start", weight.detach().clone())

    def finish(self) -> None:
        super().finish()
        self.start = None


@peft.register("magnitude", "magnitude_pruning", "lottery_ticket")
class Magnitude(TrainingHooks):
    """W' = M * phi: M keeps the entries with the largest |phi|, phi starts as a copy of W and is trained.

    keep: share of the weights that stay.
    scope: the share of each "tensor", or "global", of all together.
    schedule: "cubic", the share that is kept falls as keep + (1 - keep) (1 - t)^3, in 50 steps, and what is pruned
        stays so; "oneshot", all at once before training.
    begin, end: the shares of the training between which t goes from 0 to 1.
    rewind: the lottery ticket instead: train, prune, set the kept weights back to where they started, train again.
    rounds: of that; each keeps the same share of what is left.
    rewind_at: the share of the first round's steps to which weights are set back; 0 for the start.

    Targets are matrices; embeddings, norms and biases are not pruned. phi is dense while it is trained, since any
    weight may turn out to be kept; finished, a file holds one bit a weight and the kept values.
    """

    paper = (
        "Zhu & Gupta 2017, To prune, or not to prune, arXiv:1710.01878, section 3; rewinding: Frankle & Carbin "
        "2019, arXiv:1803.03635"
    )
    default_targets = MATRICES
    learning_rate = 1e-4

    def __init__(
        self,
        *,
        keep: Share = 0.5,
        scope: str = "tensor",
        schedule: str = "cubic",
        begin: Fraction = 0.0,
        end: Fraction = 0.6,
        rewind: bool = False,
        rewind_at: Probability = 0.0,
        rounds: Few = 1,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(targets=targets, layers=layers)
        self.keep = keep
        self.scope = check_choice("magnitude", "scope", scope, ("tensor", "global"))
        self.how = check_choice("magnitude", "schedule", schedule, ("cubic", "oneshot"))
        self.window = check_window("magnitude", begin, end)
        self.schedule_ends = 0.0 if schedule == "oneshot" else end
        if not rewind and (rewind_at or rounds > 1):
            raise OptionError(
                f"magnitude: rewind_at={rewind_at} and rounds={rounds} belong to rewind=true; give it, "
                "or leave them out"
            )
        if rewind and schedule != "cubic":
            raise OptionError(
                "magnitude: with rewind=true the weights are pruned between the rounds; leave schedule out"
            )
        self.rewind, self.rewind_at, self.rounds = rewind, rewind_at, rounds
        self.identity_at_init = rewind or schedule == "cubic"
        if rewind:
            self.stages = tuple(Stage(f"round {i}", 1 / (rounds + 1)) for i in range(rounds + 1))
        self.round = 0

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        self.masks: dict[int, Tensor] = {}
        if not self.rewind and self.how == "oneshot":
            matrices = [site for site in found.values() if isinstance(site, Linear) and has_values(site.weight)]
            masks = top_masks([site.weight.abs() for site in matrices], self.keep, self.scope) if matrices else []
            self.masks = {id(site): mask for site, mask in zip(matrices, masks, strict=True)}

    def make(self, site: Site) -> PeftModule | None:
        if not isinstance(site, Linear):
            return None
        module = (RewoundWeight if self.rewind else PrunedWeight)(site.weight)
        if id(site) in self.masks:
            module.mask.copy_(self.masks.pop(id(site)))
        return module

    def schedule(self, modules: Modules, progress: float) -> None:
        if self.rewind:
            if self.round == 0 and 0 < progress <= self.rewind_at:
                for module in modules.values():
                    assert isinstance(module, RewoundWeight) and module.start is not None
                    module.start.copy_(module.own.detach())
        elif self.how == "cubic":
            done = int(STEPS * through(progress, *self.window)) / STEPS
            prune(modules, cubic(done, 1.0, self.keep), self.scope)

    def begin(self, stage: str, modules: Modules) -> None:
        self.round = [own.name for own in self.stages].index(stage)
        if self.round:
            prune(modules, self.keep ** (self.round / self.rounds), self.scope)
            for module in modules.values():
                assert isinstance(module, RewoundWeight) and module.start is not None
                module.own.data.copy_(module.start)

    def finish(self, modules: Modules) -> None:
        for module in modules.values():
            assert isinstance(module, PrunedWeight)
            module.finish()


def prune(modules: Modules, keep: float, scope: str) -> None:
    """Keep this share of the weights, those with the largest magnitude; what is pruned already comes last."""
    pruned = [module for module in modules.values() if isinstance(module, PrunedWeight)]
    if keep < 1:
        scores = [torch.where(module.mask, module.own.detach().abs(), -1.0) for module in pruned]
        for module, mask in zip(pruned, top_masks(scores, keep, scope), strict=True):
            module.mask &= mask
