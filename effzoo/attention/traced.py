"""Tiles in compiled code: an operator that finds them when it runs, so that one graph serves every length."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from effzoo.attention.dropped import Weights
from effzoo.attention.kernel import Flash
from effzoo.attention.part import Kernel, Layout, Part


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
class Traced(Layout):
    """All heads of the core with this number, whose `parts` cuts the tiles from q, k, v and what the part is given."""

    number: int

    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = _forward(q, k, v, list(given), self.number, *_told(kernel))
        return found

    def backward(
        self, kernel: Kernel, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *given: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = _backward(grad, q, k, v, out, lse, list(given), self.number, *_told(kernel))
        return found

    def plain(self, part: Part) -> list[Part]:
        return [part]


def _told(kernel: Kernel) -> tuple[float | None, float, Tensor | None]:
    """Scale, dropout and seed."""
    if isinstance(kernel, Weights):
        assert isinstance(kernel.seed, Tensor)
        return kernel.scale, kernel.dropout, kernel.seed
    assert isinstance(kernel, Flash)
    return kernel.scale, 0.0, None


def _parts(
    number: int, q: Tensor, k: Tensor, v: Tensor, given: list[Tensor | None], scale: float | None, dropout: float, seed: Tensor | None
) -> Iterator[tuple[list[int], Part, Kernel]]:
    """Heads that are computed together, their part, and what computes it."""
    for index, (heads, part) in enumerate(_cores[number].parts(q, k, v, *given)):
        yield heads, part, Flash(scale) if seed is None else Weights(dropout, int(seed) + index * 2**20, 1.0 if scale is None else scale)


@torch.library.custom_op("effzoo::tiles", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, given: list[Tensor | None], number: int, scale: float | None, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    out, lse = v.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(*q.shape[:-1], 1, dtype=torch.promote_types(q.dtype, torch.float32))
    for heads, part, kernel in _parts(number, q, k, v, given, scale, dropout, seed):
        out[:, heads], lse[:, heads] = part.way.forward(kernel, part.q, part.k, part.v, *part.brought)
    return out, lse


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, given: list[Tensor | None], number: int, scale: float | None, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    return v.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(*q.shape[:-1], 1, dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("effzoo::tiles_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    given: list[Tensor | None],
    number: int,
    scale: float | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for heads, part, kernel in _parts(number, q, k, v, given, scale, dropout, seed):
        of_grad, of_out, of_lse = (x[:, heads] for x in (grad, out, lse))
        found = part.way.backward(kernel, of_grad, part.q, part.k, part.v, of_out, of_lse, *part.brought)
        for whole, own in zip(gradients, found, strict=True):
            whole[:, heads] = own
    return gradients  # type: ignore[return-value]


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    given: list[Tensor | None],
    number: int,
    scale: float | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
