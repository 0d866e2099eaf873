"""What the settings of a run may be: each is checked before anything is read or written, and put into Python's own
types."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from effzoo.errors import OptionError, did_you_mean, listing

LARGEST = 2**31 - 1  # of a count: what 32 bits hold
SEEDS = 2**32  # numpy knows no larger ones


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


def flag(name: str, value: Any) -> bool:
    """True or False. Raises OptionError."""
    if not isinstance(value, bool):
        raise OptionError(f"{name} is True or False, got {value!r}")
    return value


def steps(name: str, value: Any) -> int | str | None:
    """A number of steps, "epoch" or None. Raises OptionError."""
    if value is None or (isinstance(value, str) and value == "epoch"):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 1 <= int(value) <= LARGEST:
        raise OptionError(f"{name} is a number of steps (at least 1), 'epoch' or None, got {value!r}")
    return int(value)


def warmup_of(value: Any) -> float | int:
    """Steps, or a share of all steps. Raises OptionError."""
    integer = isinstance(value, numbers.Integral) and not isinstance(value, bool) and 0 <= int(value) <= LARGEST
    share = isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral) and 0 <= float(value) < 1
    if not integer and not share:
        raise OptionError(
            f"warmup is a number of steps (an integer) or a share of all steps (a float below 1), got {value!r}"
        )
    return int(value) if integer else float(value)


def one_of(name: str, value: Any, known: Collection[str]) -> str:
    """One of some names. Raises OptionError."""
    if not isinstance(value, str) or value not in known:
        raise OptionError(
            f"{name} is one of {listing(known)}, got "
            f"{value!r}{did_you_mean(value, known) if isinstance(value, str) else '.'}".rstrip(".")
        )
    return value


def called(name: str, value: Any) -> Any:
    """Something to call, or None. Raises OptionError."""
    if value is not None and not callable(value):
        raise OptionError(f"{name} is a function or None, got {value!r}")
    return value


def folder(name: str, value: Any) -> Path:
    """A folder, which may not be there yet. Raises OptionError."""
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise OptionError(f"{name} is the path of a folder, got {value!r}")
    found = Path(value)
    if found.exists() and not found.is_dir():
        raise OptionError(f"{name} is the path of a folder, and {found} is a file")
    return found


def callbacks_of(value: Any) -> list[Any]:
    """Callbacks of transformers. Raises OptionError."""
    from transformers import TrainerCallback

    if not isinstance(value, Sequence) or isinstance(value, str):
        raise OptionError(f"callbacks is a list of transformers.TrainerCallback, got {value!r}")
    for each in value:
        if not isinstance(each, TrainerCallback) and not (isinstance(each, type) and issubclass(each, TrainerCallback)):
            raise OptionError(f"callbacks is a list of transformers.TrainerCallback, got one {each!r}")
    return list(value)


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False
