"""Tensors in safetensors files, one or several beside an index: written file by file, read block by block.

Names are those of the Hugging Face ecosystem: `model.safetensors`, or `model-00001-of-00003.safetensors` and so on with
`model.safetensors.index.json`, which says {"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from effzoo.errors import FileError, shown
from effzoo.sharding import is_split, rows_here
from effzoo.writing import Content, explained, replace_files

LIMIT = 5_000_000_000  # bytes of a file, unless one tensor alone is larger
_BLOCK = 2**20  # bytes that are read at a time
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its numbers are read when asked for, and need no memory before.

    kind: the file's name of its dtype.
    start: its first byte in the file, which `opened` reads.
    """

    name: str
    file: Path
    shape: torch.Size
    kind: str
    start: int
    opened: BinaryIO

    def read(self) -> Tensor:
        """All of it."""
        return self._rows(self.shape, 0)

    def rows(self, first: int, end: int) -> Tensor:
        """Its rows from the first to the one before the end."""
        return self._rows(torch.Size((end - first, *self.shape[1:])), first * self.shape[1:].numel())

    def blocks(self, first: int = 0, end: int | None = None) -> Iterator[tuple[Any, Tensor]]:
        """Rows in order, `(index, rows)` with `tensor[first:end][index]` equal to them, at most 1 MiB each."""
        if not self.shape or not self.shape.numel():
            yield ..., self.read()
            return
        end = self.shape[0] if end is None else end
        step = max(1, _BLOCK // (self.shape[1:].numel() * DTYPES[self.kind].itemsize))
        for start in range(first, end, step):
            stop = min(start + step, end)
            yield slice(start - first, stop - first), self.rows(start, stop)

    def _rows(self, shape: torch.Size, first: int) -> Tensor:
        """So many entries from the `first` on, in this shape. What is mapped would count as memory, so it is read."""
        rows = torch.empty(shape, dtype=DTYPES[self.kind], device="cpu")
        content: Any = rows.flatten().view(torch.uint8).numpy() if rows.numel() else bytearray()
        try:
            self.opened.seek(self.start + first * rows.element_size())
            got = self.opened.readinto(content)  # type: ignore[attr-defined]
        except OSError as error:
            raise FileError(f"{self.file}: {self.name} cannot be read ({error})") from error
        if got != rows.nbytes:
            raise FileError(f"{self.file} ends inside of {self.name}; save the model again")
        return rows


def is_coded(tensor: Tensor) -> bool:
    """Whether a tensor is made of others, such as codes and scales (torchao), and is no part of a split one."""
    return hasattr(tensor, "__tensor_flatten__") and not is_split(tensor)


def uncoded(tensor: Tensor) -> Tensor:
    """The numbers that a tensor of codes stands for; any other tensor is itself."""
    return tensor.dequantize() if is_coded(tensor) else tensor


def names_of(name: str = "model") -> tuple[str, str]:
    """The file of a model in one file, and the index of one in several."""
    return f"{name}.safetensors", f"{name}.safetensors.index.json"


def save_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    name: str = "model",
    *,
    limit: int = LIMIT,
    gathered: Callable[[Tensor], Tensor] = torch.Tensor.detach,
) -> Path:
    """Write named tensors whole or not at all, and return the path: the one file, or the index of several.

    limit: bytes of a file; what is larger than it goes into several, each as full as the order allows.
    gathered: makes the tensor that is written of the one given, which says its shape and dtype (a DTensor's full
        tensor). It is called when the tensor's file is written, so no more than one file's tensors exist twice.

    Of several files the index comes last, and an older one goes first: a reader finds all of them or no model.

    Raises FileError.
    """
    whole, index = names_of(name)
    parts = _parts(tensors, limit)
    if len(parts) == 1:
        files = [whole]
    else:
        files = [f"{name}-{number:05}-of-{len(parts):05}.safetensors" for number in range(1, len(parts) + 1)]
    contents: dict[str, Content] = {
        file: partial(_write, part, gathered) for file, part in zip(files, parts, strict=True)
    }
    if len(parts) > 1:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        where = {key: file for file, part in zip(files, parts, strict=True) for key in part}
        contents[index] = json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2).encode()

    def remove_older() -> None:
        for path in (folder / whole, folder / index, *folder.glob(f"{name}-*-of-*.safetensors")):
            if path.name not in contents:
                path.unlink(missing_ok=True)

    replace_files(folder, contents, absent=() if len(parts) == 1 else (index, whole), afterwards=remove_older)
    return folder / (whole if len(parts) == 1 else index)


