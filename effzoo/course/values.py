"""Values as JSON and tensors beside it, which hold no code: what the processes of a grading send to each other."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from effzoo.checks.runner import Failed
from effzoo.errors import shown

LARGEST = 100_000  # entries of a list, and characters of a text
DEEPEST = 8


def pack(value: Any, tensors: dict[str, Tensor], name: str, depth: int = 0) -> Any:
    """A value for JSON; its tensors are put under names of their own that begin with `name`.

    Raises Failed for a value of another type than tensors, numbers, texts, None, and lists and dicts of them.
    """
    if isinstance(value, Tensor):
        key = f"{name}.{len(tensors)}"
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": str(value)}
    if value is None or isinstance(value, (bool, int, float)):
        return value
    sized = isinstance(value, (str, list, tuple, dict)) and len(value) <= LARGEST
    if sized and isinstance(value, str):
        return value
    if sized and depth < DEEPEST and isinstance(value, (list, tuple)):
        return {"list": [pack(one, tensors, name, depth + 1) for one in value]}
    if sized and depth < DEEPEST and isinstance(value, dict) and all(isinstance(key, (str, int)) for key in value):
        return {"dict": [[key, pack(one, tensors, name, depth + 1)] for key, one in value.items()]}
    raise Failed(f"the result is {shown(value)}; return tensors, numbers, texts, and lists and dicts of them")


def unpack(packed: Any, tensors: dict[str, Tensor]) -> Any:
    """The value that was packed. Raises ValueError for what `pack` does not make."""
    if packed is None or isinstance(packed, (bool, int, float, str)):
        return packed
    if isinstance(packed, dict) and len(packed) == 1:
        [(kind, inside)] = packed.items()
        if kind == "tensor" and isinstance(inside, str) and inside in tensors:
            return tensors[inside]
        if kind == "number" and inside in ("nan", "inf", "-inf"):
            return float(inside)
        if kind == "list" and isinstance(inside, list):
            return [unpack(one, tensors) for one in inside]
        if kind == "dict" and isinstance(inside, list):
            return {key: unpack(one, tensors) for key, one in inside}
    raise ValueError(f"this is no packed value: {shown(packed)}")
