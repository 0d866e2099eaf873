"""The one softmax: attention over the keys of several parts together, in O(n) memory, forward and backward exact.

A part is some keys for the queries (a window, a few global tokens, a prefix). A fused kernel computes each part, tile
by tile, and returns its output and log-sum-exp; `merge` makes of them the softmax over all keys,

    L = log sum_i exp(lse_i),     out = sum_i exp(lse_i - L) out_i,

as FlashAttention merges its tiles (Dao et al. 2022, arXiv:2205.14135, section 3.1). The merge needs no gradient of its
own: with P = exp(S_i - L), the derivative dS_i = P * (dO V_i^T - rowsum(dO * out)) takes the merged out and L, so the
backward pass of each part is given these (as in ring attention, Liu et al. 2023, arXiv:2310.01889).

`backends.py` chooses the kernel; `_plain` is the readable form of all kernels, and tests hold them equal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from effzoo.attention import flex
from effzoo.attention.backends import BACKENDS, choose, drawn_seed, prepared, tiling_and_kernel
from effzoo.attention.part import DisjointTiling, Part, Tile, capped, factor
from effzoo.attention.traced import BackendChoice, Traced
from effzoo.devices import without_autocast
from effzoo.errors import InputError

__all__ = ["BACKENDS", "attend", "attended", "choose", "merge"]


def attend(*parts: Part, dropout: float = 0.0, backend: str = "auto") -> Tensor:
    """softmax(scale q k^T + bias) v over the keys of all parts together, [batch, heads, n, e]; scores of a part with a
    cap are bounded by it before the bias.

    A query without keys gets 0.

    dropout: probability of dropping an attention weight.
    backend: a name of BACKENDS; `choose` says what "auto" is here. Raises OptionError where a named one cannot run.
    """
    return attended(*parts, dropout=dropout, backend=backend)[0]


def attended(*parts: Part, dropout: float = 0.0, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`attend`, and the log-sum-exp [batch, heads, n, 1], -inf for a query without keys; it has no gradient."""
    if not parts:
        raise InputError("attention is over the keys of at least one part; give attend a Part")
    name, _ = choose(parts, dropout, backend)
    if name == "reference" and not any(isinstance(part.tiling, Traced) for part in parts):
        with without_autocast(parts[0].q):  # which would round the scores
            return _plain([piece for part in parts for piece in part.tiling_or_one.disjoint(part)], dropout)
    if name == "flex":
        outs, lses = zip(*(flex.attention(part) for part in parts), strict=True)
        lse = _lse(torch.cat(lses, dim=-1))
        weights = [(part_lse - lse.clamp(min=torch.finfo(lse.dtype).min)).exp().to(outs[0].dtype) for part_lse in lses]
        return torch.stack([out * weight for out, weight in zip(outs, weights, strict=True)]).sum(dim=0), lse.detach()
    if not torch.compiler.is_compiling():
        parts = tuple(prepared(parts, name))
    # parts may share their queries, but compiled code takes each tensor once
    queries = [p.q.view_as(p.q) if any(p.q is other.q for other in parts[:i]) else p.q for i, p in enumerate(parts)]
    tensors = [(q, p.k, p.v, *p.tiling_inputs) for q, p in zip(queries, parts, strict=True)]
    plans: list[Any]  # (tiling, kernel) of each part
    if torch.compiler.is_compiling():
        if any(part.tiling is not None and not isinstance(part.tiling, Traced) for part in parts):
            raise InputError(
                "compiled code finds tiles when it runs; give attend parts with a tiling of their own in eager code"
            )
        plans = [
            (part.tiling or Traced(causal=part.causal), BackendChoice(backend, part.scale, dropout, part.cap))
            for part in parts
        ]
        tensors = [(q, k, v, drawn_seed() if dropout else None, *inputs) for q, k, v, *inputs in tensors]
    else:
        plans = [tiling_and_kernel(part, name, dropout) for part in parts]
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():  # `_Merged.forward` without its overhead
        return merge(*(tiling.forward(kernel, *args) for (tiling, kernel), args in zip(plans, tensors, strict=True)))
    return _merged(plans, [len(args) for args in tensors], *(x for args in tensors for x in args))


