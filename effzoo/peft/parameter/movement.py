"""Movement pruning: weights are kept that training moves away from 0 (Sanh et al. 2020, arXiv:2005.07683)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effzoo.annotations import Fraction, NotNegative, ProperShare, Share
from effzoo.peft.method import Layers, Modules, Targets
from effzoo.peft.parameter.magnitude import PrunedWeight
from effzoo.peft.parameter.mask_scores import (
    MATRICES,
    check_choice,
    check_window,
    count,
    cubic,
    straight_through,
    through,
    top_mask,
    top_masks,
)
from effzoo.peft.training_hooks import TrainingHooks
from effzoo.registry import peft
from effzoo.sites import Linear, PeftModule, Site


class ScoredWeight(PrunedWeight):
    """W' = M * phi; the gradient of the scores is dL/dW' * phi, as if M were the scores (straight-through)."""

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        self.scores: nn.Parameter | None = nn.Parameter(torch.zeros_like(weight))

    def weight(self, weight: Tensor) -> Tensor:
        if self.scores is None or not torch.is_grad_enabled():
            return super().weight(weight)
        return straight_through(self.mask, self.scores) * self.own

    def finish(self) -> None:
        super().finish()
        self.scores = None


@peft.register("movement", "movement_pruning")
class Movement(TrainingHooks):
    """W' = M(S) * phi: phi starts as a copy of W, the scores S at 0, both are trained; dL/dS = dL/dW' * phi.

    mode: "hard", M keeps the largest scores, and the share that is kept falls as keep + (1 - keep) (1 - t)^3; "soft", M
        = 1[sigma(S) > tau] with tau rising in the same way from 0 to `threshold`, and the loss grows by penalty * mean
        sigma(S).
    keep: the share of `hard`; `soft` keeps at least 0.5 % of each matrix.
    scope: of `hard`, the share of each "tensor" or of all together, "global".
    begin, end: the shares of the training between which t goes from 0 to 1; pruning begins late, because scores of 0
        say nothing yet.
    threshold: of `soft`.
    penalty: of `soft`.

    A short training bears little: in 50 steps on MiniLM, 3 % pruned cost nothing and 10 % left it at chance, so the
    default is 3 %; the paper prunes 85 to 97 % over many epochs. The mask is chosen anew before every step, so a pruned
    weight can come back. Targets are matrices. Finished, a file holds one bit a weight and the kept values.
    """

    paper = "Sanh, Wolf & Rush 2020, Movement pruning: adaptive sparsity by fine-tuning, arXiv:2005.07683, sections 3-4"
    default_targets = MATRICES
    learning_rate = 1e-4
    rates = {"scores": 100.0}  # 1e-2, as in the paper

    def __init__(
        self,
        *,
        mode: str = "hard",
        keep: Share = 0.97,
        scope: str = "tensor",
        begin: Fraction = 0.1,
        end: Fraction = 0.6,
        threshold: ProperShare = 0.1,
        penalty: NotNegative = 400.0,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(targets=targets, layers=layers)
        self.mode = check_choice("movement", "mode", mode, ("hard", "soft"))
        self.keep = keep
        self.scope = check_choice("movement", "scope", scope, ("tensor", "global"))
        self.window = check_window("movement", begin, end)
        self.schedule_ends = end
        self.threshold, self.weight = threshold, penalty

    def make(self, site: Site) -> PeftModule | None:
        return ScoredWeight(site.weight) if isinstance(site, Linear) else None

    def schedule(self, modules: Modules, progress: float) -> None:
        scored = [module for module in modules.values() if isinstance(module, ScoredWeight)]
        if self.mode == "hard":
            keep = cubic(through(progress, *self.window), 1.0, self.keep)
            masks = top_masks([_scores(module) for module in scored], keep, self.scope)
        else:
            tau = cubic(through(progress, *self.window), 0.0, self.threshold)
            masks = [above(_scores(module), tau) for module in scored]
        for module, mask in zip(scored, masks, strict=True):
            module.mask.copy_(mask)

    def penalty(self, modules: Modules) -> Tensor | None:
        scores = [
            module.scores
            for module in modules.values()
            if isinstance(module, ScoredWeight) and module.scores is not None
        ]
        if self.mode == "hard" or not scores:
            return None
        total = sum(score.numel() for score in scores)
        return self.weight / total * torch.stack([score.sigmoid().sum() for score in scores]).sum()

    def finish(self, modules: Modules) -> None:
        for module in modules.values():
            assert isinstance(module, ScoredWeight)
            module.finish()


def above(scores: Tensor, tau: float) -> Tensor:
    """1[sigma(S) > tau], and the largest 0.5 % in any case: a matrix of zeros would have no gradient."""
    mask = scores.sigmoid() > tau
    least = count(0.005, scores.numel())
    return mask if int(mask.sum()) >= least else top_mask(scores, least)


def _scores(module: ScoredWeight) -> Tensor:
    assert module.scores is not None
    return module.scores.detach()
