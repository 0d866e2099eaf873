"""The zoo: one TOML file of numbers and names per model, and what the user overrides."""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from functools import cache
from pathlib import Path
from typing import Any

from effzoo.annotations import describe, fits
from effzoo.architectures import Config, Perceiver, PerceiverConfig, Transformer
from effzoo.errors import OptionError, UnknownNameError, did_you_mean, listing

_HERE = Path(__file__).parent
_FOLDERS = (_HERE / "_models", _HERE.parent / "models")  # installed, and in a checkout
_ARCHITECTURES = {"perceiver": PerceiverConfig}  # whose config is another than Config
_NOT_SIZES = ("name", "layout", "paper", "hub", "package")


def models() -> list[str]:
    """The names of the zoo."""
    return sorted(_files())


def config(name: str, **sizes: Any) -> Any:
    """The config of a zoo entry, or of a TOML file of your own, with sizes overridden by keyword (`layers=2, dim=64`)."""
    path = _files().get(name, Path(name) if name.endswith(".toml") else None)
    if path is None:
        raise UnknownNameError("model", name, _files())
    name, entry = path.stem, _read(path)
    entry = entry | {key: _repeated(values, sizes.get("layers", entry["layers"])) for key, values in entry.get("repeat", {}).items()}
    entry.pop("repeat", None)
    cls = _ARCHITECTURES.get(entry["architecture"], Config)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    annotations = typing.get_type_hints(cls)
    for key, value in sizes.items():
        if key not in fields or key in _NOT_SIZES:
            known = sorted(set(fields) - set(_NOT_SIZES))
            raise OptionError(f"model {name!r} has no size {key!r}{did_you_mean(key, known)} Sizes: {listing(known)}.")
        if not fits(value, annotations[key]):
            raise OptionError(f"size {key!r} of model {name!r} takes {describe(annotations[key])}, got {value!r} ({type(value).__name__})")
    return cls(**{"name": name, **entry, **sizes})


def _repeated(values: list[Any], layers: Any) -> tuple[Any, ...]:
    """The values of a table [repeat] of an entry, one for each layer, over and over."""
    return tuple(values[layer % len(values)] for layer in range(layers if isinstance(layers, int) else 0))


def _known(path: Path, entry: dict[str, Any]) -> None:
    """Refuse unknown and missing keys; `repeat` holds lists of values of other keys, which are given to the layers in turn."""
    fields = {f.name: f for f in dataclasses.fields(_ARCHITECTURES.get(entry.get("architecture", ""), Config))}
    repeat = entry.get("repeat", {})
    if not isinstance(repeat, dict) or not all(isinstance(values, list) and values for values in repeat.values()):
        raise OptionError(f"{path}: [repeat] is a table of lists, as in attention = ['full', 'longformer[window=128]'], got {repeat!r}")
    unknown = [key for key in (*entry, *repeat) if key not in fields and key != "repeat"]
    missing = [key for key, f in fields.items() if f.default is dataclasses.MISSING and key not in entry and key != "name"]
    if unknown or missing:
        problem = f"has an unknown key {unknown[0]!r}{did_you_mean(unknown[0], fields)}" if unknown else f"lacks {listing(missing)}."
        raise OptionError(f"{path} {problem} Keys: {listing(fields)}.")


def create(name: str, *, task: str = "features", num_labels: int = 2, **sizes: Any) -> Any:
    """A freshly initialised model of the zoo: a Transformer, or a Perceiver."""
    sized = config(name, **sizes)
    return Perceiver(sized, task, num_labels) if isinstance(sized, PerceiverConfig) else Transformer(sized, task, num_labels)


@cache
def _files() -> dict[str, Path]:
    return {path.stem: path for folder in _FOLDERS for path in folder.glob("*.toml")}


@cache
def _read(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            entry = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"{path} cannot be read as TOML: {error}") from None
    _known(path, entry)
    return entry