def stored_tensors(folder: Path, name: str = "model") -> dict[str, StoredTensor]:
    """The tensors of a folder by name; of one file, where there is one, else of those that the index names.

    Raises FileError for files that are missing or damaged, and names a tensor that should be there.
    """
    whole, index = names_of(name)
    if (folder / whole).is_file() or not (folder / index).is_file():
        return _tensors_of(folder / whole, [])
    where = read_index(folder / index)
    found: dict[str, StoredTensor] = {}
    for file in sorted(set(where.values())):
        wanted = [key for key, named in where.items() if named == file]
        if not (folder / file).is_file():
            raise FileError(
                f"{folder} has no {file}, which holds {len(wanted)} tensors ({wanted[0]}, ...) as {index} says"
            )
        tensors = _tensors_of(folder / file, wanted)
        if lost := [key for key in wanted if key not in tensors]:
            raise FileError(f"{folder / file} lacks {lost[0]}, which it holds as {index} says")
        found |= {key: tensor for key, tensor in tensors.items() if where.get(key, file) == file}
    return found


def read_index(path: Path) -> dict[str, str]:
    """{tensor: file} of an index; FileError where it is none, or names files outside of its folder."""
    try:
        where = dict(json.loads(path.read_text())["weight_map"])
        wrong = [
            name for name in where.values() if not isinstance(name, str) or Path(name).name != name or "\\" in name
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{path} is no index of shards ({type(error).__name__}); save the model again") from error
    if wrong:
        raise FileError(f"{path} leads out of its folder, to {shown(wrong[0])}; shards lie beside their index")
    return where


@torch.no_grad()
def load_tensors(tensors: Mapping[str, Tensor], folder: Path, name: str = "model") -> None:
    """Read what `save_tensors` wrote into the tensors of the same names, in place, each in its own dtype.

    Of a tensor that is split over processes, each reads its rows.

    Raises FileError for another name or shape, and then nothing is changed, and for files that are damaged.
    """
    stored = stored_tensors(folder, name)
    for key, tensor in tensors.items():
        if key not in stored:
            raise FileError(f"{key} is missing")
        if stored[key].shape != tensor.shape:
            raise FileError(f"{key} has shape {tuple(stored[key].shape)} in the file and {tuple(tensor.shape)} here")
        if stored[key].kind not in DTYPES:
            raise FileError(f"{key} has the dtype {stored[key].kind} in the file; it can be one of {', '.join(DTYPES)}")
    if unexpected := [key for key in stored if key not in tensors]:
        raise FileError(f"{unexpected[0]} is one too many")
    for key, tensor in tensors.items():
        here, first = rows_here(tensor.detach())
        for index, rows in stored[key].blocks(first, first + len(here) if is_split(tensor) else None):
            here[index].copy_(rows)


def _parts(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """The tensors in their order, in parts of at most `limit` bytes or of one tensor."""
    parts: list[dict[str, Tensor]] = [{}]
    taken = 0
    for key, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if parts[-1] and taken + size > limit:
            parts.append({})
            taken = 0
        parts[-1][key] = tensor
        taken += size
    return parts


def _write(part: Mapping[str, Tensor], gathered: Callable[[Tensor], Tensor], path: Path) -> None:
    """One file; tensors on a CPU that are contiguous and share nothing are written from where they are."""
    dense, seen = {}, set[int]()
    for key, tensor in part.items():
        here = gathered(tensor).detach().cpu().contiguous()
        if (at := here.untyped_storage().data_ptr()) in seen:
            here = here.clone()
        seen.add(at)
        dense[key] = here
    with explained(path):
        try:
            safetensors.torch.save_file(dense, path, {"format": "pt"})
        except safetensors.SafetensorError as error:
            raise FileError(f"cannot write {path}: {error}") from error


def _tensors_of(file: Path, wanted: list[str]) -> dict[str, StoredTensor]:
    """The tensors of one file. wanted: those that it should hold, for the message."""
    try:
        with safetensors.safe_open(file, "pt"):  # refuses what is no such file, or not all of it
            opened = file.open("rb")
        start = 8 + int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(start - 8))
    except (OSError, safetensors.SafetensorError) as error:
        holds = f" It should hold {wanted[0]} and {len(wanted) - 1} others." if wanted else ""
        raise FileError(f"{file} is missing or damaged ({error}).{holds}") from error
    header.pop("__metadata__", None)
    return {
        key: StoredTensor(
            key, file, torch.Size(entry["shape"]), entry["dtype"], start + entry["data_offsets"][0], opened
        )
        for key, entry in header.items()
    }
