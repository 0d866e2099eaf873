"""JSON of any origin: of bounded size, every key once, numbers finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LARGEST = 64 * 2**20  # bytes; what says something of a model with 30,000 tensors has some 45 million


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError, ValueError, TypeError and RecursionError for what is none."""
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"it has {size:,} bytes, and {LARGEST:,} are the most that are read")
    content = json.loads(path.read_bytes(), object_pairs_hook=_once, parse_constant=_finite, parse_float=_number)
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}, not an object")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        twice = next(key for key in content if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"the key {twice!r:.80} appears twice")
    return content


def _finite(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _number(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text:.40} is too large a number")
    return number
