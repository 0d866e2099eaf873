"""What the host may read of a tensor: an accelerator computes later, so to read its values is to wait for it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

NEWEST = (9, 0)  # what a card is taken to be able to do where there is none
_taken: ContextVar[str] = ContextVar("_taken", default="cpu")
_portable: list[bool] = []  # compiled code reads no ContextVar


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Inside, a graph that torch.export makes of a model holds torch's own operators alone: it can be saved, run where
    effzoo is not, and become ONNX.

    Attention is its definition, which takes O(n^2) time and memory whatever the kind takes. Inputs are not checked: a
    token id that the vocabulary does not have is what the embedding makes of it.
    """
    _portable.append(True)
    try:
        yield
    finally:
        _portable.pop()


def is_portable() -> bool:
    """Whether a graph is made of torch's own operators."""
    return bool(_portable) and torch.compiler.is_compiling()


def on_cpu() -> bool:
    """Whether training runs on the processor: no accelerator here, or `accelerate launch --cpu`."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return asked or not torch.accelerator.is_available()


@contextlib.contextmanager
def taken_to_be(kind: str) -> Iterator[None]:
    """Tensors on the CPU count as tensors on a "cpu" or "cuda" device.

    For `plan`, whose tensors have no memory anywhere.
    """
    token = _taken.set(kind)
    try:
        yield
    finally:
        _taken.reset(token)


def kind_of(x: Tensor | torch.device) -> str:
    """The kind of device that x is on, or is taken to be on."""
    kind = x.type if isinstance(x, torch.device) else x.device.type
    # nothing is planned in compiled code
    return kind if kind != "cpu" or torch.compiler.is_compiling() else _taken.get()


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Inside, operations on the device of x are in the dtype of their inputs."""
    device = x.device.type
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else contextlib.nullcontext()


def capability(device: torch.device) -> tuple[int, int]:
    """What a card can do, as NVIDIA counts it; without one, nothing runs, but it can be planned."""
    return (
        torch.cuda.get_device_capability(device if device.type == "cuda" else None)
        if torch.cuda.is_available()
        else NEWEST
    )


def at_hand(x: Tensor) -> bool:
    """Whether code may branch on the values of x: in eager mode, on the CPU; an accelerator's would be waited for."""
    return kind_of(x) == "cpu" and not torch.compiler.is_compiling()


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x on this device. A copy to CUDA starts from pinned memory, so that the host goes on before it is made."""
    waits = (
        device.type == "cuda"
        and x.device.type == "cpu"
        and not (isinstance(x, FakeTensor) or torch.compiler.is_compiling())
    )
    return x.pin_memory().to(device, non_blocking=True) if waits else x.to(device)


_kept: dict[Any, Tensor] = {}
_keeping: list[bool] = []


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """Tables that are made here serve compiled code later: for functions in which the compiler makes no tensor."""
    _keeping.append(True)
    yield
    _keeping.pop()


def table(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Numbers, or sequences of them, as a tensor on this device."""
    if isinstance(numbers, tuple) and (torch.compiler.is_compiling() or _keeping):
        key = (numbers, str(device), dtype)
        if key in _kept:
            return _kept[key]
        if _keeping:
            return _kept.setdefault(key, torch.tensor(numbers, dtype=dtype, device=device))
    if device.type != "cuda" or torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=dtype, device=device)
    return sent(torch.tensor(numbers, dtype=dtype, device="cpu"), device)


def chosen(x: Tensor, places: Sequence[int], dim: int = 0) -> Tensor:
    """These places of x along one axis, in the order given; a view where they follow each other."""
    if all(place == places[0] + index for index, place in enumerate(places)):
        return x if len(places) == x.shape[dim] else x.narrow(dim, places[0], len(places))
    return x.index_select(dim, table(places, x.device))
