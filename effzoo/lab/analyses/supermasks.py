"""Masks on weights that are never trained (Zhou et al. 2019, Deconstructing lottery tickets, arXiv:1905.01067, sections
4-5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effzoo.errors import OptionError
from effzoo.lab.fit import Examples
from effzoo.peft.parameter.mask_scores import count, top_mask


def signed_constant(weight: Tensor) -> Tensor:
    """sign(W) std(W): every weight as large as its matrix' standard deviation, with the sign that was drawn."""
    return torch.where(weight < 0, -1.0, 1.0).to(weight) * weight.std()


def large_final(final: Tensor, keep: float) -> Tensor:
    """The mask of the share `keep` of weights that are largest in magnitude after training, exactly so many."""
    return top_mask(final.abs(), count(keep, final.numel()))


def large_final_same_sign(start: Tensor, final: Tensor, keep: float) -> Tensor:
    """The mask of the largest of max(0, w_final sign(w_start)): large after training, with the sign they started with.

    Exactly the share `keep`; where fewer have kept their sign, the rest are those that moved least beyond 0.
    """
    return top_mask(final * start.sign(), count(keep, final.numel()))


def task(name: str, examples: Examples, seed: int = 0) -> Examples:
    """Another task on the same images of digits, with labels among those of the digits: one output layer serves all.

    name: "digit", as it is; "parity", 0 even and 1 odd; "half", 0 for 0-4 and 1 for 5-9; "upside down", rows in reverse
        order; "shuffled", all pixels in another order, the same for every image; "renamed", labels in another order.
    seed: of the last two.

    Raises OptionError for another name.
    """
    pixels, labels = examples.inputs["pixels"], examples.labels
    draw = torch.Generator().manual_seed(seed)
    if name == "digit":
        return examples
    if name == "parity":
        return Examples(examples.inputs, labels % 2)
    if name == "half":
        return Examples(examples.inputs, (labels >= 5).long())
    if name == "upside down":
        return Examples({"pixels": pixels.flip(-2)}, labels)
    if name == "shuffled":
        order = torch.randperm(pixels[0].numel(), generator=draw)
        return Examples({"pixels": pixels.flatten(1)[:, order].view_as(pixels)}, labels)
    if name == "renamed":
        return Examples(examples.inputs, torch.randperm(10, generator=draw)[labels])
    raise OptionError(f"there is no task {name!r} on digits; there are {', '.join(TASKS)}")


TASKS = ("digit", "parity", "half", "upside down", "shuffled", "renamed")


def overlap(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The share of weights on which two masks agree, over all matrices."""
    agree = sum(int((a == b).sum()) for a, b in zip(one, other, strict=True))
    return agree / sum(mask.numel() for mask in one)
