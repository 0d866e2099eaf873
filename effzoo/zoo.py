"""The zoo: one TOML file of numbers and names per model, and what the user overrides."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from effzoo import architectures
from effzoo.annotations import annotations_of, problem
from effzoo.architectures import Config, PerceiverConfig
from effzoo.errors import OptionError, UnknownNameError, did_you_mean, listing, shown
from effzoo.memory import room

_HERE = Path(__file__).parent
_PACKAGED = _HERE / "_models"  # where a wheel has what is in the folder models/ of a checkout
_FOLDER = _PACKAGED if _PACKAGED.is_dir() else _HERE.parent / "models"
_NOT_SIZES = ("name", "layout", "paper", "hub", "package")
_LARGE = 2**20  # with a size above it, or 2**30 weights, each new tensor is compared with the free memory
_MOST_BYTES = 1_000_000  # of a TOML file: a model is numbers and names


def models() -> list[str]:
    """The names of the zoo."""
    return sorted(_files())


def config(name: str | Path, **sizes: Any) -> Any:
    """The config of a zoo entry, or of a TOML file of your own, with sizes overridden by keyword (`layers=2, dim=64`).

    The file is read each time. What it says is checked as the keywords are: names, types and ranges.
    """
    path = _path(name)
    entry = _read(path)
    cls = _class(entry)
    fields, annotations = {f.name: f for f in dataclasses.fields(cls)}, annotations_of(cls)
    for key, value in sizes.items():
        if key not in fields or key in _NOT_SIZES:
            known = sorted(set(fields) - set(_NOT_SIZES))
            raise OptionError(
                f"model {path.stem!r} has no size {shown(key)}{did_you_mean(key, known)} Sizes: {listing(known)}."
            )
        if wrong := problem(value, annotations[key]):
            raise OptionError(
                f"size {key!r} of model {path.stem!r} {wrong}" if wrong.startswith("takes") else f"{key} {wrong}"
            )
    layers = sizes.get("layers", entry["layers"])
    entry = entry | {key: _repeated(values, layers) for key, values in entry.get("repeat", {}).items()}
    entry.pop("repeat", None)
    for key in ("bos_token", "eos_token"):  # a smaller vocabulary than the entry's does not have its tokens
        if key in entry and not isinstance(entry[key], list) and entry[key] >= sizes.get("vocab", entry["vocab"]):
            entry[key] = None
    return cls(**{"name": path.stem, **entry, **sizes})


def _path(name: str | Path) -> Path:
    """Where an entry is written."""
    if isinstance(name, Path) or (isinstance(name, str) and name.endswith(".toml")):
        path = Path(name)
        if path.suffix != ".toml":
            known = f"; the zoo's own model is effzoo.build({path.name!r})" if path.name in _files() else ""
            raise OptionError(
                f"a path to a model names a TOML file, which ends in .toml, got {shown(str(path))}{known}"
            )
        return path
    if not isinstance(name, str):
        raise OptionError(f"a model is a name of the zoo or a TOML file, got {shown(name)} ({type(name).__name__})")
    files = _files()
    if name not in files:
        raise UnknownNameError("model", name, files)
    return files[name]


def _class(entry: dict[str, Any]) -> Any:
    return architectures.config_class(entry.get("architecture"))


def _repeated(values: list[Any], layers: int) -> tuple[Any, ...]:
    """The values of a table [repeat] of an entry, one for each layer, over and over."""
    return tuple(values[layer % len(values)] for layer in range(layers))


def _check(path: Path, entry: dict[str, Any]) -> None:
    """Refuse unknown and missing keys and wrong values; `repeat` holds lists of values, which layers get in turn."""
    cls = _class(entry)
    fields, annotations = {f.name: f for f in dataclasses.fields(cls)}, annotations_of(cls)
    repeat = entry.get("repeat", {})
    if not isinstance(repeat, dict) or not all(isinstance(values, list) and values for values in repeat.values()):
        raise OptionError(
            f"{path}: [repeat] is a table of lists, as in attention = ['full', "
            f"'longformer[window=128]'], got {shown(repeat)}"
        )
    unknown = [key for key in (*entry, *repeat) if key not in fields and key != "repeat"]
    missing = [
        key for key, f in fields.items() if f.default is dataclasses.MISSING and key not in entry and key != "name"
    ]
    if unknown or missing:
        what = (
            f"has an unknown key {shown(unknown[0])}{did_you_mean(unknown[0], fields)}"
            if unknown
            else (f"lacks {listing(missing)}.")
        )
        raise OptionError(f"{path} {what} Keys: {listing(fields)}.")
    for key, value in (*entry.items(), *repeat.items()):
        if key != "repeat" and (wrong := problem(value, annotations[key])):
            raise OptionError(f"{path}: {key} {wrong}")


def create(name: str | Path, *, task: str = "features", num_labels: int = 2, **sizes: Any) -> Any:
    """A freshly initialised model of the zoo: a Transformer, a Perceiver or an EncoderDecoder."""
    return made(config(name, **sizes), task, num_labels)


def made(sized: Config | PerceiverConfig, task: str, num_labels: int) -> Any:
    """A freshly initialised model of a config. Raises TooLargeError for one that memory has no room for."""
    weights = (sized.vocab + max(sized.max_length, num_labels) + sized.layers * (sized.dim + sized.mlp)) * sized.dim
    with room(weights // 2**10, num_labels, dataclasses.asdict(sized), large=_LARGE):
        return architectures.made(sized, task, num_labels)


def _files() -> dict[str, Path]:
    return {path.stem: path for path in _FOLDER.glob("*.toml")}


def _read(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise OptionError(
                f"{path} cannot be read as TOML: {'it is no file' if path.exists() else 'there is no such file'}"
            )
        if path.stat().st_size > _MOST_BYTES:
            raise OptionError(
                f"{path} has {path.stat().st_size:,} bytes; a model file of numbers and names has at "
                f"most {_MOST_BYTES:,}"
            )
        entry = tomllib.loads(path.read_bytes().decode())
    # a null byte in the path, bytes that are no UTF-8, TOML errors, lists in lists in lists
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"{path} cannot be read as TOML: {str(error) or type(error).__name__}") from None
    _check(path, entry)
    return entry
