"""A model on its devices: on one, or its blocks over several (`device_map`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from effzoo.errors import IncompatibleError, OptionError, listing, shown

BY_SIZE = ("auto", "balanced", "balanced_low_0", "sequential")  # of accelerate, by the memory that is free
DeviceMap = str | int | torch.device | Mapping[str, Any] | None


def placed(model: Any, device_map: DeviceMap) -> Any:
    """The model, on the devices of a map.

    device_map: a device ("cpu", "cuda:1", 0) for all of it; {path of a module: device}, in which "" is the whole model;
        or "auto", "balanced", "balanced_low_0" and "sequential", with which accelerate fills the devices by the memory
        that is free on them. None leaves it where it is. A block stays in one piece, and inputs follow the blocks from
        device to device.

    Raises OptionError for a map that leaves a tensor out or names what is not there, IncompatibleError for a model that
        cannot be taken apart.
    """
    if device_map is None:
        return model
    by_size = isinstance(device_map, str) and device_map in BY_SIZE
    places = _by_size(model, str(device_map)) if by_size else _given(device_map)
    _check(model, places)
    if len(set(places.values())) == 1:
        return model.to(next(iter(places.values())))
    if getattr(model.config, "residual", "") == "reversible":
        raise IncompatibleError("a reversible model computes its blocks back on one device; give device_map one device")
    if getattr(model.config, "is_encoder_decoder", False):
        raise IncompatibleError(
            "an encoder-decoder is computed on one device: the embedding that its stacks share would be on one of "
            "several; give device_map one device"
        )
    from accelerate import dispatch_model

    return dispatch_model(model, places)


def check_not_both(shard: str | None, device_map: DeviceMap) -> None:
    """OptionError where a model would be split over processes and over the devices of one."""
    if shard is not None and device_map is not None:
        raise OptionError(f"shard={shard!r} gives each process a device of its own; leave device_map out")


def _given(device_map: Any) -> dict[str, torch.device]:
    entries = device_map if isinstance(device_map, Mapping) else {"": device_map}
    if not entries:
        raise OptionError("device_map is empty; name a device, or {path of a module: device}")
    return {path: _device(place) for path, place in entries.items()}


def _device(place: Any) -> torch.device:
    if place == "disk":
        raise OptionError("device_map has no 'disk': a model that is too large for the memory is split over processes")
    try:
        device = torch.device("cuda", place) if type(place) is int else torch.device(place)
    except (RuntimeError, TypeError):
        raise OptionError(
            f"device_map has no device {shown(place)}; name one as torch does ('cpu', 'cuda:1', 1), or one of "
            f"{listing(BY_SIZE)}"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"device_map names {device}, and there are {torch.cuda.device_count()} CUDA devices")
    return device


def _by_size(model: nn.Module, how: str) -> dict[str, torch.device]:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    whole = sorted({type(block).__name__ for block in getattr(model, "blocks", ())})
    if how == "sequential":
        memory = get_max_memory()
    else:
        memory = get_balanced_memory(model, no_split_module_classes=whole, low_zero=how == "balanced_low_0")
    found = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole)
    places = {path: _device(place) for path, place in found.items()}
    if _shares_embedding(model) and "embeddings" in places:
        places["head"] = places["embeddings"]
    return places


def _shares_embedding(model: nn.Module) -> bool:
    """Whether a language-model head reads the token embedding, and so is where that is."""
    return str(getattr(model, "task", "")).endswith("_lm") and bool(getattr(model.config, "tied", False))


def _check(model: nn.Module, places: Mapping[str, torch.device]) -> None:
    """Every tensor has a device, every path is there, and blocks stay whole."""
    modules = dict(model.named_modules())
    for path in places:
        if path not in modules:
            raise OptionError(
                f"device_map names {shown(path)}, which is no module of the model; the first ones are "
                f"{listing([name for name, _ in model.named_children()])}"
            )
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        if not any(path == "" or name.startswith(f"{path}.") for path in places):
            raise OptionError(f"device_map has no device for {name}; name its module, or '' for all others")
    if _shares_embedding(model) and places.get("head", places.get("")) != places.get("embeddings", places.get("")):
        raise OptionError("the head is tied to the token embedding; give 'embeddings' and 'head' one device")
