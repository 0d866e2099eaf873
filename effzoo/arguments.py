"""Checks of single values that are given: whole numbers, numbers and folders."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from pathlib import Path
from typing import Any

from effzoo.errors import OptionError

LARGEST = 2**31 - 1  # of a count: what 32 bits hold


def whole(name: str, value: Any, *, least: int, most: int = LARGEST) -> int:
    """An integer in a range. Raises OptionError."""
    integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if integer and value > most:
        raise OptionError(f"{name} is an integer from {least} to {most:,}, got {value!r}")
    if not integer or value < least:
        raise OptionError(f"{name} is an integer of at least {least}, got {value!r}")
    return int(value)


def whole_or_none(name: str, value: Any, *, least: int) -> int | None:
    """An integer of at least so much, or None. Raises OptionError."""
    return None if value is None else whole(name, value, least=least)


def number(name: str, value: Any, meaning: str, fits: Callable[[float], bool]) -> float:
    """A finite number of which something holds; meaning: that, in words. Raises OptionError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not _finite(value) or not fits(float(value)):
        raise OptionError(f"{name} is {meaning}, got {value!r}")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def number_or_none(name: str, value: Any, meaning: str, fits: Callable[[float], bool]) -> float | None:
    """A finite number of which something holds, or None. Raises OptionError."""
    return None if value is None else number(name, value, meaning, fits)


def folder(name: str, value: Any) -> Path:
    """A folder, which may not be there yet. Raises OptionError."""
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise OptionError(f"{name} is the path of a folder, got {value!r}")
    path = Path(value)
    if path.exists() and not path.is_dir():
        raise OptionError(f"{name} is the path of a folder, and {path} is a file")
    return path


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False
