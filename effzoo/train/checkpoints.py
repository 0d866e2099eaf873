"""Checkpoints on disk: whole at every moment, without pickle.

A checkpoint is a directory `checkpoint-<step>`. It is written as `.partial-<step>-...`, forced to disk, and renamed;
one that is removed is renamed first. So whatever is killed when, a directory under its real name is complete.

It holds the active adapters (or, without any, `model.safetensors`), and the state of the run as `state.json` with its
tensors in `state.safetensors`. `sums.json` holds the hash of every file: later damage is seen before anything is read.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from effzoo.errors import FileError, TrainingError
from effzoo.peft.attach import acting
from effzoo.peft.files import save_adapter, swap_weights
from effzoo.sharding import is_split, split_like, writes
from effzoo.sharding import whole as whole_tensor
from effzoo.tensors import StoredTensor, load_tensors, names_of, save_tensors, stored_tensors
from effzoo.writing import explained, force_to_disk

WEIGHTS = "model.safetensors"
ADAPTER = "adapter"
RUN = "run.json"
HISTORY = "history.json"
SUMS = "sums.json"
_PREFIX, _PARTIAL, _REMOVED = "checkpoint-", ".partial-", ".removed-"


def whole(directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in directory.glob(f"{_PREFIX}*") if re.fullmatch(rf"{_PREFIX}\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def named(directory: Path, step: int) -> Path:
    """The checkpoint that is written after a step."""
    return directory / f"{_PREFIX}{step}"


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def clean(directory: Path, *, earlier: bool) -> None:
    """Remove what a killed run left half written or half removed; earlier: and the checkpoints of an earlier run."""
    for prefix in (_PARTIAL, _REMOVED):
        for path in directory.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)
    for path in whole(directory) if earlier else ():
        remove(path)


@contextmanager
def writing(directory: Path, step: int) -> Iterator[Path]:
    """A directory to write a checkpoint in; it gets its real name when the `with` block ends without an error."""
    final = named(directory, step)
    with explained(final):
        directory.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{_PARTIAL}{step}-", dir=directory))
        try:
            yield partial
            _write_sums(partial, step)
            for path in [*partial.rglob("*"), partial]:
                force_to_disk(path)
            if final.exists():
                remove(final)
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        force_to_disk(directory)


def check_whole(checkpoint: Path) -> None:
    """Raise TrainingError for a checkpoint with a file that is not as written: which, and where else to go on."""
    earlier = [path.name for path in whole(checkpoint.parent) if step_of(path) < step_of(checkpoint)]
    instead = "there is no earlier one; Saving(overwrite=True) with resume=False begins anew"
    if earlier:
        instead = f"remove it to resume from {earlier[-1]}"
    try:
        content = json.loads((checkpoint / SUMS).read_text())
        sums = dict(content["files"])
        if content["sum"] != _sum_of(content["step"], sums) or content["step"] != step_of(checkpoint):
            raise ValueError("it does not belong to these files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        missing = isinstance(error, FileNotFoundError)
        problem = "is missing" if missing else f"is damaged ({type(error).__name__}: {error!s:.80})"
        raise TrainingError(f"{checkpoint} is not a whole checkpoint: {SUMS} {problem}; {instead}") from None
    for name, expected in sums.items():
        file = checkpoint / name
        if not file.is_file() or _hash_of(file) != expected:
            problem = "has changed since it was written" if file.is_file() else "is missing"
            raise TrainingError(f"{checkpoint} is not a whole checkpoint: {name} {problem}; {instead}")


def _write_sums(folder: Path, step: int) -> None:
    sums = {path.relative_to(folder).as_posix(): _hash_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / SUMS).write_text(json.dumps({"step": step, "files": sums, "sum": _sum_of(step, sums)}, indent=1))


def _sum_of(step: int, sums: dict[str, str]) -> str:
    """The hash of the hashes, because the file that holds them may be damaged as well."""
    return hashlib.sha256(json.dumps([step, sums], sort_keys=True).encode()).hexdigest()


def _hash_of(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; its name is gone before its first file."""
    doomed = Path(tempfile.mkdtemp(prefix=f"{_REMOVED}{checkpoint.name}-", dir=checkpoint.parent))
    checkpoint.rename(doomed)  # onto the empty folder
    shutil.rmtree(doomed, ignore_errors=True)


def rotate(directory: Path, keep: int | None, best: Path | None) -> None:
    """Keep the newest `keep` checkpoints (None: all) and the best one."""
    for path in whole(directory)[: -keep if keep else 0]:
        if path != best:
            remove(path)


def adapters(model: nn.Module, directory: Path) -> dict[str, Path]:
    """The folder of each active adapter."""
    names = acting(model)
    return {name: directory / ADAPTER / (name if len(names) > 1 else "") for name in names}


