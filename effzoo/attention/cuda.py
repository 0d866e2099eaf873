"""Tiles by torch's own operators for CUDA: memory-efficient attention, which takes biases and dropout, and flash
attention, which takes no bias.

Backward both compute exp(S - lse) and rowsum(dO * out) from the lse and the out that they are given, so with the merged
ones they give the gradients of a part of one softmax (see `kernel.py`). What they ask of memory is met here: rows of a
multiple of 8 numbers, rows of a bias of a multiple of 16, and backward an `out` that is dense as [g, rows, heads, d]
and a log-sum-exp of a multiple of 32 rows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effzoo.attention.part import Tile, factor, lse_of

NUMBERS, BIASES, ROWS = 8, 16, 32
_efficient = torch.ops.aten._scaled_dot_product_efficient_attention
_efficient_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward
_flash = torch.ops.aten._flash_attention_forward
_flash_backward = torch.ops.aten._flash_attention_backward


@dataclass(frozen=True, eq=False)
class _Drawing:
    """The operators draw which weights are dropped from the generator of the device.

    `drawn` keeps what every tile is drawn from, seed and offset, and the backward pass draws the same. seed: what the
        generator is set to before (in compiled code, where the two passes share nothing else).
    """

    scale: float | None
    dropout: float = 0.0
    seed: int | None = None
    drawn: dict[int, list[Tensor]] = field(default_factory=dict)

    def run(
        self, index: int, device: torch.device, operator: Callable[..., Any], *given: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of a tile by an operator."""
        with _from(None if self.seed is None else self.seed + index, device):
            out, lse, *drawn = operator(*given, **options)
        if self.dropout:
            self.drawn[index] = drawn[:2]
        return out, lse


class Efficient(_Drawing):
    """A tile by the memory-efficient operators."""

    def forward(self, tile: Tile, index: int) -> tuple[Tensor, Tensor]:
        q, k, v = (rows_of(x) for x in tile[:3])
        given = q, k, v, bias_rows(tile), True, self.dropout, tile.causal
        out, lse = self.run(index, q.device, _efficient, *given, scale=factor(self.scale, tile.q))
        return out[..., : tile.v.shape[-1]], lse_of(tile, lse[..., : q.shape[2]])

    def backward(self, tile: Tile, index: int, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v = (rows_of(x) for x in (grad, *tile[:3]))
        # of which the operator does not look at all strides
        out = rows_of(out).transpose(1, 2).contiguous().transpose(1, 2)
        lse = F.pad(lse, (0, -lse.shape[-1] % ROWS), value=math.inf).contiguous()
        drawn = (
            self.drawn[index]
            if self.dropout and self.seed is None
            else [torch.tensor((self.seed or 0) + index), torch.tensor(0)]
        )
        wanted = [True, True, True, False]
        found = _efficient_backward(
            grad,
            q,
            k,
            v,
            bias_rows(tile),
            out,
            lse,
            *drawn,
            self.dropout,
            wanted,
            tile.causal,
            scale=factor(self.scale, tile.q),
        )
        return gradients_of(tile, found)


@dataclass(frozen=True, eq=False)
class FlashCuda(_Drawing):
    """A tile without bias by the flash operators. window: how many keys before it and after it a query sees; None:
    all."""

    window: tuple[int, int] | None = None

    def forward(self, tile: Tile, index: int) -> tuple[Tensor, Tensor]:
        q, k, v = (rows_of(x, _width(tile)).transpose(1, 2) for x in tile[:3])
        out, lse = self.run(
            index, q.device, _flash, q, k, v, None, None, *self._told(tile), False, **self._options(tile)
        )
        return out.transpose(1, 2)[..., : tile.v.shape[-1]], lse

    def backward(self, tile: Tile, index: int, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v, out = (rows_of(x, _width(tile)).transpose(1, 2) for x in (grad, *tile[:3], out))
        drawn = self.drawn[index] if self.dropout and self.seed is None else self._state(index, q.device)
        found = _flash_backward(
            grad, q, k, v, out, lse.contiguous(), None, None, *self._told(tile), *drawn, **self._options(tile)
        )
        return gradients_of(tile, [x.transpose(1, 2) for x in found])

    def _told(self, tile: Tile) -> tuple[int, int, float, bool]:
        """Rows, keys, dropout, and whether it is causal."""
        return tile.q.shape[2], tile.k.shape[2], self.dropout, tile.causal

    def _state(self, index: int, device: torch.device) -> list[Tensor]:
        """Seed and offset of a generator that was just set to the seed of the tile, and the tensor that the operators
        do not use."""
        state = torch.zeros(2, dtype=torch.int64, device=device)
        state[0] = (self.seed or 0) + index
        return [state.view(torch.uint64), torch.zeros((), dtype=torch.uint64, device=device)]

    def _options(self, tile: Tile) -> dict[str, Any]:
        left, right = self.window or (None, None)
        return {"scale": factor(self.scale, tile.q), "window_size_left": left, "window_size_right": right}


def _width(tile: Tile) -> int:
    """One width for q, k and v."""
    widest = max(tile.q.shape[-1], tile.v.shape[-1])
    return widest + -widest % NUMBERS


def rows_of(x: Tensor, width: int | None = None) -> Tensor:
    """[g, heads, rows, d] -> [g, heads, rows, width], with zeros up to the width (that of x and what it lacks to a
    multiple, if None)."""
    d = x.shape[-1]
    lacking = -d % NUMBERS if width is None else width - d
    if lacking:
        return F.pad(x, (0, lacking))
    if x.stride(-1) != 1 or x.storage_offset() % NUMBERS or any(stride % NUMBERS for stride in x.stride()[:-1]):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def bias_rows(tile: Tile) -> Tensor | None:
    """The bias of the tile, expanded to [g, heads, rows, keys] by strides of 0."""
    q, k, bias = tile.q, tile.k, tile.bias
    if bias is None:
        return None
    keys = k.shape[2]
    step = bias.stride()[:-1]
    if (
        bias.dtype != q.dtype
        or bias.stride(-1) != 1
        or bias.shape[-1] != keys
        or bias.storage_offset() % BIASES
        or any(one % BIASES for one in step)
    ):
        room = torch.zeros(*bias.shape[:-1], keys + -keys % BIASES, dtype=q.dtype, device=q.device)
        bias = room[..., :keys].copy_(bias)
    return bias.expand(*q.shape[:3], keys)


def gradients_of(tile: Tile, found: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    of_q, of_k, of_v = (grad[..., : x.shape[-1]] for grad, x in zip(found, tile[:3], strict=False))
    return of_q, of_k, of_v


@contextlib.contextmanager
def _from(seed: int | None, device: torch.device) -> Iterator[None]:
    """The generator of the device set to the seed, and then back; left alone without one."""
    if seed is None:
        yield
        return
    generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]
    state = generator.get_state()
    generator.manual_seed(seed)
    yield
    generator.set_state(state)
