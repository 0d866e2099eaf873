"""Supermasks: a binary mask over fixed weights is all that is learned (Mallya et al. 2018; Zhao et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effzoo.annotations import Number, Share
from effzoo.errors import OptionError
from effzoo.peft.method import Layers, Modules, Targets
from effzoo.peft.parameter.mask_scores import MATRICES, count, pack_bits, straight_through, top_mask, unpack_bits
from effzoo.peft.training_hooks import TrainingHooks
from effzoo.registry import peft
from effzoo.sites import Counted, Linear, PeftModule, Site


class MaskedWeight(Counted, PeftModule):
    """W' = W * M(S), W fixed; finished, the scores are dropped and one bit a weight is left, in memory and in files."""

    delta_rank = None

    def __init__(self, weight: Tensor, init: float, threshold: float, keep: float | None):
        super().__init__()
        self.shape, self.threshold, self.keep = weight.shape, threshold, keep
        start = (
            torch.full_like(weight, init)
            if keep is None
            else init * weight.detach().abs() / weight.detach().abs().mean().clamp(min=1e-12)
        )
        self.scores: nn.Parameter | None = nn.Parameter(start)
        self.bits: Tensor | None
        self.register_buffer("bits", None)

    def mask(self) -> Tensor:
        """bool[out, in]."""
        if self.scores is None:
            assert self.bits is not None
            return unpack_bits(self.bits, self.shape)
        if self.keep is None:
            return self.scores.detach() >= self.threshold
        return top_mask(self.scores.detach(), count(self.keep, self.scores.numel()))

    def weight(self, weight: Tensor) -> Tensor:
        mask = self.mask()
        if self.scores is None or not torch.is_grad_enabled():
            return torch.where(mask, weight, torch.zeros_like(weight))
        return straight_through(mask, self.scores) * weight

    def finish(self) -> None:
        """One bit a weight."""
        if self.scores is not None:
            self.bits, self.scores = pack_bits(self.mask()), None

    def changed(self, weight: Tensor | None, bias: Tensor | None) -> int:
        """How many entries of the site merging may change: those that the finished mask leaves out, in training any."""
        return self.shape.numel() - (int(self.mask().sum()) if self.scores is None else 0)


@peft.register("supermask", "piggyback", "masking")
class Supermask(TrainingHooks):
    """W' = W * 1[S >= threshold] with W fixed and real scores S trained straight through: dL/dS = dL/dW' * W.

    init: of all scores.
    threshold: of the mask; a score that equals it keeps its weight, as in Mallya et al., section 3.
    keep: instead of a threshold, this share of each matrix, that with the largest scores; the scores then start as init
        |W| / mean |W|, so the first mask is that of magnitude pruning.

    With init at the threshold or above everything is kept at first, so the output is unchanged; with `keep` it is not.
    Weight decay pulls scores below a positive threshold, that is, it prunes. Embeddings, norms and biases are not
    masked.

    As many scores are trained as there are weights, but a finished mask is one bit a weight: masks of many tasks live
    side by side on one base, and `activate` switches. Two active masks keep what both keep.
    """

    paper = (
        "Mallya et al. 2018, Piggyback, arXiv:1801.06519, section 3; on language models: Zhao et al. 2020, "
        "arXiv:2004.12406, section 3"
    )
    default_targets = MATRICES
    learning_rate = 5e-4  # scores start 5e-3 above the threshold: at 1e-4 none crosses it in a hundred steps

    def __init__(
        self,
        *,
        init: Number = 1e-2,
        threshold: Number = 5e-3,
        keep: Share | None = None,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(targets=targets, layers=layers)
        if keep is None and init < threshold:
            raise OptionError(
                "supermask: init is at least threshold, or nothing is kept at first, got "
                f"init={init}, threshold={threshold}"
            )
        if keep is not None and init <= 0:
            raise OptionError(f"supermask: init is positive, got {init}")
        self.keep = keep
        self.init, self.threshold = init, threshold
        self.identity_at_init = keep is None or keep == 1

    def make(self, site: Site) -> PeftModule | None:
        return MaskedWeight(site.weight, self.init, self.threshold, self.keep) if isinstance(site, Linear) else None

    def finish(self, modules: Modules) -> None:
        for module in modules.values():
            assert isinstance(module, MaskedWeight)
            module.finish()
