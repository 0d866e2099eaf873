"""What a file holds of an adapter: its tensors, packed where a module can, and what of the base they replace."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from effzoo.errors import AdapterError
from effzoo.peft.attach import adapter_tensors
from effzoo.peft.method import HEAD
from effzoo.peft.parameter.selective_methods import Copy
from effzoo.peft.parameter.tokens import spans
from effzoo.peft.state import label_layers
from effzoo.sites import Growing, Packed, sites


def stored_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What a file holds of an adapter, by the tensor's key without the adapter's name.

    A module that can packs its tensors; what modules share is there once.
    """
    packed, before = _packed(model, name), f".adapters.{name}."
    whole = {key.replace(before, ".adapters.", 1): value for key, value in adapter_tensors(model, name).items()}
    tensors = {key: value for key, value in whole.items() if not key.startswith(tuple(packed))}
    return tensors | {
        f"{prefix}{key}": value for prefix, module in packed.items() for key, value in (module.packed() or {}).items()
    }


def replaced(model: nn.Module, name: str) -> set[str]:
    """The keys of the base's tensors that an adapter replaces by its own: those of the task head."""
    return {
        f"{path}.{parameter}"
        for path, site in sites(model)
        if fnmatchcase(site.role, HEAD) and name in site.adapters
        for parameter in site.base()
        if any(isinstance(module, Copy) and hasattr(module, f"own_{parameter}") for module in site.hung(name))
    }


def replaced_embeddings(model: nn.Module, name: str) -> dict[str, str]:
    """The tokens whose embeddings an adapter replaces (`tokens`), as in "5-7+9", by key of the table."""
    tokens: dict[str, set[int]] = {}
    for path, site in sites(model):
        for module in site.hung(name):
            if isinstance(module, Growing):
                tokens.setdefault(path, set()).update(module.replaces())
    return {f"{path}.weight": spans(sorted(numbers)) for path, numbers in tokens.items() if numbers}


def check_fits(
    model: nn.Module, name: str, tensors: Mapping[str, Tensor], directory: Path, unknown: tuple[str, ...] = ()
) -> None:
    """Refuse tensors that are not those of the attached adapter, by key, shape and dtype.

    unknown: beginnings of keys that may have another shape.
    """
    needed = stored_tensors(model, name)
    free = (*_packed(model, name), *unknown)
    for key in [*needed, *(key for key in tensors if key not in needed)]:
        if key not in tensors or key not in needed:
            raise AdapterError(
                f"the adapter in {directory} does not fit its own spec: {key} is "
                f"{'missing' if key in needed else 'one too many'} in the file"
            )
        mine, given = needed[key], tensors[key]
        if mine.shape != given.shape and not key.startswith(free):
            said = f"{key} has shape {tuple(given.shape)} in {directory}, this model needs {tuple(mine.shape)}"
            head = key.partition(".adapters.")[0] in label_layers(model) and key.endswith(".own_weight")
            other = ": heads for other numbers of labels; load_adapter attaches one in the file's size" if head else ""
            raise AdapterError(f"{said}{other}")
        floating = mine.is_floating_point() and given.is_floating_point()
        wider = floating and torch.promote_types(mine.dtype, given.dtype) == mine.dtype
        if mine.dtype != given.dtype and not wider:
            raise AdapterError(
                f"{key} is {given.dtype} in {directory}, this model needs {mine.dtype}, which cannot "
                "hold the same numbers"
            )


@torch.no_grad()
def fill(model: nn.Module, name: str, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Put the tensors of a file into an adapter. Raises AdapterError when they do not fit, perhaps half way."""
    check_fits(model, name, tensors, directory)
    packed = _packed(model, name)
    for prefix, module in packed.items():
        # cloned here, where torch.inference_mode is off: what was read inside it could never take part in training
        content = {key.removeprefix(prefix): value.clone() for key, value in tensors.items() if key.startswith(prefix)}
        try:
            module.unpack(content)
        except Exception as error:  # whatever the module finds wrong with content of any origin
            raise AdapterError(f"what {directory} holds for {prefix}* does not fit this model: {error}") from error
    for key, value in stored_tensors(model, name).items():
        if not key.startswith(tuple(packed)):
            value.copy_(tensors[key])


def _packed(model: nn.Module, name: str) -> dict[str, Packed]:
    """The modules that a file holds packed, experts of a mixture too, by the beginning of their keys there."""
    packed: dict[str, Packed] = {}
    for path, site in sites(model):
        for method, module in site.of(name).items() if name in site.adapters else ():
            packed |= _packing(f"{path}.adapters.{method}.", module)
    return packed


def _packing(start: str, module: nn.Module) -> dict[str, Packed]:
    """The module itself where it packs, else what packs inside it."""
    if isinstance(module, Packed) and module.packed() is not None:
        return {start: module}
    packed: dict[str, Packed] = {}
    for key, part in module.named_children():
        packed |= _packing(f"{start}{key}.", part)
    return packed
