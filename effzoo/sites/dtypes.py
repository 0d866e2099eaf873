"""Tensors of several dtypes at one site, as where a norm or a head of a model in bfloat16 is held in float32."""

from __future__ import annotations

from torch import Tensor, is_autocast_enabled, promote_types
from torch.nn import functional as F


def autocasts(x: Tensor) -> bool:
    """Whether autocast decides in which dtype x is computed with."""
    return not x.is_meta and is_autocast_enabled(x.device.type)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in the dtype of x; computed in the widest of their dtypes, unless autocast decides."""
    if autocasts(x) or (x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)):
        return F.linear(x, weight, bias)
    widest = promote_types(x.dtype, weight.dtype)
    widest = widest if bias is None else promote_types(widest, bias.dtype)
    return F.linear(x.to(widest), weight.to(widest), None if bias is None else bias.to(widest)).to(x.dtype)
