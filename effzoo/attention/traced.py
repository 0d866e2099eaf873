"""Attention in compiled code: an operator that finds tiles and backend when it runs, so that one graph serves every length.

What torch's own operators say of strides is not what they give, so results here are dense.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from effzoo.attention.backends import choose, placed, readied
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


class Told(NamedTuple):
    """What the operators are told of the backend, in place of a kernel."""

    backend: str
    scale: float | None
    dropout: float


@dataclass(frozen=True)
class Traced(Layout):
    """A part as one operator: all heads of the core with this number, whose `parts` cuts it; or, for 0, one tile.

    In front of what the part is given stands the seed of the dropout, None without dropout.
    """

    number: int = 0
    causal: bool = False

    def bare(self, given: Sequence[Tensor | None]) -> bool:
        return True  # as far as is known: the operator asks again

    def forward(self, kernel: Kernel | Told, q: Tensor, k: Tensor, v: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        assert isinstance(kernel, Told)
        found: tuple[Tensor, Tensor] = _attention(q, k, v, list(given), self.number, self.causal, *kernel)
        return found

    def backward(
        self, kernel: Kernel | Told, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *given: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert isinstance(kernel, Told)
        found: tuple[Tensor, Tensor, Tensor] = _attention_backward(grad, out, lse, q, k, v, list(given), self.number, self.causal, *kernel)
        return found


def _parts(
    q: Tensor, k: Tensor, v: Tensor, given: list[Tensor | None], number: int, causal: bool, told: Told
) -> Iterator[tuple[list[int], Part, Layout, Kernel]]:
    """Heads that are computed together, their part, how it lies in tiles and what computes them."""
    seed, *given = given
    parts = _cores[number].parts(q, k, v, *given) if number else [(list(range(q.shape[1])), Part(q, k, v, given[0], causal))]
    for index, (heads, part) in enumerate(parts):
        part = replace(part, scale=told.scale)
        name, _ = choose((part,), told.dropout, told.backend)
        (part,) = readied((part,), name)
        yield heads, part, *placed(part, name, told.dropout, None if seed is None else int(seed) + index * 2**20)


@torch.library.custom_op("effzoo::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, given: list[Tensor | None], number: int, causal: bool, backend: str, scale: float | None, dropout: float
) -> tuple[Tensor, Tensor]:
    whole: tuple[Tensor, Tensor] | None = None
    for heads, part, layout, kernel in _parts(q, k, v, given, number, causal, Told(backend, scale, dropout)):
        found = layout.forward(kernel, part.q, part.k, part.v, *part.brought)
        if len(heads) == q.shape[1]:
            return found[0].contiguous(), found[1].contiguous()
        whole = whole or _result(q, v)
        for all_heads, own in zip(whole, found, strict=True):
            all_heads[:, heads] = own
    assert whole is not None
    return whole


def _result(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Room for an output and a log-sum-exp."""
    return v.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(*q.shape[:-1], 1, dtype=torch.promote_types(q.dtype, torch.float32))


@_attention.register_fake
def _(q, k, v, given, number, causal, backend, scale, dropout):  # type: ignore[no-untyped-def]
    return _result(q, v)


@torch.library.custom_op("effzoo::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, given: list[Tensor | None], number: int, causal: bool,
    backend: str, scale: float | None, dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    whole = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for heads, part, layout, kernel in _parts(q, k, v, given, number, causal, Told(backend, scale, dropout)):
        every = len(heads) == q.shape[1]
        of_grad, of_out, of_lse = (x if every else x[:, heads] for x in (grad, out, lse))
        found = layout.backward(kernel, of_grad, part.q, part.k, part.v, of_out, of_lse, *part.brought)
        if every:
            return tuple(x.contiguous() for x in found)  # type: ignore[return-value]
        for all_heads, own in zip(whole, found, strict=True):
            all_heads[:, heads] = own
    return whole  # type: ignore[return-value]


@_attention_backward.register_fake
def _(grad, out, lse, q, k, v, given, number, causal, backend, scale, dropout):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