def merge(*results: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Outputs [..., n, d] and log-sum-exps [..., n, 1] of parts -> those of the softmax over all their keys."""
    if len(results) == 1:
        return results[0]
    if torch.compiler.is_compiling():
        return _opaque_merge([out for out, _ in results], [lse for _, lse in results])
    return _merge([out for out, _ in results], [lse for _, lse in results])


def _merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    lse = torch.stack(lses).logsumexp(dim=0)
    finite = lse.masked_fill(lse == -math.inf, 0.0)
    weights = [(part_lse - finite).exp().to(outs[0].dtype) for part_lse in lses]
    out = outs[0] * weights[0]
    for part_out, weight in zip(outs[1:], weights[1:], strict=True):
        out.addcmul_(part_out, weight)
    return out, lse


@torch.library.custom_op("effzoo::merge", mutates_args=())
def _opaque_merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """`_merge` in compiled code: inductor of torch 2.13 would sum the parts in a buffer that is still read."""
    out, lse = _merge(outs, lses)
    return out.contiguous(), lse.contiguous()


@_opaque_merge.register_fake
def _(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


class _Merged(torch.autograd.Function):
    """`attended` with gradients: parts forward, `merge`, parts backward with the merged out and log-sum-exp."""

    @staticmethod
    def forward(ctx, plans, counts, *tensors):  # type: ignore[no-untyped-def]
        by_part = zip(plans, tensors_by_part(counts, tensors), strict=True)
        out, lse = merge(*(tiling.forward(kernel, *args) for (tiling, kernel), args in by_part))
        ctx.plans, ctx.counts = plans, counts
        ctx.save_for_backward(out, lse.masked_fill(lse == -math.inf, 0.0), *tensors)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        out, lse, *tensors = ctx.saved_tensors
        lse = lse.to(torch.promote_types(lse.dtype, torch.float32))
        grads: list[Tensor | None] = []
        for (tiling, kernel), (q, k, v, *inputs) in zip(ctx.plans, tensors_by_part(ctx.counts, tensors), strict=True):
            grads += [*tiling.backward(kernel, grad, q, k, v, out, lse, *inputs), *(None for _ in inputs)]
        return None, None, *grads


_merged: Callable[..., tuple[Tensor, Tensor]] = _Merged.apply


def tensors_by_part(counts: Sequence[int], tensors: Sequence[Any]) -> list[Sequence[Any]]:
    """The tensors of each part: q, k, v and the inputs of its tiling."""
    ends = list(itertools.accumulate(counts))
    return [tensors[end - count : end] for count, end in zip(counts, ends, strict=True)]


def _plain(parts: Sequence[Part], dropout: float) -> tuple[Tensor, Tensor]:
    """`attended` with the scores written out, in float32 or better; O(m s) memory, differentiated by autograd."""
    tilings = [cast(DisjointTiling, part.tiling_or_one) for part in parts]
    tiles = [
        list(tiling.tiles(part.q, part.k, part.v, part.tiling_inputs))
        for part, tiling in zip(parts, tilings, strict=True)
    ]
    scores = [
        [_score(tile, part.scale, part.cap) for tile in part_tiles]
        for part, part_tiles in zip(parts, tiles, strict=True)
    ]
    lses = [
        tiling.join([_lse(score) for score in part_scores], -math.inf)
        for tiling, part_scores in zip(tilings, scores, strict=True)
    ]
    lse = _lse(torch.cat(lses, dim=-1))
    finite = lse.clamp(min=torch.finfo(lse.dtype).min)
    out: Tensor | int = 0
    for tiling, part_tiles, part_scores in zip(tilings, tiles, scores, strict=True):
        outs = []
        for tile, score, tile_lse in zip(part_tiles, part_scores, tiling.split(finite), strict=True):
            weights = F.dropout((score - tile_lse).exp(), dropout)
            outs.append(weights @ tile.v.to(weights.dtype))
        out = out + tiling.join(outs)
    return cast(Tensor, out).to(parts[0].v.dtype), lse.detach()


def _score(tile: Tile, scale: float | None, cap: float) -> Tensor:
    """scale q k^T + bias of a tile, with a cap below the bias."""
    exact = torch.promote_types(tile.q.dtype, torch.float32)
    score = capped(tile.q.to(exact) @ tile.k.to(exact).mT * factor(scale, tile.q), cap)
    if tile.bias is not None:
        score = score + tile.bias.to(exact)
    if tile.causal:
        later = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).triu(1)
        score = score.masked_fill(later, -math.inf)
    return score


def _lse(score: Tensor) -> Tensor:
    """log sum exp over the last axis, which stays; -inf where all are -inf, with gradient 0 instead of NaN."""
    top = score.detach().amax(dim=-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)
    total = (score - top).exp().sum(dim=-1, keepdim=True)
    return total.clamp(min=torch.finfo(total.dtype).tiny).log().masked_fill(total == 0, -math.inf) + top