def save_weights(model: nn.Module, directory: Path) -> Path:
    """Write what training changes, and return the path: the active adapters, or else the whole model.

    One adapter is the folder `adapter`, several are folders in it. A whole model is `model.safetensors`, or several
    files and their index (`effzoo/tensors.py`). Shared tensors are written once per name.
    """
    folders = adapters(model, directory)
    for name, folder in folders.items():
        save_adapter(model, folder, name=name)
    if folders:
        return directory / ADAPTER
    tensors = model.state_dict()
    if writes(model):
        return save_tensors(directory, tensors, gathered=whole_tensor)
    for tensor in tensors.values():
        whole_tensor(tensor)
    return directory / WEIGHTS


def weights_in(model: nn.Module, directory: Path) -> Path:
    """Where `save_weights` wrote: the folder of adapters, the file of a whole model, or the index of several files."""
    if acting(model):
        return directory / ADAPTER
    one, index = names_of()
    return directory / (one if (directory / one).is_file() else index)


def load_weights(model: nn.Module, directory: Path) -> None:
    """Read what `save_weights` wrote into the model, whose adapters stay the same modules.

    Raises AdapterError for an adapter with another spec or base, TrainingError for full weights that do not fit.
    """
    folders = adapters(model, directory)
    for name, folder in folders.items():
        swap_weights(model, folder, name=name)
    if folders:
        return
    try:
        load_tensors(model.state_dict(), directory)
    except FileError as error:
        raise TrainingError(f"{directory / WEIGHTS} does not fit this model: {error}") from error


def write_state(directory: Path, state: Any, *, first: bool = True) -> None:
    """Write a nest of dicts, lists, tuples, numbers, strings and tensors.

    first: whether this process writes; another one only gives its rows of tensors that are split.
    """
    tensors: dict[str, Tensor] = {}
    content = json.dumps(_pack(state, tensors))
    if not first:
        for tensor in tensors.values():
            whole_tensor(tensor)
        return
    save_tensors(directory, tensors, "state", gathered=whole_tensor)
    (directory / "state.json").write_text(content)


def read_state(directory: Path, parameters: Sequence[Tensor] = ()) -> Any:
    """What `write_state` wrote.

    parameters: those of the optimizer, in its order; its tensors are split as they are.

    Raises TrainingError when the files are not there or not whole.
    """
    try:
        content = json.loads((directory / "state.json").read_text())
        state = _unpack(content, stored_tensors(directory, "state"))
        if "optimizer" in state:
            of_parameters = state["optimizer"]["state"]
            for number, kept in of_parameters.items():
                like = parameters[number] if number < len(parameters) else None
                of_parameters[number] = {name: _read(value, like) for name, value in kept.items()}
        return _read(state)
    except (OSError, ValueError, LookupError, FileError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise TrainingError(
            f"{directory} is not a whole checkpoint ({problem}); remove it to resume from an earlier one"
        ) from None


def _read(value: Any, like: Tensor | None = None) -> Any:
    """A nest with its tensors read; like: a parameter, as which those of its shape are split."""
    if isinstance(value, StoredTensor):
        if like is None or not is_split(like) or value.shape != like.shape:
            return value.read()
        return split_like(value.rows, like)
    if isinstance(value, dict):
        return {key: _read(entry, like) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_read(entry, like) for entry in value)
    return value


def read_history(checkpoint: Path) -> dict[str, Any]:
    """The history of a run up to a checkpoint, and what its callbacks keep."""
    try:
        return dict(json.loads((checkpoint / HISTORY).read_text()))
    except FileNotFoundError:
        raise TrainingError(
            f"{checkpoint} has no {HISTORY}: an earlier version of effzoo wrote it, which goes on with it; "
            "Saving(overwrite=True) with resume=False begins anew"
        ) from None


def _coded(kind: str, parts: Mapping[str, StoredTensor], context: Any, shape: list[int], stride: Any) -> Tensor:
    """A tensor of a class of torchao, from its parts."""
    module, _, name = kind.partition(":")
    if module.partition(".")[0] != "torchao":
        raise ValueError(f"a state is of class {kind:.80}, which is none of torchao")
    made: Any = getattr(importlib.import_module(module), name)
    read = {key: part.read() for key, part in parts.items()}
    return cast(Tensor, made.__tensor_unflatten__(read, context, torch.Size(shape), stride))


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A nest as JSON, which has no tuples, no numbers as keys and no tensors: each container is {kind: content}."""
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__") and not is_split(value):
        names, context = value.__tensor_flatten__()  # a class of torchao that holds codes and scales
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        parts = {name: getattr(value, name) for name in names}
        return {"coded": [_pack(part, tensors) for part in (kind, parts, context, list(value.shape), value.stride())]}
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach()
        return {"tensor": key}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(entry, tensors)] for key, entry in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [_pack(entry, tensors) for entry in value]}
    return value


def _unpack(value: Any, tensors: Mapping[str, StoredTensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "dict":
        return {key: _unpack(entry, tensors) for key, entry in content}
    entries = [_unpack(entry, tensors) for entry in content]
    if kind == "coded":
        return _coded(*entries)
    return tuple(entries) if kind == "tuple" else entries
