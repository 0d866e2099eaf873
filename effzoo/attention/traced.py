"""Attention in compiled code: an operator that finds tiles and backend when it runs, so that one graph serves every
length.

What torch's own operators say of strides is not what they give, so results here are dense.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effzoo.attention.backends import choose, placed, readied
from effzoo.attention.part import Kernel, Layout, Part

_numbers = itertools.count(1)
_cores: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def number_of(core: Any) -> int:
    """A number under which the operators find this core, which says by `part(q, k, v, *given)` what is computed."""
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

    def forward(
        self, kernel: Kernel | Told, q: Tensor, k: Tensor, v: Tensor, *given: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(kernel, Told)
        found: tuple[Tensor, Tensor] = _attention(q, k, v, list(given), self.number, self.causal, *kernel)
        return found

    def backward(
        self,
        kernel: Kernel | Told,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *given: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert isinstance(kernel, Told)
        found: tuple[Tensor, Tensor, Tensor] = _attention_backward(
            grad, out, lse, q, k, v, list(given), self.number, self.causal, *kernel
        )
        return found


def _placed(
    q: Tensor, k: Tensor, v: Tensor, given: list[Tensor | None], number: int, causal: bool, told: Told
) -> tuple[Part, Layout, Kernel]:
    """The part, how it lies in tiles and what computes them."""
    seed, *given = given
    part = _cores[number].part(q, k, v, *given) if number else Part(q, k, v, given[0], causal)
    part = replace(part, scale=told.scale)
    name, _ = choose((part,), told.dropout, told.backend)
    (part,) = readied((part,), name)
    return part, *placed(part, name, told.dropout, None if seed is None else int(seed))


@torch.library.custom_op("effzoo::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: list[Tensor | None],
    number: int,
    causal: bool,
    backend: str,
    scale: float | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    part, layout, kernel = _placed(q, k, v, given, number, causal, Told(backend, scale, dropout))
    out, lse = layout.forward(kernel, q, k, v, *part.brought)
    return out.contiguous(), lse.contiguous()


@_attention.register_fake
def _(q, k, v, given, number, causal, backend, scale, dropout):  # type: ignore[no-untyped-def]
    return v.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(
        *q.shape[:-1], 1, dtype=torch.promote_types(q.dtype, torch.float32)
    )


@torch.library.custom_op("effzoo::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, given: list[Tensor | None], number: int,
    causal: bool, backend: str, scale: float | None, dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    part, layout, kernel = _placed(q, k, v, given, number, causal, Told(backend, scale, dropout))
    of_q, of_k, of_v = layout.backward(kernel, grad, q, k, v, out, lse, *part.brought)
    return of_q.contiguous(), of_k.contiguous(), of_v.contiguous()


@_attention_backward.register_fake
def _(grad, out, lse, q, k, v, given, number, causal, backend, scale, dropout):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
