"""AdaLoRA: a change in the form of a singular value decomposition, of which training keeps the important triplets
(Zhang et al. 2023, arXiv:2303.10512)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effzoo.annotations import Count, Fraction, NotNegative, Positive, Share
from effzoo.checked import known
from effzoo.devices import at_hand
from effzoo.errors import IncompatibleError
from effzoo.peft.method import Layers, Modules, Targets
from effzoo.peft.parameter.mask_scores import (
    check_window,
    count,
    cubic,
    has_values,
    pack_bits,
    through,
    top_masks,
    unpack_bits,
)
from effzoo.peft.training_hooks import TrainingHooks
from effzoo.registry import peft
from effzoo.sites import HookContext, Linear, Packed, PeftModule, Positionwise, Site

NOTHING_SEEN = (
    "adalora chooses by gradients and has seen none: call effzoo.peft.after_backward(model) between the backward pass "
    "and the optimizer's step, as effzoo.finetune does"
)


class Triplets(Packed, Positionwise, PeftModule):
    """y' = y + s P (m * E * Q x): P [out, rank], E [rank], Q [rank, in], of which the mask m keeps some triplets.

    sensitivity_*, uncertainty_*: moving averages for each entry, until the training is finished.

    Until then the gradient of E is that without the mask, so that a triplet may come back. Stored, once finished, as
    the bits of the mask and the triplets that it keeps.
    """

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float):
        super().__init__()
        self.scale, self.finished, self.delta_rank = scale, False, min(rank, inputs, outputs)
        self.P, self.Q = nn.Parameter(torch.empty(outputs, rank)), nn.Parameter(torch.empty(rank, inputs))
        self.E = nn.Parameter(torch.zeros(rank))
        for vectors in (self.P, self.Q):
            nn.init.normal_(vectors, std=0.02)
        self.register_buffer("mask", torch.ones(rank, dtype=torch.bool))
        for name in ("P", "E", "Q"):
            for average in ("sensitivity", "uncertainty"):
                self.register_buffer(f"{average}_{name}", torch.zeros_like(getattr(self, name)))

    def values(self) -> Tensor:
        """m * E."""
        passed = torch.zeros_like(self.E) if self.finished else self.E - self.E.detach()
        return torch.where(self.mask, self.E, passed)

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        return y + self.scale * ((x @ self.Q.T) * self.values()) @ self.P.T

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        P, E, Q = (part.to(weight) for part in (self.P, self.values(), self.Q))
        return self.scale * (P * E) @ Q, None

    def distance(self) -> Tensor:
        """||P^T P - I||^2 + ||Q Q^T - I||^2 (eq. 4)."""
        identity = torch.eye(len(self.E), dtype=self.E.dtype, device=self.E.device)
        return (self.P.T @ self.P - identity).square().sum() + (self.Q @ self.Q.T - identity).square().sum()

    @torch.no_grad()
    def look(self, beta1: float, beta2: float) -> None:
        """Follow I = |w dL/dw| of each entry w: its moving average, and that of the distance from it (eq. 8-10)."""
        for name in ("P", "E", "Q"):
            w, sensitivity = getattr(self, name), getattr(self, f"sensitivity_{name}")
            now = torch.zeros_like(w) if w.grad is None else (w * w.grad).abs()
            sensitivity.lerp_(now, 1 - beta1)
            getattr(self, f"uncertainty_{name}").lerp_((now - sensitivity).abs(), 1 - beta2)

    def importance(self) -> Tensor:
        """S [rank] of each triplet: s(E) + the means of s over its vectors, s = sensitivity * uncertainty (eq. 7)."""
        P, E, Q = (getattr(self, f"sensitivity_{name}") * getattr(self, f"uncertainty_{name}") for name in "PEQ")
        return E + P.mean(dim=0) + Q.mean(dim=1)

    @torch.no_grad()
    def finish(self) -> None:
        """Write the zeros, and drop the averages."""
        self.finished = True
        self.P.masked_fill_(~self.mask, 0.0)
        self.E.masked_fill_(~self.mask, 0.0)
        self.Q.masked_fill_(~self.mask[:, None], 0.0)
        for name in ("P", "E", "Q"):
            setattr(self, f"sensitivity_{name}", None)
            setattr(self, f"uncertainty_{name}", None)

    def kept(self) -> dict[str, Tensor]:
        """P, E and Q of the triplets that the mask keeps; of a model without memory, all of them."""
        mask = self.mask if has_values(self.mask) else slice(None)
        return {"P": self.P[:, mask], "E": self.E[mask], "Q": self.Q[mask]}

    def packed(self) -> dict[str, Tensor] | None:
        return {"bits": pack_bits(self.mask), **self.kept()} if self.finished else None

    def unpack(self, tensors: dict[str, Tensor]) -> None:
        mask = unpack_bits(tensors["bits"].to(self.mask.device), self.mask.shape)
        number = int(mask.sum())
        for name, shape in (("P", (len(self.P), number)), ("E", (number,)), ("Q", (number, self.Q.shape[1]))):
            if tensors[name].shape != shape:
                raise ValueError(f"the mask keeps {number} triplets, got {name} of shape {tuple(tensors[name].shape)}")
        self.mask.copy_(mask)
        for own in (self.P, self.E, self.Q):
            own.zero_()
        self.P[:, mask], self.E[mask], self.Q[mask] = (tensors[name].to(self.E) for name in ("P", "E", "Q"))


@peft.register("adalora")
class AdaLoRA(TrainingHooks):
    """W' = W + s P E Q, with a diagonal E that starts at 0: entries of E are set to 0 while training, so that the rank
    goes where it is needed.

    rank: of every matrix at the start.
    keep: the share of all the diagonal entries, of all matrices together, that is left at the end.
    scale: s.
    orthogonality: weight of sum ||P^T P - I||^2 + ||Q Q^T - I||^2 in the loss, which keeps the columns of P and the
        rows of Q apart.
    begin, end: the shares of the training between which the share that is kept falls as keep + (1 - keep) (1 - t)^3;
        from then on it stays as it is.
    beta1, beta2: of the moving averages of sensitivity and uncertainty.

    The entries are chosen anew before every step until the end, by the importance S of the triplet (column of P, entry
    of E, row of Q): smoothed |w dL/dw| times its uncertainty. It trains rank * (in + out + 1) numbers for each matrix;
    finished, a file holds the triplets that are left.
    """

    paper = "Zhang et al. 2023, AdaLoRA: Adaptive budget allocation, arXiv:2303.10512, sections 3.1-3.3, algorithm 1"
    accepts = (Linear,)
    default_targets = ("attn.q*", "attn.v*")
    learning_rate = 5e-3
    size = "rank"

    def __init__(
        self,
        *,
        rank: Count = 12,
        keep: Share = 0.67,
        scale: Positive = 1.0,
        orthogonality: NotNegative = 0.1,
        begin: Fraction = 0.1,
        end: Fraction = 0.7,
        beta1: Fraction = 0.85,
        beta2: Fraction = 0.85,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(targets=targets, layers=layers)
        self.rank, self.keep, self.scale, self.orthogonality = rank, keep, scale, orthogonality
        self.window, self.betas = check_window(self.name, begin, end), (beta1, beta2)
        self.schedule_ends = end

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Linear)
        return Triplets(site.in_features, site.out_features, self.rank, self.scale)

    def after_backward(self, modules: Modules) -> None:
        for module in _triplets(modules):
            module.look(*self.betas)

    @torch.no_grad()
    def schedule(self, modules: Modules, progress: float) -> None:
        triplets, done = _triplets(modules), through(progress, *self.window)
        if done and self.keep < 1:
            scores = _seen([module.importance() for module in triplets])
            masks = top_masks(scores, cubic(done, 1.0, self.keep), "global")
            before = torch.cat([module.mask for module in triplets])
            chosen = (before.sum() <= count(self.keep, len(before))) & (done == 1)
            for module, mask in zip(triplets, masks, strict=True):
                module.mask.copy_(torch.where(chosen, module.mask, mask))
        for module in triplets:
            module.E.masked_fill_(~module.mask, 0.0)

    def penalty(self, modules: Modules) -> Tensor | None:
        if not self.orthogonality:
            return None
        return self.orthogonality * torch.stack([module.distance() for module in _triplets(modules)]).sum()

    def finish(self, modules: Modules) -> None:
        for module in _triplets(modules):
            module.finish()


def _triplets(modules: Modules) -> list[Triplets]:
    return [module for module in modules.values() if isinstance(module, Triplets)]


def _seen(scores: list[Tensor]) -> list[Tensor]:
    """The scores; IncompatibleError where all of them are 0."""
    some = torch.stack([score.any() for score in scores]).any()
    if at_hand(some) and not bool(some):
        raise IncompatibleError(NOTHING_SEEN)
    return [known(scores[0], some, NOTHING_SEEN), *scores[1:]]
