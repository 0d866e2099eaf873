"""Tensors of several dtypes at one site, such as a float32 norm or head in a bfloat16 model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, is_autocast_enabled, promote_types
from torch.nn import functional as F

from effzoo.errors import OptionError

_decoding: ContextVar[bool] = ContextVar("_decoding", default=False)


def autocasts(x: Tensor) -> bool:
    """Whether autocast chooses the dtype of computations with x."""
    return not x.is_meta and is_autocast_enabled(x.device.type)


def floating(given: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype of numbers, which may be given by its name, or None; OptionError for another."""
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if given is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise OptionError(f"dtype is a floating-point type such as torch.bfloat16 or 'float32', got {given!r}")
    return dtype


@contextmanager
def decoding() -> Iterator[None]:
    """Inside, `linear` is as fast as it can be for a few positions at a time, without gradients.

    On a CPU it takes oneDNN in float32, for which torch takes MKL: half the time on some processors, equal on others.
    Outside, the product is the same to the bit with and without gradients.
    """
    token = _decoding.set(torch._C._has_mkldnn and not torch.is_grad_enabled())
    try:
        yield
    finally:
        _decoding.reset(token)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in the dtype of x; computed in the widest of their dtypes, unless autocast decides."""
    if autocasts(x) or (x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)):
        if not torch.compiler.is_compiling() and _decoding.get() and not autocasts(x) and _plain(x, weight, bias):
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
            return product
        return F.linear(x, weight, bias)
    widest = promote_types(x.dtype, weight.dtype)
    widest = widest if bias is None else promote_types(widest, bias.dtype)
    return F.linear(x.to(widest), weight.to(widest), None if bias is None else bias.to(widest)).to(x.dtype)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN computes these correctly: float32 on a CPU, dense in memory (else its bias is wrong)."""
    tensors = (x, weight) if bias is None else (weight, bias)
    ordinary = (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )
    return ordinary and weight.is_contiguous() and (bias is None or bias.is_contiguous())
