"""Full attention over ranks: keys and values travel around the ring, and each step is a part of the one softmax.

In step t rank r computes its queries with the keys of rank r - t (mod R), and passes these on to rank r + 1 meanwhile.
In the backward pass keys and values travel once more, and their gradients behind them, which are home after R steps
(Liu et al. 2023, Ring attention, arXiv:2310.01889, section 3). Each rank holds the keys of two ranks at a time.

Under a causal triangle, pieces in zigzag order give each rank the same work: in each step but the first, half of its
scores (Brandon et al. 2023, Striped attention, arXiv:2311.09431, balances them by stripes; the pieces r and 2 R - 1 - r
are those of Llama 3, arXiv:2407.21783, section 3.3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from effzoo.attention import kernel
from effzoo.attention.backends import choose, prepared, tiling_and_kernel
from effzoo.attention.part import Part
from effzoo.parallel.ranks import Split, started

EVERY = slice(None)
Seen = tuple[slice, slice, bool]  # queries, keys, and whether a query sees those up to its own alone


def ring(
    split: Split, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *others: Part, causal: bool, dropout: float,
    backend: str,
) -> Tensor:  # fmt: skip
    """softmax(q k^T / sqrt(d) + bias) v over the keys of all ranks and of the other parts, at this rank's positions.

    q [batch, heads, m, d]: of the m positions of this rank.
    k, v [batch, kv_heads, m, d]: each head for heads / kv_heads heads of queries.
    bias [batch, 1, 1, m]: of its keys, -inf at padding; None for none. The same on all ranks: a bias or none.
    others: parts that are here alone (the keys of a prefix, which every rank has).
    causal: positions see themselves and earlier ones; keys that all come later are passed over.
    """
    ready = prepared(others, choose(others, dropout, backend)[0]) if others else []
    plans = [tiling_and_kernel(part, choose((part,), dropout, backend)[0], dropout) for part in ready]
    tensors = [(part.q, part.k, part.v, *part.tiling_inputs) for part in ready]
    arguments = split, causal, dropout, backend, plans, [len(args) for args in tensors]
    return cast(Tensor, cast(Any, _Ring).apply(*arguments, q, k, v, bias, *(x for args in tensors for x in args)))


def seen(split: Split, source: int, causal: bool) -> Seen | None:
    """Which of this rank's queries see which keys of a source; None for none."""
    if not causal or source == split.rank:
        return EVERY, EVERY, causal
    if split.order == "contiguous":
        return (EVERY, EVERY, False) if source < split.rank else None
    if source < split.rank:  # its first piece comes before both of ours, its second one after both
        return EVERY, slice(split.bounds[source + 1] - split.bounds[source]), False
    return slice(split.bounds[split.rank + 1] - split.bounds[split.rank], None), EVERY, False


