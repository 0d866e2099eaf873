"""A folder or hub id as a model of transformers, whose numbers stay in the files until they are wanted.

Where safetensors files hold every tensor of the model under its name, the model is made on the device meta: it says
names, shapes and what is tied, and takes no memory. Pickled files, names of older versions, heads that are missing and
whatever else transformers translates are loaded by it, whole.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effzoo.convert.dtypes import NAMES, hold_in
from effzoo.convert.genuine import tensors_of
from effzoo.errors import ConversionError, FileError
from effzoo.tensors import StoredTensor, names_of, read_index, stored_tensors

_HALF = (torch.float16, torch.bfloat16)
# fields of a configuration by which transformers does more than to read the files
_MORE = ("quantization_config", "fusion_config", "transformers_weights")


@dataclass(frozen=True)
class Pretrained:
    """A model of transformers, the keys that no file gave, and where the numbers are, by key, if the model has none.

    dtypes: those that the numbers are wanted in, by key.
    """

    model: Any
    missing: frozenset[str] = frozenset()
    stored: Mapping[str, StoredTensor] = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    def tensors(self, label: str) -> dict[str, Tensor]:
        """Every tensor by its key, on the device meta if the numbers are in files; ConversionError as `tensors_of`."""
        if not self.stored:
            return tensors_of(label, self.model, self.missing)
        named = (
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        )
        made: dict[int, Tensor] = {}
        tensors: dict[str, Tensor] = {}
        for key, stored in ((key, self.stored[key]) for key, _ in named if key in self.stored):
            made.setdefault(id(stored), torch.empty(stored.shape, dtype=self.dtypes[key], device="meta"))
            tensors[key] = made[id(stored)]
        return tensors

    def part(self, path: str) -> Pretrained:
        """The same of the submodule at this path."""
        start = f"{path}." if path else ""
        keys = {key: key.removeprefix(start) for key in self.stored if key.startswith(start)}
        return Pretrained(
            self.model.get_submodule(path),
            frozenset(key.removeprefix(start) for key in self.missing),
            {inside: self.stored[key] for key, inside in keys.items()},
            {inside: self.dtypes[key] for key, inside in keys.items()},
        )


def open_pretrained(
    cls: Any, label: str, config: Any, make: Callable[[Any], Any] | None = None, **more: Any
) -> Pretrained:
    """The model of this class in the weights of a folder or hub id.

    config: its configuration, of which `make` (by default the class) makes a model without weights.
    more: arguments of `from_pretrained`.

    Raises FileError for files that are missing or damaged, and what transformers raises.
    """
    return _unread(label, config, make or cls) or _loaded(cls, label, **more)


def rows_of(
    label: str, key: str, like: Tensor, stored: StoredTensor | None, first: int = 0, end: int | None = None
) -> Iterator[tuple[Any, Tensor]]:
    """The numbers of a tensor in blocks, `(index, rows)`; of a file in the dtype of `like`, else `like` itself.

    first, end: the rows that are wanted of a file, counted from the first of them.

    Raises ConversionError for NaN and infinity in a file, and for one that is damaged.
    """
    if stored is None:
        yield ..., like
        return
    try:
        for index, rows in stored.blocks(first, end):
            rows = rows.to(like.dtype)
            if rows.numel() and not all(bound.isfinite() for bound in rows.aminmax()):  # needs no memory of its own
                wrong = sum(int((~block.to(like.dtype).isfinite()).sum()) for _, block in stored.blocks())
                raise ConversionError(f"{label} has NaN or infinity in {key} ({wrong} of {like.numel()} entries)")
            yield index, rows
    except FileError as error:
        raise ConversionError(f"{label} could not be loaded: {error}") from error


def read(label: str, key: str, like: Tensor, stored: StoredTensor | None) -> Tensor:
    """All numbers of a tensor, as `rows_of` gives them."""
    blocks = [rows for _, rows in rows_of(label, key, like, stored)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _unread(label: str, config: Any, make: Callable[[Any], Any]) -> Pretrained | None:
    """The model on the device meta, if every tensor of it is in a file; else None."""
    folder = None if _fetched(label, "adapter_config.json") else _folder(label)
    if folder is None or any(getattr(config, name, None) is not None for name in _MORE):
        return None
    if getattr(type(config), "extra_files", ()) or next(folder.glob("shard-*.safetensors"), None):
        return None
    found = stored_tensors(folder)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = make(copy.deepcopy(config))
    stored = _by_key(model, found)
    wanted = model.state_dict()
    if wanted.keys() - stored.keys() or any(
        stored[key].shape != tensor.shape or stored[key].kind not in NAMES for key, tensor in wanted.items()
    ):
        return None
    kinds = {NAMES[tensor.kind] for tensor in found.values() if tensor.kind in NAMES}
    one: Any = getattr(config, "dtype", None)
    one = getattr(torch, one) if isinstance(one, str) else one
    if one in _HALF and (model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict):
        return None
    own = one is None or len(kinds) > 1  # transformers has one dtype for all
    _read_generation(model, label)
    dtypes = {key: NAMES[tensor.kind] if own else one for key, tensor in stored.items()}
    return Pretrained(model.eval(), stored=stored, dtypes=dtypes)


def _by_key(model: Any, found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """{key of the model: tensor of a file}, with or without the prefix of the body, as transformers matches them.

    Keys that are one tensor in the model are one here; those whose numbers differ in the files are left out.
    """
    wanted, prefix = model.state_dict(), f"{model.base_model_prefix}."
    stored: dict[str, StoredTensor] = {}
    for name, tensor in found.items():
        inside, outside = name.removeprefix(prefix), prefix + name
        key = inside if inside != name and inside in wanted else outside if outside in wanted else name
        if key in wanted:
            stored[key] = tensor
    same: dict[int, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        same.setdefault(id(parameter), []).append(key)
    for keys in same.values():
        given = [stored.pop(key) for key in keys if key in stored]
        if given and all(_equal(given[0], other) for other in given[1:]):
            stored |= dict.fromkeys(keys, given[0])
    return stored


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.shape, one.kind) != (other.shape, other.kind):
        return False
    return all(rows.equal(others) for (_, rows), (_, others) in zip(one.blocks(), other.blocks(), strict=True))


def _folder(label: str) -> Path | None:
    """The folder that holds the safetensors files, which are fetched of a hub id; None without any."""
    whole, index = names_of()
    if (file := _fetched(label, whole)) is not None:
        return file.parent
    if (file := _fetched(label, index)) is None:
        return None
    shards = set(read_index(file).values())
    missing = not os.path.isdir(label) and any(_fetched(label, shard) is None for shard in shards)
    return None if missing else file.parent


def _fetched(label: str, name: str) -> Path | None:
    """A file of a local folder or a hub id, if there is one."""
    if os.path.isdir(label):
        path = Path(label) / name
        return path if path.is_file() else None
    from transformers.utils.hub import cached_file

    failures = ("missing_entries", "connection_errors", "gated_repo")
    found = cached_file(label, name, **{f"_raise_exceptions_for_{failure}": False for failure in failures})
    return None if found is None else Path(found)


def _read_generation(model: Any, label: str) -> None:
    """The settings of generation, of their file or else of the configuration's, as transformers reads them."""
    from transformers import GenerationConfig

    if not model.can_generate():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(label)
    except OSError:
        more: dict[str, Any] = {"config_file_name": "config.json", "_from_model_config": True}
        model.generation_config = GenerationConfig.from_pretrained(label, **more)


def _loaded(cls: Any, label: str, **more: Any) -> Pretrained:
    """What transformers loads, every tensor in the dtype that the files hold it in.

    It loads in one dtype. Where files hold several, that is the widest of them, which changes no number, and each
    tensor then goes back to its own.
    """
    model, info = cls.from_pretrained(label, output_loading_info=True, **more)
    folder = _folder(label)
    dtypes = {key: NAMES[t.kind] for key, t in stored_tensors(folder).items() if t.kind in NAMES} if folder else {}
    if len(set(dtypes.values())) > 1:
        widest = functools.reduce(torch.promote_types, dtypes.values())
        model, info = cls.from_pretrained(label, output_loading_info=True, dtype=widest, **more)
        prefix = f"{model.base_model_prefix}."
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            for name in (key, key.removeprefix(prefix), prefix + key):  # with a head, without it
                if name in dtypes:
                    hold_in(tensor, dtypes[name])
                    break
    return Pretrained(model, frozenset(info["missing_keys"]))
