"""Tiles by torch's flash operators for the CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from effzoo.attention.part import Tile, factor, lse_of

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Flash:
    """A tile by the flash operators, which take q, k and v of one width, dense on the last axis (they do not check)."""

    scale: float | None

    def forward(self, tile: Tile, index: int) -> tuple[Tensor, Tensor]:
        q, k, v = _even(tile)
        out, lse = _forward(q, k, v, 0.0, tile.causal, attn_mask=tile.bias, scale=factor(self.scale, tile.q))
        if tile.bias is None:
            out, lse = _honest(q, k, out, lse)
        return _cut(out, tile.v), lse_of(tile, lse)

    def backward(self, tile: Tile, index: int, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = _even(tile)
        grad, out = (_wide(x, v.shape[-1]) for x in (grad, out))
        grad_q, grad_k, grad_v = _backward(
            grad, q, k, v, out, lse, 0.0, tile.causal, attn_mask=tile.bias, scale=factor(self.scale, tile.q)
        )
        return _cut(grad_q, tile.q), _cut(grad_k, tile.k), _cut(grad_v, tile.v)


def _even(tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of one width, padded with zeros, and dense on the last axis."""
    q, k, v, _, _ = tile
    if q.shape[-1] == v.shape[-1]:
        if q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
            return q, k, v
        return q.contiguous(), k.contiguous(), v.contiguous()
    width = max(q.shape[-1], v.shape[-1])
    return _wide(q, width), _wide(k, width), _wide(v, width)


def _wide(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _cut(x: Tensor, like: Tensor) -> Tensor:
    return x if x.shape[-1] == like.shape[-1] else x[..., : like.shape[-1]]


def _honest(q: Tensor, k: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The operator's results, with NaN where the definition has NaN: it returns 0 for a query whose scores are NaN.

    Only a log-sum-exp of 0 can be wrong: searching for one costs a pass over the log-sum-exps.
    """
    if isinstance(lse, FakeTensor) or lse.is_meta or bool(lse.all()):
        return out, lse
    largest = (
        k.abs().amax(dim=(-1, -2), keepdim=True).to(lse.dtype)[..., 0]
        * q.abs().amax(dim=-1).to(lse.dtype)
        * q.shape[-1]
    )
    lost = (lse == 0) & ~largest.isfinite()  # NaN, or products that overflow with both signs
    return out.masked_fill(lost[..., None], math.nan), lse.masked_fill(lost, math.nan)
