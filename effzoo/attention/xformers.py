"""Tiles by xformers (Lefaudeux et al. 2022): its memory-efficient attention on CUDA, with its masks; an optional extra.

Its demands on memory are those of torch's operators (`cuda.py`). It returns no log-sum-exp with dropout.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from effzoo.attention.cuda import aligned, aligned_bias, gradients_of
from effzoo.attention.part import Tile, factor, lse_of
from effzoo.errors import OptionError

MISSING = "xformers is not installed; pip install effzoo[xformers], on Linux with CUDA"


@functools.cache
def installed() -> bool:
    """Whether xformers is here; it is not imported."""
    return importlib.util.find_spec("xformers") is not None


@functools.cache
def ops() -> ModuleType:
    """`xformers.ops`, imported when it is needed. Raises OptionError where it is not installed."""
    if not installed():
        raise OptionError(MISSING)
    return importlib.import_module("xformers.ops")


@dataclass(frozen=True)
class Xformers:
    """A tile by `memory_efficient_attention_forward_requires_grad` and `memory_efficient_attention_backward`.

    window: keys before and after itself that a query sees; None: all.
    """

    scale: float | None
    window: tuple[int, int] | None = None

    def forward(self, tile: Tile, index: int) -> tuple[Tensor, Tensor]:
        q, k, v = (aligned(x).transpose(1, 2) for x in tile[:3])
        if isinstance(q, FakeTensor):  # xformers needs more than shapes
            return q.new_empty(*q.shape[:3], v.shape[-1]).transpose(1, 2)[..., : tile.v.shape[-1]], q.new_empty(
                tile.q.shape[:3], dtype=torch.float32
            )
        run = ops().memory_efficient_attention_forward_requires_grad
        out, lse = run(q, k, v, self._mask(tile), 0.0, factor(self.scale, tile.q))
        return out.transpose(1, 2)[..., : tile.v.shape[-1]], lse_of(tile, lse[..., : q.shape[1]])

    def backward(self, tile: Tile, index: int, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v, out = (aligned(x).transpose(1, 2).contiguous() for x in (grad, *tile[:3], out))
        if isinstance(q, FakeTensor):
            return torch.empty_like(tile.q), torch.empty_like(tile.k), torch.empty_like(tile.v)
        run = ops().memory_efficient_attention_backward
        gradients = run(grad, out, lse.contiguous(), q, k, v, self._mask(tile), 0.0, factor(self.scale, tile.q))
        return gradients_of(tile, [x.transpose(1, 2) for x in gradients])

    def _mask(self, tile: Tile) -> Any:
        """Window, triangle and bias as a mask of xformers."""
        if self.window is not None:
            left, right = self.window
            return ops().fmha.attn_bias.LocalAttentionFromBottomRightMask(window_left=left, window_right=right)
        bias = aligned_bias(tile)
        if not tile.causal:
            return bias
        return ops().LowerTriangularMask() if bias is None else ops().LowerTriangularMask().add_bias(bias)
