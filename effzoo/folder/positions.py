"""More positions, or fewer, for a model that is there."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from effzoo.annotations import Count
from effzoo.architectures import AnyModel
from effzoo.convert.transfer import POSITIONS, extended
from effzoo.errors import IncompatibleError, listing
from effzoo.folder.description import Description
from effzoo.folder.made import base_tensors, made_of, other_buffers
from effzoo.peft.attach import attached
from effzoo.sites import unwrap


@torch.no_grad()
def resize_positions(model: Any, max_length: Count) -> Any:
    """A model of at most `max_length` positions with the weights of one of more or less, which it shares.

    A table of learned positions is repeated in order, or cut (Beltagy et al. 2020, Longformer, arXiv:2004.05150,
    section 5). Rotary and sinusoidal positions have no table.

    Raises IncompatibleError for adapters, which were trained with the positions that are there, and for other tensors
        whose shape belongs to the length, as Linformer's E and F.
    """
    model = unwrap(model)
    if not isinstance(model, AnyModel):
        raise IncompatibleError(f"resize_positions takes a model of effzoo, got {type(model).__name__}")
    if names := attached(model):
        raise IncompatibleError(
            f"the adapters {listing(names)} were trained with the positions that are there; merge or detach them first"
        )
    said = Description.of_base(model)
    said = dataclasses.replace(said, config=dataclasses.replace(model.config, max_length=max_length))
    other, _ = made_of(said, "the model's config")
    mine, offset = {**base_tensors(model), **other_buffers(model)}, getattr(model.config, "position_offset", 0)
    for key, there in {**base_tensors(other), **other_buffers(other)}.items():
        tensor = mine[key]
        if key.endswith(POSITIONS) and len(there) != len(tensor):
            tensor = extended(tensor, len(there), offset)
        if tensor.shape != there.shape:
            raise IncompatibleError(
                f"{key} is {list(tensor.shape)} for {model.config.max_length} positions and {list(there.shape)} for "
                f"{max_length}: it belongs to the length"
            )
        there.data = tensor.data
        there.requires_grad_(mine[key].requires_grad)
    other.label_names = model.label_names
    return other.train(model.training)
