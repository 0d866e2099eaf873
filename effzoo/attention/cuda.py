"""Tiles by torch's operators for CUDA: memory-efficient attention, and flash attention, which takes no bias.

Their backward passes compute exp(S - lse) and rowsum(dO * out) from the lse and out that they are given, so that the
merged ones give the gradients of a part (see `kernel.py`). Their demands on memory are met here: strides of a multiple
of 8 numbers, of 16 for a bias; in the backward pass an `out` that is dense as [g, m, heads, d], and a log-sum-exp of a
multiple of 32 queries.
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

NUMBERS, BIASES, QUERIES = 8, 16, 32
_efficient = torch.ops.aten._scaled_dot_product_efficient_attention
_efficient_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward
_flash = torch.ops.aten._flash_attention_forward
_flash_backward = torch.ops.aten._flash_attention_backward


@dataclass(frozen=True, eq=False)
class _Drawing:
    """Dropout that the operators draw from the generator of the device.

    seed: to which the generator is set before each tile (in compiled code); None: it is left as it is.
    drawn: seed and offset of each tile, from which the backward pass draws the same.
    """

    scale: float | None
    dropout: float = 0.0
    seed: int | None = None
    drawn: dict[int, list[Tensor]] = field(default_factory=dict)

    def run(
        self, index: int, device: torch.device, operator: Callable[..., Any], *given: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of a tile, by an operator."""
        with _from(None if self.seed is None else self.seed + index, device):
            out, lse, *drawn = operator(*given, **options)
        if self.dropout:
            self.drawn[index] = drawn[:2]
        return out, lse


class Efficient(_Drawing):
    """A tile by the memory-efficient operators."""

    def forward(self, tile: Tile, index: int) -> tuple[Tensor, Tensor]:
        q, k, v = (aligned(x) for x in tile[:3])
        given = q, k, v, aligned_bias(tile), True, self.dropout, tile.causal
        out, lse = self.run(index, q.device, _efficient, *given, scale=factor(self.scale, tile.q))
        return out[..., : tile.v.shape[-1]], lse_of(tile, lse[..., : q.shape[2]])

    def backward(self, tile: Tile, index: int, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v = (aligned(x) for x in (grad, *tile[:3]))
        # the operator ignores some strides of `out`
        out = aligned(out).transpose(1, 2).contiguous().transpose(1, 2)
        lse = F.pad(lse, (0, -lse.shape[-1] % QUERIES), value=math.inf).contiguous()
        if self.dropout and self.seed is None:
            drawn = self.drawn[index]
        else:
            drawn = [torch.tensor((self.seed or 0) + index), torch.tensor(0)]
        options = self.dropout, [True, True, True, False], tile.causal
        gradients = _efficient_backward(
            grad, q, k, v, aligned_bias(tile), out, lse, *drawn, *options, scale=factor(self.scale, tile.q)
        )
        return gradients_of(tile, gradients)


@dataclass(frozen=True, eq=False)
class FlashCuda(_Drawing):
    """A tile without bias by the flash operators. window: keys before and after itself that a query sees; None: all."""

    window: tuple[int, int] | None = None

    def forward(self, tile: Tile, index: int) -> tuple[Tensor, Tensor]:
        q, k, v = (aligned(x, _width(tile)).transpose(1, 2) for x in tile[:3])
        out, lse = self.run(
            index, q.device, _flash, q, k, v, None, None, *self._sizes(tile), False, **self._options(tile)
        )
        return out.transpose(1, 2)[..., : tile.v.shape[-1]], lse

    def backward(self, tile: Tile, index: int, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v, out = (aligned(x, _width(tile)).transpose(1, 2) for x in (grad, *tile[:3], out))
        drawn = self.drawn[index] if self.dropout and self.seed is None else self._state(index, q.device)
        gradients = _flash_backward(
            grad, q, k, v, out, lse.contiguous(), None, None, *self._sizes(tile), *drawn, **self._options(tile)
        )
        return gradients_of(tile, [x.transpose(1, 2) for x in gradients])

    def _sizes(self, tile: Tile) -> tuple[int, int, float, bool]:
        """Queries, keys, dropout, and whether it is causal."""
        return tile.q.shape[2], tile.k.shape[2], self.dropout, tile.causal

    def _state(self, index: int, device: torch.device) -> list[Tensor]:
        """Seed and offset of a generator that was set to the seed of the tile; the second tensor is not used."""
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


def aligned(x: Tensor, width: int | None = None) -> Tensor:
    """x [g, heads, m, d] with aligned strides, padded with zeros to the width (None: to a multiple of 8)."""
    d = x.shape[-1]
    lacking = -d % NUMBERS if width is None else width - d
    if lacking:
        return F.pad(x, (0, lacking))
    if x.stride(-1) != 1 or x.storage_offset() % NUMBERS or any(stride % NUMBERS for stride in x.stride()[:-1]):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def aligned_bias(tile: Tile) -> Tensor | None:
    """The bias of the tile with aligned strides, expanded to [g, heads, m, s]."""
    q, k, bias = tile.q, tile.k, tile.bias
    if bias is None:
        return None
    keys = k.shape[2]
    *strides, last = bias.stride()
    is_aligned = last == 1 and not any(number % BIASES for number in (bias.storage_offset(), *strides))
    if bias.dtype != q.dtype or bias.shape[-1] != keys or not is_aligned:
        room = torch.zeros(*bias.shape[:-1], keys + -keys % BIASES, dtype=q.dtype, device=q.device)
        bias = room[..., :keys].copy_(bias)
    return bias.expand(*q.shape[:3], keys)


def gradients_of(tile: Tile, padded: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v without the padding of their width."""
    grad_q, grad_k, grad_v = (grad[..., : x.shape[-1]] for grad, x in zip(padded, tile[:3], strict=False))
    return grad_q, grad_k, grad_v


@contextlib.contextmanager
def _from(seed: int | None, device: torch.device) -> Iterator[None]:
    """Inside, the generator of the device starts from the seed; afterwards it is as before. None: nothing is set."""
    if seed is None:
        yield
        return
    generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]
    state = generator.get_state()
    generator.manual_seed(seed)
    yield
    generator.set_state(state)
