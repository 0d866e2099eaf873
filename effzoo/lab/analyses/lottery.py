"""Lottery tickets: train, prune the smallest weights, rewind, train again (Frankle & Carbin 2019, arXiv:1803.03635,
sections 1-2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from effzoo import peft
from effzoo.errors import OptionError
from effzoo.lab.fit import ADAM, Examples, accuracy, fit
from effzoo.peft.parameter.magnitude import PrunedWeight
from effzoo.sites import Linear, sites

NAME = "ticket"


@dataclass
class Learned:
    """One training of one network under one mask.

    every: steps between two accuracies.
    masks: those that it was trained under.
    """

    every: int
    accuracies: list[float] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)

    @property
    def last(self) -> float:
        """The accuracy at the end."""
        return self.accuracies[-1]

    @property
    def left(self) -> float:
        """The share of weights that are left."""
        return sum(int(mask.sum()) for mask in self.masks) / sum(mask.numel() for mask in self.masks)

    def reached(self, level: float) -> int | None:
        """The first step, a multiple of `every`, after which the accuracy is at least `level`; None if it never is."""
        return next((self.every * (i + 1) for i, accuracy in enumerate(self.accuracies) if accuracy >= level), None)


def iterative(
    model: nn.Module,
    train: Examples,
    test: Examples,
    *,
    rounds: int,
    steps: int,
    prune: float = 0.2,
    prune_last: float = 0.1,
    batch: int = 60,
    learning_rate: float = 1.2e-3,
    every: int = 20,
    seed: int = 0,
) -> list[Learned]:
    """Iterative magnitude pruning with rewinding: one training for each of 0 ... `rounds` prunings.

    After each training the smallest weights of each matrix are set to 0 for good, and the others return to where they
    started. The zoo's `magnitude` does it; training is by Adam with a rate that falls linearly to 0 each time.

    model: of Linear sites without biases; its last one is the output.
    rounds, steps: prunings, and steps of each training.
    prune, prune_last: the share of the weights left that goes, in each matrix and in the last one.
    every: steps between two accuracies.

    Raises OptionError for steps that `every` does not divide.
    """
    _check(steps, every)
    *inner, last = [site.role for _, site in sites(model) if isinstance(site, Linear)]
    spec = [
        {"name": "magnitude", "rewind": True, "rounds": rounds, "keep": (1 - share) ** rounds, "targets": targets}
        for share, targets in ((prune, tuple(inner)), (prune_last, (last,)))
    ]
    peft.attach(model, spec, name=NAME)
    trainings = [Learned(every) for _ in range(rounds + 1)]

    def after(step: int, loss: float) -> None:
        """Count, and note the masks when a training ends."""
        learned = trainings[(step - 1) // steps]
        if step % every == 0:
            learned.accuracies.append(accuracy(model, test, 1024))
        if not learned.masks:
            learned.masks = [mask.clone() for mask in masks(model)]

    total = (rounds + 1) * steps
    fit(model, train.stream(batch, seed), total, learning_rate=learning_rate, after=after, **ADAM)
    peft.detach(model, NAME)
    return trainings


def masked(
    model: nn.Module,
    chosen: Sequence[Tensor],
    train: Examples,
    test: Examples,
    *,
    steps: int,
    batch: int = 60,
    learning_rate: float = 1.2e-3,
    every: int = 20,
    seed: int = 0,
) -> Learned:
    """One training of the network under given masks, bool like its matrices, as `iterative` trains it."""
    _check(steps, every)
    matrices = [site for _, site in sites(model) if isinstance(site, Linear)]
    peft.attach(
        model,
        {"name": "magnitude", "keep": 1.0, "schedule": "oneshot", "targets": tuple(site.role for site in matrices)},
        name=NAME,
    )
    for mask, given in zip(masks(model), chosen, strict=True):
        mask.copy_(given)
    learned = Learned(every, masks=[mask.clone() for mask in chosen])

    def after(step: int, loss: float) -> None:
        """Count."""
        if step % every == 0:
            learned.accuracies.append(accuracy(model, test, 1024))

    fit(model, train.stream(batch, seed), steps, learning_rate=learning_rate, after=after, **ADAM)
    peft.detach(model, NAME)
    return learned


def _check(steps: int, every: int) -> None:
    if steps < 1 or every < 1 or steps % every:
        raise OptionError(
            f"accuracy is counted after every {every} of {steps} steps; give a number that divides the steps, "
            f"{steps} for the end alone"
        )


def masks(model: nn.Module) -> list[Tensor]:
    """The masks of the active pruned adapter, from the first site on; they are the adapter's own, not copies."""
    modules = [module for _, site in sites(model) for module in site.hung() if isinstance(module, PrunedWeight)]
    return [module.mask for module in modules]


def reshuffled(chosen: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Masks with as many entries in each matrix, at random places."""
    draw = torch.Generator().manual_seed(seed)
    return [mask.flatten()[torch.randperm(mask.numel(), generator=draw)].view_as(mask) for mask in chosen]
