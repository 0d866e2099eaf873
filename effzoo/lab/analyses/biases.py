"""Biases by role and layer: their gradients, and how far training moves them (Ben Zaken et al. 2022, BitFit,
arXiv:2106.10199, section 4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from effzoo import peft
from effzoo.errors import TargetError
from effzoo.sites import sites

ByPlace = dict[str, dict[int | None, float]]  # role -> layer (None outside the blocks) -> number


def bias_changes(model: nn.Module, name: str = "default") -> ByPlace:
    """mean |b' - b| over the entries of every bias that an adapter changes: 1/dim(b) ||b_0 - b_F||_1.

    An adapter that was given biases and has not moved them has 0 there.

    Raises AdapterError for an adapter that is no change of weights.
    """
    changes = {
        key: float(change.abs().mean()) for key, change in peft.delta(model, name).items() if key.endswith(".bias")
    }
    known = dict(sites(model))
    hung = {path for places in peft.attached(model)[name].places.values() for path, _ in places}
    values: ByPlace = {}
    for key, value in changes.items():
        path = key.removesuffix(".bias")
        if path in hung:
            values.setdefault(known[path].role, {})[known[path].layer] = value
    return values


def bias_gradients(model: nn.Module, batch: Mapping[str, Tensor]) -> ByPlace:
    """max |dL/db| over the entries of every bias of the base, for one labelled batch, in the model's own precision.

    Whether parameters are trainable is left as it was, and so are their gradients.

    Raises TargetError for a model without biases.
    """
    places = [
        (site.role, site.layer, bias)
        for _, site in sites(model)
        if isinstance(bias := site.base().get("bias"), nn.Parameter)
    ]
    if not places:
        raise TargetError(
            f"{type(model).__name__} has no biases whose gradient could be taken; models without "
            "biases have norms to train"
        )
    before = [bias.requires_grad for _, _, bias in places]
    try:
        for _, _, bias in places:
            bias.requires_grad_(True)
        gradients = torch.autograd.grad(model(**batch).loss, [bias for _, _, bias in places], allow_unused=True)
    finally:
        for (_, _, bias), trained in zip(places, before, strict=True):
            bias.requires_grad_(trained)
    largest: ByPlace = {}
    for (role, layer, _), gradient in zip(places, gradients, strict=True):
        largest.setdefault(role, {})[layer] = 0.0 if gradient is None else float(gradient.abs().max())
    return largest


def mean_of(places: ByPlace, role: str) -> float:
    """The mean over the layers of one role."""
    return sum(places[role].values()) / len(places[role])
