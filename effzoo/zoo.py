"""The zoo: one TOML file of numbers and names per model, and what the user overrides."""

from __future__ import annotations

import dataclasses
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from effzoo.architectures import Config, Transformer
from effzoo.errors import OptionError, UnknownNameError, did_you_mean, listing
from effzoo.registry import fits

_HERE = Path(__file__).parent
_FOLDERS = (_HERE / "_models", _HERE.parent / "models")  # installed, and in a checkout
_NOT_SIZES = ("name", "layout", "paper", "hub", "package")


def models() -> list[str]:
    """The names of the zoo."""
    return sorted(_files())


def config(name: str, **sizes: Any) -> Config:
    """The config of a zoo entry with sizes overridden by keyword (`layers=2, dim=64`)."""
    files = _files()
    if name not in files:
        raise UnknownNameError("model", name, files)
    entry = _read(files[name])
    fields = {f.name: f for f in dataclasses.fields(Config)}
    for key, value in sizes.items():
        if key not in fields or key in _NOT_SIZES:
            known = sorted(set(fields) - set(_NOT_SIZES))
            raise OptionError(f"model {name!r} has no size {key!r}{did_you_mean(key, known)} Sizes: {listing(known)}.")
        default = entry.get(key, fields[key].default)
        if key not in ("attention", "pad_token") and not fits(value, float if type(default) is float else type(default)):
            raise OptionError(f"size {key!r} of model {name!r} takes {type(default).__name__}, got {value!r} ({type(value).__name__})")
    return Config(**{"name": name, **entry, **sizes})


def create(name: str, *, task: str = "features", num_labels: int = 2, **sizes: Any) -> Transformer:
    """A freshly initialised model of the zoo."""
    return Transformer(config(name, **sizes), task, num_labels)


@cache
def _files() -> dict[str, Path]:
    return {path.stem: path for folder in _FOLDERS for path in folder.glob("*.toml")}


@cache
def _read(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return tomllib.load(file)
