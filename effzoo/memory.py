"""Sizes above what the machine can hold: said before anything is allocated, with the bytes needed and those free."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode

from effzoo.errors import TooLargeError

# without a number above it nothing is watched, which takes a second when torch does it first, and microseconds for each
# tensor
LARGE = 10_000
_WATCHED = 2**20  # bytes from which on a tensor is compared with what is free
_KEPT = 2**28  # bytes that are left for everything else


def room(*numbers: Any, large: int = LARGE) -> AbstractContextManager[Any]:
    """Inside, a tensor that does not fit into the free memory raises TooLargeError before it is allocated.

    large: nothing is watched unless one of the sizes is above it.
    """
    watched = any(number > large for number in _numbers(numbers)) and detect_fake_mode() is None
    return _Room() if watched else nullcontext()  # type: ignore[no-untyped-call]


def free(device: torch.device) -> float:
    """Bytes that can still be had on a device; infinity where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_of_the_machine(), _of_the_group(), _of_the_process()) if device.type == "cpu" else math.inf


class _Room(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at the sizes of new tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        place = _place_of_size(func)
        if place is not None and place < len(args):
            given = args[place]
            entries = math.prod(given) if isinstance(given, (list, tuple)) else given
            like = args[0] if isinstance(args[0], torch.Tensor) else None
            dtype = kwargs.get("dtype") or (like.dtype if like is not None else torch.get_default_dtype())
            device = kwargs.get("device") or (like.device if like is not None else torch.device("cpu"))
            needed = entries * dtype.itemsize
            if needed > _WATCHED and needed > (have := free(torch.device(device)) - _KEPT):
                raise TooLargeError(
                    f"a tensor of {_shape(given)} needs {needed:,} bytes, and {max(0, int(have)):,} are free on "
                    f"{device}; give smaller sizes, or "
                    "count on the meta device (effzoo.plan, effzoo account)"
                )
        return func(*args, **kwargs)


@cache
def _place_of_size(func: Any) -> int | None:
    """Where an operator that makes a tensor takes its size."""
    names = [argument.name for argument in func._schema.arguments]
    if (
        "size" in names
        and func._schema.returns
        and not func._schema.is_mutable
        and func.overloadpacket._qualified_op_name not in _VIEWS
    ):
        return names.index("size")
    return names.index("n") if func.overloadpacket._qualified_op_name in ("aten::randperm", "aten::eye") else None


_VIEWS = (
    "aten::view",
    "aten::_unsafe_view",
    "aten::expand",
    "aten::as_strided",
    "aten::_reshape_alias",
    "aten::reshape",
)


def _numbers(given: Any) -> Iterable[int]:
    """The whole numbers in options, which may be lists and maps."""
    if isinstance(given, Mapping):
        given = list(given.values())
    if isinstance(given, int):
        yield given
    elif isinstance(given, str):  # a spec inside an option
        yield from map(int, re.findall(r"[0-9]{5,18}", given))
    elif isinstance(given, (list, tuple)):
        for item in given:
            yield from _numbers(item)


def _shape(given: Any) -> str:
    return " x ".join(f"{size:,}" for size in given) if isinstance(given, (list, tuple)) else f"{given:,}"


def _of_the_machine() -> float:
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return math.inf


def _of_the_group() -> float:
    """What a container may still take."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return int(Path("/sys/fs/cgroup", limit).read_text()) - int(Path("/sys/fs/cgroup", used).read_text())
        except (OSError, ValueError):
            continue
    return math.inf


def _of_the_process() -> float:
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        return math.inf if limit == resource.RLIM_INFINITY else limit - used
    except (ImportError, OSError, ValueError):
        return math.inf
