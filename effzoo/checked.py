"""Checks of the values of inputs, in eager and in compiled code, without making the host wait for an accelerator.

Each function returns the tensor that it has checked, so that compiled code cannot leave it out. A wrong value raises
InputError on a CPU, and is a device assertion on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from effzoo.devices import is_portable
from effzoo.errors import InputError

IGNORED = -100  # the label of positions that do not count, as in torch.nn.functional.cross_entropy
LABEL_NAMES = ("labels", "label", "label_ids")
UNUSED = {  # numbers that tokenizers and data sets carry beside what a model reads
    "id", "idx", "index", "length", "special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping",
    "num_truncated_tokens",
}  # fmt: skip


def marks(mask: Tensor, name: str) -> Tensor:
    """A mask of 0 and 1, or of booleans, as booleans."""
    if is_portable():
        return mask.bool()
    return _marks_compiled(mask, name) if torch.compiler.is_compiling() else _marks(mask, name)


def within(ids: Tensor, most: int, name: str, span: str, hint: str = "", ignored: int = 0) -> Tensor:
    """Integers from 0 to `most`, or `ignored`; span: this range in words."""
    if is_portable():
        return ids
    return (_within_compiled if torch.compiler.is_compiling() else _within)(ids, most, name, span, hint, ignored)


def known(x: Tensor, fine: Tensor, message: str) -> Tensor:
    """x, if `fine` is true; message: of the error otherwise."""
    if is_portable():
        return x
    return _known_compiled(x, fine, message) if torch.compiler.is_compiling() else _known(x, fine, message)


def _known(x: Tensor, fine: Tensor, message: str) -> Tensor:
    _require(fine, message)
    return x


def _marks(mask: Tensor, name: str) -> Tensor:
    binary = (mask == 0) | (mask == 1)
    message = f"{name} holds 0 and 1 (or booleans)"
    _require(binary.all(), message, lambda: f", got values from {mask.min().item()} to {mask.max().item()}")
    if mask.is_floating_point() and name == "attention_mask":
        message = (
            f"{name} is {mask.dtype} and 0 everywhere, which marks no token: 1 is for tokens (masks that are "
            "added to scores have 0 there)"
        )
        _require(mask.any(), message)
    return mask.bool() if mask.dtype != torch.bool else mask.clone()


def _within(ids: Tensor, most: int, name: str, span: str, hint: str, ignored: int) -> Tensor:
    def got() -> str:
        counted = ids[ids != ignored] if ignored < 0 else ids
        return f", got {int(counted.min())} to {int(counted.max())}{hint}"

    _require((((ids >= 0) & (ids <= most)) | (ids == ignored)).all(), f"{name} are in {span}", got)
    return ids


def _require(fine: Tensor, message: str, got: Callable[[], str] = str) -> None:
    """message: of the error; got: its end, for which the host reads the values, on a CPU alone."""
    if fine.is_meta:
        return
    if fine.device.type == "cuda":
        torch._assert_async(fine, message)
    elif not bool(fine):
        raise InputError(message + got())


@torch.library.custom_op("effzoo::marks", mutates_args=())
def _marks_compiled(mask: Tensor, name: str) -> Tensor:
    return _marks(mask, name)


@_marks_compiled.register_fake
def _(mask: Tensor, name: str) -> Tensor:
    return torch.empty_like(mask, dtype=torch.bool)


@torch.library.custom_op("effzoo::within", mutates_args=())
def _within_compiled(ids: Tensor, most: int, name: str, span: str, hint: str, ignored: int) -> Tensor:
    return _within(ids, most, name, span, hint, ignored).clone()


@_within_compiled.register_fake
def _(ids: Tensor, most: int, name: str, span: str, hint: str, ignored: int) -> Tensor:
    return torch.empty_like(ids)


@torch.library.custom_op("effzoo::known", mutates_args=())
def _known_compiled(x: Tensor, fine: Tensor, message: str) -> Tensor:
    return _known(x, fine, message).clone()


@_known_compiled.register_fake
def _(x: Tensor, fine: Tensor, message: str) -> Tensor:
    return torch.empty_like(x)


def counted(labels: Tensor, task: str | None, num_labels: int | None) -> Tensor:
    """How many labels the mean loss of a model is over: those that are not -100, a causal model's after the shift."""
    if labels.is_floating_point() or (task == "classification" and num_labels == 1):
        return torch.tensor(labels.numel())
    return ((labels[:, 1:] if task == "causal_lm" else labels) != IGNORED).sum()
