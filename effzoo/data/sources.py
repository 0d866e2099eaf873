"""What a source is made of: a file, a folder with train, dev and test, a folder per label, or a data set on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effzoo.data.files import FORMATS, Reading, decoded, first_line, read, suffix_of
from effzoo.errors import DataError, EffzooError, did_you_mean, listing

if TYPE_CHECKING:
    from datasets import Dataset

NAMES = {  # what a part may be called, in the names of files and of parts
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "devel", "development", "eval"),
    "test": ("test", "testing"),
}
_OF_DATASETS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}$")


def opened(source: str | Path, subset: str | None, reading: Reading) -> dict[str, Callable[[], Any]]:
    """The parts of a source by name, each read when it is called. Raises DataError."""
    path = Path(source)
    if not os.path.exists(path):
        if suffix_of(path) in FORMATS or path.is_absolute() or str(source).startswith("."):
            raise DataError(f"no such file or folder: {path}")
        return _of_hub(str(source), subset)
    if path.is_file():
        if subset is not None:
            raise DataError(f"{path} is a file, and subset={subset!r} is of a data set with several")
        return {"train": partial(read, path, reading)}
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _of_disk(path, subset)
    if subset is not None or _has_subsets(path):
        return _of_hub(str(path), subset)
    return _of_folder(path, reading)


def canonical(name: str) -> str:
    """train, validation or test for one of their other names; else the name itself."""
    return next((part for part, known in NAMES.items() if name.lower() in known), name)


def chosen(parts: Mapping[str, Callable[[], Any]], wanted: str | None, source: str | Path) -> Any:
    """The table of one part: the wanted one, or the one to train on. Raises DataError."""
    if wanted is None and len(parts) > 1 and "train" not in parts:
        raise DataError(f"{source} has the parts {listing(parts)}; choose one with part=")
    name = wanted or ("train" if "train" in parts else next(iter(parts)))
    name = name if name in parts else canonical(name)
    if name not in parts:
        raise DataError(f"{source} has no part {name!r}{did_you_mean(name, parts)} Parts: {listing(parts)}.")
    table = parts[name]()
    if len(table) == 0:
        raise DataError(f"{source} is empty")
    return table


def _of_folder(path: Path, reading: Reading) -> dict[str, Callable[[], Any]]:
    inner = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    parts = {canonical(folder.name): folder for folder in inner if canonical(folder.name) in NAMES}
    if parts and all(_labels(folder) or _files(folder, reading) for folder in parts.values()):
        return {name: partial(_whole_folder, folder, reading) for name, folder in parts.items()}
    if _labels(path):
        return {"train": partial(_by_label, path, reading)}
    files = _files(path, reading)
    kinds = sorted({suffix_of(file) for file in files})
    if not files:
        raise DataError(f"{path} has no files that can be read; give {listing(FORMATS)}, or a folder of them")
    if len(files) == 1:
        return {"train": partial(read, files[0], reading)}
    by_part = _by_part(files)
    if len(kinds) > 1 and set(by_part) - set(NAMES):
        raise DataError(
            f"{path} has files of several kinds ({listing(kinds)}), and the names of some are not train, validation "
            f"or test ({listing(sorted(set(by_part) - set(NAMES)))}); give one of the files, or a folder of one kind"
        )
    return {name: partial(_joined, found, reading) for name, found in by_part.items()}


def _files(path: Path, reading: Reading) -> list[Path]:
    return sorted(
        file for file in path.iterdir()
        if file.is_file() and file.name not in _OF_DATASETS and not file.name.startswith(".")
        and reading.format_of(file) and (reading.format is None or suffix_of(file) in FORMATS)
    )  # fmt: skip


def _by_part(files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of each part: `dev.tsv`, `news_dev.tsv`, or `dev-00000-of-00002.parquet` and those after it."""
    found: dict[str, list[Path]] = {}
    for file in files:
        stem = file.name.removesuffix(".gz").removesuffix(Path(file.name.removesuffix(".gz")).suffix)
        shard = _SHARD.match(stem)
        found.setdefault(shard[1] if shard else stem, []).append(file)
    whole = {stem: canonical(stem) for stem in found}
    for stem in found:  # a piece of the name says the part, where no other file says the same
        pieces = {canonical(piece) for piece in re.split(r"[._\-]", stem)} & set(NAMES)
        if whole[stem] not in NAMES and len(pieces) == 1:
            whole[stem] = f"?{pieces.pop()}"
    names = list(whole.values())
    parts = {}
    for stem, name in whole.items():
        loose = name.removeprefix("?")
        alone = names.count(name) == 1 and not (name != loose and loose in names)
        parts[loose if alone else stem] = found[stem]
    return parts


def _joined(files: Sequence[Path], reading: Reading) -> Any:
    from datasets import concatenate_datasets

    tables = [read(file, reading) for file in files]
    if len({tuple(table.column_names) for table in tables}) > 1:
        raise DataError(f"{listing(files)} have different columns; give one of them")
    return tables[0] if len(tables) == 1 else concatenate_datasets(tables)


def _whole_folder(path: Path, reading: Reading) -> Any:
    return _by_label(path, reading) if _labels(path) else _joined(_files(path, reading), reading)


def _labels(path: Path) -> list[Path]:
    """The folders of texts that are named by their label."""
    return sorted(inner for inner in path.iterdir() if inner.is_dir() and _texts(inner))


def _texts(folder: Path) -> list[Path]:
    return [file for file in folder.glob("*.txt") if file.is_file()]


def _by_label(path: Path, reading: Reading) -> Dataset:
    """One row per .txt file, in the order of the names; the folder's name is the label."""
    from datasets import Dataset

    files = sorted(file for inner in _labels(path) for file in _texts(inner))
    return Dataset.from_dict(
        {"text": [decoded(file, reading.encodings) for file in files], "label": [file.parent.name for file in files]}
    )


def _has_subsets(path: Path) -> bool:
    """Whether the card of a folder says which files belong to which subset and part."""
    card = path / "README.md"
    try:
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
    except (OSError, ValueError):
        return False
    return text.startswith("---") and "\nconfigs:" in text.split("\n---", 1)[0]


def _of_disk(path: Path, subset: str | None) -> dict[str, Callable[[], Any]]:
    from datasets import DatasetDict, load_from_disk

    if subset is not None:
        raise DataError(f"{path} is one data set, written by save_to_disk; it has no subset {subset!r}")
    try:
        found = load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
    parts = found if isinstance(found, DatasetDict) else {"train": found}
    return {canonical(str(name)): partial(_itself, table) for name, table in parts.items()}


def _of_hub(source: str, subset: str | None) -> dict[str, Callable[[], Any]]:
    """What `datasets.load_dataset` finds, on the hub or in a folder whose card names subsets."""
    from datasets import load_dataset

    try:
        parts = load_dataset(source, subset)
    except EffzooError:
        raise
    except Exception as error:  # of many kinds: no such data set, no network, a broken file
        here = os.path.isdir(source)
        where = (
            f"{source} cannot be read"
            if here
            else f"{source!r} is no file here, and no data set on the hub that can be read now"
        )
        raise DataError(f"{where}: {first_line(error)}") from error
    return {canonical(str(name)): partial(_itself, table) for name, table in parts.items()}


def _itself(table: Any) -> Any:
    return table