def _passing(split: Split, source: int, *tensors: Tensor | None) -> Callable[[], list[Any]]:
    """Begin to pass what is here of a source to the next rank; the function that is returned waits for what the rank
    before passes on.

    tensors: keys, values, and maybe their bias [batch, 1, 1, m].
    """
    after, before = (split.rank + 1) % split.ranks, (split.rank - 1) % split.ranks
    size, waits = split.size((source - 1) % split.ranks), []
    for x, dim in zip(tensors, (2, 2, 3), strict=False):
        if x is not None:
            pieces = [x if rank == after else x.narrow(dim, 0, 0) for rank in range(split.ranks)]
            shape = (*x.shape[:dim], size, *x.shape[dim + 1 :])
            shapes = [shape if rank == before else (0,) for rank in range(split.ranks)]
            waits.append(started(pieces, shapes, split.group, "ring"))
    return lambda: [wait()[before] for wait in waits] + [None] * (len(tensors) - len(waits))


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, split: Split, causal: bool, dropout: float, backend: str, plans: Any, counts: Any,
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *others: Any,
    ) -> Tensor:  # fmt: skip
        exact, group = torch.promote_types(q.dtype, torch.float32), q.shape[1] // k.shape[1]
        by_part = zip(plans, kernel.tensors_by_part(counts, others), strict=True)
        results = [_exact(tiling.forward(one, *args), exact) for (tiling, one), args in by_part]
        steps: dict[int, Any] = {}  # source -> what is seen, tiling and kernel, which holds the seed of its dropout
        keys, values, key_bias = k, v, bias
        for step in range(split.ranks):
            source = (split.rank - step) % split.ranks
            last = step + 1 == split.ranks
            wait = None if last else _passing(split, source, keys, values, key_bias)
            if (view := seen(split, source, causal)) is not None:
                queries, some, triangle = view
                some_bias = None if key_bias is None else key_bias[..., some]
                some_keys, some_values = (_for_queries(x[:, :, some], group) for x in (keys, values))
                part = Part(q[:, :, queries], some_keys, some_values, some_bias, causal=triangle)
                name, _ = choose((part,), dropout, backend)
                (part,) = prepared([part], name)
                tiling, one = tiling_and_kernel(part, name, dropout)
                steps[source] = view, tiling, one
                found = _exact(tiling.forward(one, part.q, part.k, part.v, *part.tiling_inputs), exact)
                if step == 0:
                    out, lse = kernel.merge(*results, found)
                else:
                    out[:, :, queries], lse[:, :, queries] = kernel.merge(
                        (out[:, :, queries], lse[:, :, queries]), found
                    )
            if wait is not None:
                keys, values, key_bias = wait()
        out = out.to(q.dtype)
        ctx.split, ctx.group, ctx.steps, ctx.plans, ctx.counts = split, group, steps, plans, counts
        ctx.save_for_backward(out, lse.masked_fill(lse == -math.inf, 0.0), q, k, v, bias, *others)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        split, group = ctx.split, ctx.group
        out, lse, q, k, v, bias, *others = ctx.saved_tensors
        exact = torch.promote_types(q.dtype, torch.float32)
        lse = lse.to(exact)
        grads: list[Tensor | None] = []
        for (tiling, one), (q_other, k_other, v_other, *inputs) in zip(
            ctx.plans, kernel.tensors_by_part(ctx.counts, others), strict=True
        ):
            of_part = tiling.backward(one, grad, q_other, k_other, v_other, out, lse, *inputs)
            grads += [*of_part, *(None for _ in inputs)]
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=exact) for x in (q, k, v))
        keys, values, key_bias = k, v, bias
        home: Callable[[], list[Any]] | None = None  # waits for the gradients of the source, from the ranks before
        for step in range(split.ranks):
            source = (split.rank - step) % split.ranks
            last = step + 1 == split.ranks
            wait = None if last else _passing(split, source, keys, values, key_bias)
            found = None
            if source in ctx.steps:
                (queries, some, _), tiling, one = ctx.steps[source]
                some_bias = None if key_bias is None else key_bias[..., some]
                some_keys, some_values = (_for_queries(x[:, :, some], group) for x in (keys, values))
                of_queries = (x[:, :, queries] for x in (grad, q, out, lse))
                some_grad, some_q, some_out, some_lse = of_queries
                of_q, *found = tiling.backward(
                    one, some_grad, some_q, some_keys, some_values, some_out, some_lse, some_bias
                )
                grad_q[:, :, queries] += of_q
            if home is not None:
                grad_k, grad_v = home()
            if found is not None:
                for total, of_keys in zip((grad_k, grad_v), found, strict=True):
                    total[:, :, some] += _of_heads(of_keys.to(exact), group)
            home = _passing(split, source, grad_k, grad_v)
            if wait is not None:
                keys, values, key_bias = wait()
        assert home is not None
        grad_k, grad_v = home()
        return *(None,) * 6, grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, *grads


def _exact(result: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a part; many steps are merged, so not in half precision."""
    return result[0].to(dtype), result[1].to(dtype)


def _for_queries(x: Tensor, group: int) -> Tensor:
    """[batch, kv_heads, m, d] -> [batch, heads, m, d], each head repeated for its group of queries."""
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def _of_heads(grad: Tensor, group: int) -> Tensor:
    """The adjoint of `_for_queries`."""
    return grad if group == 1 else grad.reshape(len(grad), -1, group, *grad.shape[2:]).sum(dim=2)
