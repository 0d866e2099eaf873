"""Checkpoints on disk: whole at every moment, without pickle.

A checkpoint is a directory `checkpoint-<step>`. It is written as `.partial-<step>-...`, forced to disk, and renamed;
one that is removed is renamed first. So whatever is killed when, a directory under its real name is complete.

It holds the active adapters (or, without any, `model.safetensors`), and the state of the run as `state.json` with its
tensors in `state.safetensors`. `sums.json` holds the hash of every file: later damage is seen before anything is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from effzoo.errors import FileError, TrainingError
from effzoo.peft.attach import acting
from effzoo.peft.files import save_adapter, swap_weights
from effzoo.writing import explained, force_to_disk, replace_file

WEIGHTS = "model.safetensors"
ADAPTER = "adapter"
RUN = "run.json"
SUMS = "sums.json"
_PREFIX, _PARTIAL, _REMOVED = "checkpoint-", ".partial-", ".removed-"


def whole(directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    named = [path for path in directory.glob(f"{_PREFIX}*") if re.fullmatch(rf"{_PREFIX}\d+", path.name)]
    return sorted((path for path in named if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def clean(directory: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for prefix in (_PARTIAL, _REMOVED):
        for path in directory.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def writing(directory: Path, step: int) -> Iterator[Path]:
    """A directory to write a checkpoint in; it gets its real name when the `with` block ends without an error."""
    final = directory / f"{_PREFIX}{step}"
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


def best_of(directory: Path, history: Sequence[dict[str, Any]], metric: str, since: int = 0) -> Path | None:
    """The checkpoint on disk with the best value of `eval_<metric>`, the earlier one of equals.

    Losses, errors and perplexities are best when low.

    history: entries with a step and metrics.
    since: the first step that counts.
    """
    sign = 1 if any(word in metric for word in ("loss", "error", "perplexity")) else -1
    values = {entry["step"]: entry.get(f"eval_{metric}", math.nan) for entry in history if entry["step"] >= since}
    # a metric may be undefined, as a correlation of equals
    values = {step: value for step, value in values.items() if not math.isnan(value)}
    known = [path for path in whole(directory) if step_of(path) in values]
    return min(known, key=lambda path: sign * values[step_of(path)], default=None)


def adapters(model: nn.Module, directory: Path) -> dict[str, Path]:
    """The folder of each active adapter."""
    names = acting(model)
    return {name: directory / ADAPTER / (name if len(names) > 1 else "") for name in names}


def save_weights(model: nn.Module, directory: Path) -> Path:
    """Write what training changes, and return the path: the active adapters, or else `model.safetensors`.

    One adapter is the folder `adapter`, several are folders in it. Shared tensors are written once per name.
    """
    folders = adapters(model, directory)
    for name, folder in folders.items():
        save_adapter(model, folder, name=name)
    if folders:
        return directory / ADAPTER
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    replace_file(directory / WEIGHTS, lambda path: _save_tensors(tensors, path))
    return directory / WEIGHTS


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
        missing, unexpected = model.load_state_dict(safetensors.torch.load_file(directory / WEIGHTS), strict=False)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise TrainingError(f"{directory / WEIGHTS} does not fit this model: {error}") from None
    if missing or unexpected:
        problem = f"{missing[0]} is missing" if missing else f"{unexpected[0]} is one too many"
        raise TrainingError(f"{directory / WEIGHTS} does not fit this model: {problem}")


def write_state(directory: Path, state: Any) -> None:
    """Write a nest of dicts, lists, tuples, numbers, strings and tensors."""
    tensors: dict[str, Tensor] = {}
    content = json.dumps(_pack(state, tensors))
    _save_tensors(tensors, directory / "state.safetensors")
    (directory / "state.json").write_text(content)


def read_state(directory: Path) -> Any:
    """What `write_state` wrote; TrainingError when the files are not there or not whole."""
    try:
        return _unpack(
            json.loads((directory / "state.json").read_text()),
            safetensors.torch.load_file(directory / "state.safetensors"),
        )
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise TrainingError(
            f"{directory} is not a whole checkpoint ({problem}); remove it to resume from an earlier one"
        ) from None


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A nest as JSON, which has no tuples, no numbers as keys and no tensors: each container is {kind: content}."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(entry, tensors)] for key, entry in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [_pack(entry, tensors) for entry in value]}
    return value


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(entry, tensors) for key, entry in content}
    entries = [_unpack(entry, tensors) for entry in content]
    return tuple(entries) if kind == "tuple" else entries


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        safetensors.torch.save_file(tensors, path)
    except safetensors.SafetensorError as error:
        raise FileError(f"cannot write {path}: {error}") from error
