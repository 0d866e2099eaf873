"""Attention in compiled code: operators that find tiles and backend when they run, so that one graph serves every length.

What torch's own operators say of strides is not what they give, so results here are dense.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from effzoo.attention.backends import choose, placed
from effzoo.attention.part import Kernel, Layout, Part, Tile


class Parts(Protocol):
    """A core that says what is computed."""

    def parts(self, q: Tensor, k: Tensor, v: Tensor, *given: Tensor | None) -> Iterable[tuple[list[int], Part]]:
        """Heads that are computed together, and their part."""


_numbers = itertools.count(1)
_cores: weakref.WeakValueDictionary[int, Parts] = weakref.WeakValueDictionary()


def number_of(core: Parts) -> int:
    """A number under which the operators find this core."""
    number = next(_numbers)
    _cores[number] = core
    return number


@dataclass(frozen=True)
class Opaque:
    """A tile as one operator."""

    backend: str
    scale: float | None
    dropout: float = 0.0
    seed: Tensor | None = None

    @property
    def told(self) -> tuple[str, float | None, float, Tensor | None]:
        """What its operators are told of it."""
        return self.backend, self.scale, self.dropout, self.seed

    def forward(self, tile: Tile, index: int) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = _tile(*tile, index, *self.told)
        return found

    def backward(self, tile: Tile, index: int, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = _tile_backward(grad, out, lse, *tile, index, *self.told)
        return found


@dataclass(frozen=True)
class Seeded(Layout):
    """A layout in compiled code with dropout, whose part brings the seed in front of the rest."""

    way: Layout

    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        assert isinstance(kernel, Opaque)
        return self.way.forward(replace(kernel, seed=given[0]), q, k, v, *given[1:])

    def backward(
        self, kernel: Kernel, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *given: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert isinstance(kernel, Opaque)
        return self.way.backward(replace(kernel, seed=given[0]), grad, q, k, v, out, lse, *given[1:])


@dataclass(frozen=True)
class Traced(Layout):
    """All heads of the core with this number, whose `parts` cuts the tiles from q, k, v and what the part is given, as one operator."""

    number: int

    def bare(self, given: Sequence[Tensor | None]) -> bool:
        return True  # as far as is known: the operator asks again

    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        assert isinstance(kernel, Opaque)
        found: tuple[Tensor, Tensor] = _tiles(q, k, v, list(given), self.number, *kernel.told)
        return found

    def backward(
        self, kernel: Kernel, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *given: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert isinstance(kernel, Opaque)
        found: tuple[Tensor, Tensor, Tensor] = _tiles_backward(grad, out, lse, q, k, v, list(given), self.number, *kernel.told)
        return found


def _placed(part: Part, backend: str, dropout: float, seed: Tensor | None, index: int = 0) -> tuple[Layout, Kernel]:
    name, _ = choose((part,), dropout, backend)
    return placed(part, name, dropout, None if seed is None else int(seed) + index * 2**20)


def _result(q: Tensor, v: Tensor, *one: int) -> tuple[Tensor, Tensor]:
    """Room for an output and a log-sum-exp."""
    return v.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(*q.shape[:-1], *one, dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("effzoo::tile", mutates_args=())
def _tile(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool,
    index: int, backend: str, scale: float | None, dropout: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tile = Tile(q.contiguous(), k.contiguous(), v.contiguous(), bias, causal)
    _, kernel = _placed(Part(q, k, v, bias, causal, scale), backend, dropout, seed)
    out, lse = kernel.forward(tile, index)
    return out.contiguous(), lse.contiguous()


@_tile.register_fake
def _(q, k, v, bias, causal, index, backend, scale, dropout, seed):  # type: ignore[no-untyped-def]
    return _result(q, v)


@torch.library.custom_op("effzoo::tile_backward", mutates_args=())
def _tile_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool,
    index: int, backend: str, scale: float | None, dropout: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tile = Tile(q.contiguous(), k.contiguous(), v.contiguous(), bias, causal)
    _, kernel = _placed(Part(q, k, v, bias, causal, scale), backend, dropout, seed)
    found = kernel.backward(tile, index, grad.contiguous(), out.contiguous(), lse.contiguous())
    return found[0].contiguous(), found[1].contiguous(), found[2].contiguous()


@_tile_backward.register_fake
def _(grad, out, lse, q, k, v, bias, causal, index, backend, scale, dropout, seed):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _own(
    number: int, q: Tensor, k: Tensor, v: Tensor, given: list[Tensor | None], backend: str, scale: float | None, dropout: float, seed: Tensor | None
) -> Iterator[tuple[list[int], Part, Layout, Kernel]]:
    """Heads that are computed together, their part, how it lies in tiles and what computes them."""
    for index, (heads, part) in enumerate(_cores[number].parts(q, k, v, *given)):
        yield heads, part, *_placed(replace(part, scale=scale), backend, dropout, seed, index)


@torch.library.custom_op("effzoo::tiles", mutates_args=())
def _tiles(
    q: Tensor, k: Tensor, v: Tensor, given: list[Tensor | None], number: int,
    backend: str, scale: float | None, dropout: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _result(q, v, 1)
    for heads, part, way, kernel in _own(number, q, k, v, given, backend, scale, dropout, seed):
        out[:, heads], lse[:, heads] = way.forward(kernel, part.q, part.k, part.v, *part.brought)
    return out, lse


@_tiles.register_fake
def _(q, k, v, given, number, backend, scale, dropout, seed):  # type: ignore[no-untyped-def]
    return _result(q, v, 1)


@torch.library.custom_op("effzoo::tiles_backward", mutates_args=())
def _tiles_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, given: list[Tensor | None], number: int,
    backend: str, scale: float | None, dropout: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for heads, part, way, kernel in _own(number, q, k, v, given, backend, scale, dropout, seed):
        of_grad, of_out, of_lse = (x[:, heads] for x in (grad, out, lse))
        found = way.backward(kernel, of_grad, part.q, part.k, part.v, of_out, of_lse, *part.brought)
        for whole, own in zip(gradients, found, strict=True):
            whole[:, heads] = own
    return gradients  # type: ignore[return-value]


@_tiles_backward.register_fake
def _(grad, out, lse, q, k, v, given, number, backend, scale, dropout, seed):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
