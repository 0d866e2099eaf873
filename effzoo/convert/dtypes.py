"""Dtypes tensor by tensor: a norm or a head that is float32 in a model in bfloat16 stays float32, both ways and through
folders. And so whether a tensor learns, both ways; folders do not say it.

transformers loads a folder in one dtype. Where its files hold several, the folder is loaded in the widest of them,
which changes no number, and each tensor then goes back to its own.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

NAMES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def hold_in(tensor: Tensor, dtype: torch.dtype) -> None:
    """Hold the content of a tensor in another dtype; the tensor stays the same object."""
    if tensor.dtype != dtype:
        tensor.data = tensor.data.to(dtype)


@torch.no_grad()
def copy_into(
    wanted: Mapping[str, Tensor], chosen: Mapping[str, Tensor], dtypes: bool, learns: Mapping[str, bool]
) -> None:
    """Write the chosen values into the wanted tensors of the same names.

    dtypes: whether the tensors take the values' dtypes, or keep their own.
    learns: {name: requires_grad}, for those whose flag is to be set.
    """
    for key, tensor in chosen.items():
        if dtypes:
            hold_in(wanted[key], tensor.dtype)
        wanted[key].copy_(tensor)
    let_learn(wanted, learns)


def let_learn(tensors: Mapping[str, Tensor], learns: Mapping[str, bool]) -> None:
    """Set `requires_grad` of the parameters that are named."""
    for key, flag in learns.items():
        if isinstance(tensors[key], nn.Parameter) and tensors[key].requires_grad != flag:
            tensors[key].requires_grad_(flag)


def load_state(theirs: Any, state: dict[str, Tensor], learns: Mapping[str, bool]) -> None:
    """Load a state dict into a model of transformers, each tensor in its own dtype and trainable as `learns` says.

    What their model ties stays tied.
    """
    tensors = {
        **dict(theirs.named_parameters(remove_duplicate=False)),
        **dict(theirs.named_buffers(remove_duplicate=False)),
    }
    for key, tensor in state.items():
        if key in tensors:
            hold_in(tensors[key], tensor.dtype)
    theirs.load_state_dict(state)
    let_learn(tensors, {key: flag for key, flag in learns.items() if key in tensors})


def from_pretrained(cls: Any, label: str, **more: Any) -> tuple[Any, Any]:
    """`cls.from_pretrained` with its loading info; every tensor in the dtype that the files hold it in."""
    model, info = cls.from_pretrained(label, output_loading_info=True, **more)
    dtypes = stored(label)
    if len(set(dtypes.values())) < 2:
        return model, info
    model, info = cls.from_pretrained(
        label, output_loading_info=True, dtype=functools.reduce(torch.promote_types, dtypes.values()), **more
    )
    prefix = f"{model.base_model_prefix}."
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        for name in (key, key.removeprefix(prefix), prefix + key):  # with a head, without it
            if name in dtypes:
                hold_in(tensor, dtypes[name])
                break
    return model, info


def stored(label: str) -> dict[str, torch.dtype]:
    """The dtypes of the floating-point tensors in a folder's safetensors files, or in those of a fetched hub id."""
    dtypes: dict[str, torch.dtype] = {}
    for file in _files(label):
        with safe_open(file, "pt") as opened:
            names = {key: opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
        dtypes |= {key: NAMES[name] for key, name in names.items() if name in NAMES}
    return dtypes


def _files(label: str) -> list[Path]:
    whole, index = (_file(label, name) for name in WEIGHTS)
    if whole is not None or index is None:
        return [] if whole is None else [whole]
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return [file for name in shards if (file := _file(label, name)) is not None]


def _file(label: str, name: str) -> Path | None:
    if os.path.isdir(label):
        path = Path(label) / name
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(label, name)
    return Path(cached) if isinstance(cached, str) else None
