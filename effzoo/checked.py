"""Inputs whose values have to be in range: checked in eager and in compiled code alike, and without a wait for an
accelerator.

Each function returns the tensor that it has checked, so that compiled code cannot leave the check out. On a CPU a wrong
value is an InputError; on a CUDA device, which would have to be waited for, it is an assertion of the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from effzoo.errors import InputError

IGNORED = -100  # the label of positions that do not count, as in torch.nn.functional.cross_entropy


def marks(mask: Tensor, name: str) -> Tensor:
    """A mask of 0 and 1, or of booleans, as booleans."""
    return _marks_compiled(mask, name) if torch.compiler.is_compiling() else _marks(mask, name)


def within(ids: Tensor, most: int, name: str, told: str, hint: str = "", ignored: int = 0) -> Tensor:
    """Integers from 0 to `most`, or `ignored`; told: this range in words."""
    return (_within_compiled if torch.compiler.is_compiling() else _within)(ids, most, name, told, hint, ignored)


def known(x: Tensor, fine: Tensor, message: str) -> Tensor:
    """x, of which `fine` says whether it is as it has to be."""
    return _known_compiled(x, fine, message) if torch.compiler.is_compiling() else _known(x, fine, message)


def _known(x: Tensor, fine: Tensor, message: str) -> Tensor:
    _require(fine, message)
    return x


def _marks(mask: Tensor, name: str) -> Tensor:
    held = (mask == 0) | (mask == 1)
    wanted = f"{name} holds 0 and 1 (or booleans)"
    _require(held.all(), wanted, lambda: f", got values from {mask.min().item()} to {mask.max().item()}")
    if mask.is_floating_point() and name == "attention_mask":
        message = (
            f"{name} is {mask.dtype} and 0 everywhere, which marks no token: 1 is for tokens (masks that are "
            "added to scores have 0 there)"
        )
        _require(mask.any(), message)
    return mask.bool() if mask.dtype != torch.bool else mask.clone()


def _within(ids: Tensor, most: int, name: str, told: str, hint: str, ignored: int) -> Tensor:
    def found() -> str:
        counted = ids[ids != ignored] if ignored < 0 else ids
        return f", got {int(counted.min())} to {int(counted.max())}{hint}"

    _require((((ids >= 0) & (ids <= most)) | (ids == ignored)).all(), f"{name} are in {told}", found)
    return ids


def _require(fine: Tensor, wanted: str, found: Callable[[], str] = str) -> None:
    """wanted: what is said on either device; found: the rest, for which the host looks at the values."""
    if fine.is_meta:
        return
    if fine.device.type == "cuda":
        torch._assert_async(fine, wanted)
    elif not bool(fine):
        raise InputError(wanted + found())


@torch.library.custom_op("effzoo::marks", mutates_args=())
def _marks_compiled(mask: Tensor, name: str) -> Tensor:
    return _marks(mask, name)


@_marks_compiled.register_fake
def _(mask: Tensor, name: str) -> Tensor:
    return torch.empty_like(mask, dtype=torch.bool)


@torch.library.custom_op("effzoo::within", mutates_args=())
def _within_compiled(ids: Tensor, most: int, name: str, told: str, hint: str, ignored: int) -> Tensor:
    return _within(ids, most, name, told, hint, ignored).clone()


@_within_compiled.register_fake
def _(ids: Tensor, most: int, name: str, told: str, hint: str, ignored: int) -> Tensor:
    return torch.empty_like(ids)


@torch.library.custom_op("effzoo::known", mutates_args=())
def _known_compiled(x: Tensor, fine: Tensor, message: str) -> Tensor:
    return _known(x, fine, message).clone()


@_known_compiled.register_fake
def _(x: Tensor, fine: Tensor, message: str) -> Tensor:
    return torch.empty_like(x)
