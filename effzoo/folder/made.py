"""The model that a description says, before its tensors are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effzoo import zoo
from effzoo.architectures import AnyModel
from effzoo.attention.lsh import LSH
from effzoo.codes import empty
from effzoo.errors import FileError, shown
from effzoo.folder.description import Description
from effzoo.quantisation import QuantisedLinear
from effzoo.sites import Linear, sites
from effzoo.undrawn import Undrawn


def made_of(said: Description, where: str) -> tuple[AnyModel, Undrawn]:
    """A model whose parameters are not drawn, with room for codes where it is quantised; torch's draws go on as before.

    where: names the description in errors.

    Raises FileError for sites that the model does not have, and what making a model raises.
    """
    undrawn = Undrawn()
    with torch.random.fork_rng(devices=[]), undrawn:
        model: AnyModel = zoo.made(said.config, said.task, said.own_labels)
    there = dict(sites(model))
    for path, bits in said.quantised.items():
        site = there.get(path)
        if not isinstance(site, Linear):
            raise FileError(f"{where} has {shown(path)} quantised, where this model has no linear site")
        QuantisedLinear.holding(site, bits, *empty(site.weight, bits))
    modules = dict(model.named_modules())
    for path, entry in said.hashing.items():
        core = modules.get(path)
        if not isinstance(core, LSH):
            raise FileError(f"{where} has rotations for {shown(path)}, where this model has no LSH attention")
        core.hash_seed = entry["seed"]
    if model.embeddings.token is not None:
        model.embeddings.token.added = said.added_tokens
    return model, undrawn


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without adapters."""
    return {key: value for key, value in model.state_dict(keep_vars=True).items() if not of_adapter(key)}


def other_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that no state dict holds, without those of adapters."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if name in module._non_persistent_buffers_set and buffer is not None and not of_adapter(f"{path}.")
    }


def of_adapter(key: str) -> bool:
    """Whether a tensor is of an adapter."""
    return ".adapters." in f".{key}"


def other_fact(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """The first fact with two values, in words; those that one side alone has come from another version of effzoo."""
    for name, value in theirs.items():
        if name in ours and ours[name] != value:
            return f"{name} is {shown(value)} there and {shown(ours[name])} here"
    return None
