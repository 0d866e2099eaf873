"""Attention in compiled code: one operator that chooses tiles and backend when it runs, so that a graph serves every
length.

Its results are dense in memory: torch's own operators may return other strides than they announce.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effzoo.attention.backends import choose, prepared, tiling_and_kernel
from effzoo.attention.part import Gradients, Kernel, Part, Tiling, capped
from effzoo.devices import is_portable

_numbers = itertools.count(1)
_cores: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def number_of(core: Any) -> int:
    """A number by which the operators find a core, whose `part(q, k, v, *inputs)` cuts the tiles."""
    number = next(_numbers)
    _cores[number] = core
    return number


class BackendChoice(NamedTuple):
    """What the operators need to choose a kernel when they run."""

    backend: str
    scale: float | None
    dropout: float
    cap: float = 0.0


@dataclass(frozen=True)
class Traced(Tiling):
    """A part as one operator. number: of the core whose `part` cuts it; 0: one tile.

    Its first input is the seed of dropout, None without dropout; those of the part follow.
    """

    number: int = 0
    causal: bool = False

    def has_no_bias(self, inputs: Sequence[Tensor | None]) -> bool:
        return True  # not known yet: the operator asks again when it runs

    def forward(
        self, kernel: Kernel | BackendChoice, q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(kernel, BackendChoice)
        if is_portable() and self.number == 0:
            return _written_out(q, k, v, inputs[1], self.causal, kernel)
        result: tuple[Tensor, Tensor] = _attention(q, k, v, list(inputs), self.number, self.causal, *kernel)
        return result

    def backward(
        self, kernel: Kernel | BackendChoice, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        *inputs: Tensor | None,
    ) -> Gradients:  # fmt: skip
        assert isinstance(kernel, BackendChoice)
        gradients: Gradients = _attention_backward(
            grad, out, lse, q, k, v, list(inputs), self.number, self.causal, *kernel
        )
        return gradients


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, choice: BackendChoice
) -> tuple[Tensor, Tensor]:
    """One tile as its definition, and log sum exp of its scores."""
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if choice.scale is None else choice.scale)
    scores = capped(scores, choice.cap)
    scores = scores if bias is None else scores + bias
    if causal:
        n, s = scores.shape[-2:]
        earlier = torch.arange(s, device=q.device) <= torch.arange(n, device=q.device)[:, None]
        scores = scores.masked_fill(~earlier, -math.inf)
    lse = scores.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(dim=-1, keepdim=True)
    return scores.softmax(dim=-1) @ v, lse


def _tiled(
    q: Tensor, k: Tensor, v: Tensor, inputs: list[Tensor | None], number: int, causal: bool, choice: BackendChoice
) -> tuple[Part, Tiling, Kernel]:
    """The part, its tiling and the kernel."""
    seed, *inputs = inputs
    part = _cores[number].part(q, k, v, *inputs) if number else Part(q, k, v, inputs[0], causal)
    part = replace(part, scale=choice.scale, cap=choice.cap)
    name, _ = choose((part,), choice.dropout, choice.backend)
    (part,) = prepared((part,), name)
    return part, *tiling_and_kernel(part, name, choice.dropout, None if seed is None else int(seed))


@torch.library.custom_op("effzoo::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, inputs: list[Tensor | None], number: int, causal: bool,
    backend: str, scale: float | None, dropout: float, cap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    part, tiling, kernel = _tiled(q, k, v, inputs, number, causal, BackendChoice(backend, scale, dropout, cap))
    out, lse = tiling.forward(kernel, q, k, v, *part.tiling_inputs)
    return out.contiguous(), lse.contiguous()


@_attention.register_fake
def _(q, k, v, inputs, number, causal, backend, scale, dropout, cap):  # type: ignore[no-untyped-def]
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return v.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(*q.shape[:-1], 1, dtype=lse_dtype)


@torch.library.custom_op("effzoo::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, inputs: list[Tensor | None], number: int,
    causal: bool, backend: str, scale: float | None, dropout: float, cap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    part, tiling, kernel = _tiled(q, k, v, inputs, number, causal, BackendChoice(backend, scale, dropout, cap))
    gradients = tiling.backward(kernel, grad, q, k, v, out, lse, *part.tiling_inputs)
    grad_q, grad_k, grad_v = (x.contiguous() for x in gradients)
    return grad_q, grad_k, grad_v


@_attention_backward.register_fake
def _(grad, out, lse, q, k, v, inputs, number, causal, backend, scale, dropout, cap):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
