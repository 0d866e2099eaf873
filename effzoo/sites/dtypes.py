"""Tensors of several dtypes at one site, as where a norm or a head of a model in bfloat16 is held in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, is_autocast_enabled, promote_types
from torch.nn import functional as F

_decoding: ContextVar[bool] = ContextVar("_decoding", default=False)


def autocasts(x: Tensor) -> bool:
    """Whether autocast decides in which dtype x is computed with."""
    return not x.is_meta and is_autocast_enabled(x.device.type)


@contextmanager
def decoding() -> Iterator[None]:
    """A few rows at a time pass through the model, without gradients: `linear` then reads its weights as fast as it
    can.

    On a CPU that is oneDNN in float32 too, where torch takes it for narrower dtypes alone: half the time of MKL on some
    processors, and no more on others. Elsewhere the same product is made with and without gradients, to the bit.
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
    """Whether oneDNN reads these rightly: float32 on a CPU, and dense in memory, without which it takes a wrong
    bias."""
    tensors = (x, weight) if bias is None else (weight, bias)
    ordinary = (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and all(type(each) in (Tensor, torch.nn.Parameter) for each in tensors)
    )
    return ordinary and weight.is_contiguous() and (bias is None or bias.is_contiguous())
