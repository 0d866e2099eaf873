"""Full attention over ranks: keys and values travel around the ring, and each step is a part of the one softmax.

In step t rank r computes its queries with the keys of rank r - t (mod R) and passes them on to rank r + 1. In the
backward pass keys and values travel once more, with their gradients, which come home after R steps (Liu et al. 2023,
Ring attention, arXiv:2310.01889, section 3). Each rank holds the keys of two ranks at a time, never all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from effzoo.attention import kernel
from effzoo.attention.backends import choose, prepared, tiling_and_kernel
from effzoo.attention.part import Part
from effzoo.parallel.ranks import Split, exchange


def ring(
    split: Split, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *others: Part, causal: bool, dropout: float,
    backend: str,
) -> Tensor:  # fmt: skip
    """softmax(q k^T / sqrt(d) + bias) v over the keys of all ranks and of the other parts, at this rank's positions.

    q, k, v [batch, heads, m, d]: of the m positions of this rank.
    bias [batch, 1, 1, m]: of its keys, -inf at padding; None for none. The same on all ranks: a bias or none.
    others: parts that are here alone (the keys of a prefix, which every rank has).
    causal: positions see themselves and earlier ones; ranks whose keys all come later are passed over.
    """
    ready = prepared(others, choose(others, dropout, backend)[0]) if others else []
    plans = [tiling_and_kernel(part, choose((part,), dropout, backend)[0], dropout) for part in ready]
    tensors = [(part.q, part.k, part.v, *part.tiling_inputs) for part in ready]
    arguments = split, causal, dropout, backend, plans, [len(args) for args in tensors]
    return cast(Tensor, cast(Any, _Ring).apply(*arguments, q, k, v, bias, *(x for args in tensors for x in args)))


def _passed(split: Split, source: int, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What the rank before this one holds, of the source before `source`; ours goes to the rank after this one."""
    after, before = (split.rank + 1) % split.ranks, (split.rank - 1) % split.ranks
    first, end = split.range((source - 1) % split.ranks)
    received: list[Tensor | None] = []
    for x in tensors:
        if x is None:
            received.append(None)
            continue
        dim = x.ndim - 1 if x.shape[-2] == 1 and x.ndim == 4 and x.shape[1] == 1 else x.ndim - 2
        shape = (*x.shape[:dim], end - first, *x.shape[dim + 1 :])
        nothing = x.narrow(dim, 0, 0)
        pieces = [x if rank == after else nothing for rank in range(split.ranks)]
        shapes = [shape if rank == before else (0,) for rank in range(split.ranks)]
        received.append(exchange(pieces, shapes, split.group, "ring")[before])
    return received


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, split: Split, causal: bool, dropout: float, backend: str, plans: Any, counts: Any,
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *others: Any,
    ) -> Tensor:  # fmt: skip
        by_part = zip(plans, kernel.tensors_by_part(counts, others), strict=True)
        results = [tiling.forward(one, *args) for (tiling, one), args in by_part]
        steps: dict[int, Any] = {}  # source -> (tiling, kernel) of its keys, which holds the seed of its dropout
        keys, values, key_bias = k, v, bias
        for step in range(split.ranks):
            source = (split.rank - step) % split.ranks
            if not (causal and source > split.rank):
                part = Part(q, keys, values, key_bias, causal=causal and source == split.rank)
                name, _ = choose((part,), dropout, backend)
                (part,) = prepared([part], name)
                steps[source] = tiling_and_kernel(part, name, dropout)
                tiling, one = steps[source]
                results = [kernel.merge(*results, tiling.forward(one, q, keys, values, *part.tiling_inputs))]
            if step + 1 < split.ranks:
                keys, values, key_bias = cast(Any, _passed(split, source, (keys, values, key_bias)))
        out, lse = results[0]
        ctx.split, ctx.causal, ctx.steps, ctx.plans, ctx.counts = split, causal, steps, plans, counts
        ctx.save_for_backward(out, lse.masked_fill(lse == -math.inf, 0.0), q, k, v, bias, *others)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        split = ctx.split
        out, lse, q, k, v, bias, *others = ctx.saved_tensors
        lse = lse.to(torch.promote_types(lse.dtype, torch.float32))
        grads: list[Tensor | None] = []
        for (tiling, one), (q_other, k_other, v_other, *inputs) in zip(
            ctx.plans, kernel.tensors_by_part(ctx.counts, others), strict=True
        ):
            of_part = tiling.backward(one, grad, q_other, k_other, v_other, out, lse, *inputs)
            grads += [*of_part, *(None for _ in inputs)]
        grad_q = torch.zeros_like(q)
        moving: list[Any] = [k, v, bias, torch.zeros_like(k), torch.zeros_like(v)]
        for step in range(split.ranks):
            source = (split.rank - step) % split.ranks
            keys, values, key_bias, grad_k, grad_v = moving
            if source in ctx.steps:
                tiling, one = ctx.steps[source]
                of_q, of_k, of_v = tiling.backward(one, grad, q, keys, values, out, lse, key_bias)
                grad_q, moving[3], moving[4] = grad_q + of_q, grad_k + of_k, grad_v + of_v
            moving = _passed(split, source, moving)
        return *(None,) * 6, grad_q, moving[3], moving[4], None, *grads
