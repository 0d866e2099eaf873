"""The one softmax: attention over the union of several parts' keys, in O(n) memory, exact forward and backward.

A part is a choice of keys for the queries. Each part runs tile by tile in a fused kernel and returns its output and
log-sum-exp;
`merge` combines them into the softmax over all keys together,

    L = log sum_i exp(lse_i),     out = sum_i exp(lse_i - L) out_i,

which is how FlashAttention merges its tiles (Dao et al. 2022, arXiv:2205.14135, section 3.1). No gradient flows
through the merge weights: with P = exp(S_i - L) the derivative dS_i = P * (dO V_i^T - rowsum(dO * out)) needs only the
*merged* out and L, so each part's backward pass runs with those (as ring attention does, Liu et al. 2023,
arXiv:2310.01889).

What computes a tile is chosen in `backends.py`; `_plain` is the readable twin of all, and tests hold them equal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from effzoo.attention import flex
from effzoo.attention.backends import BACKENDS, choose, drawn_seed, placed, readied
from effzoo.attention.part import Cut, Part, Tile, factor
from effzoo.attention.traced import Told, Traced
from effzoo.errors import InputError

__all__ = ["BACKENDS", "attend", "attended", "choose", "merge"]


def attend(*parts: Part, dropout: float = 0.0, backend: str = "auto") -> Tensor:
    """softmax(scale q k^T + bias) v over the keys of all parts together, [batch, heads, n, e].

    A query that may attend to nothing returns 0. `dropout` is the probability of dropping an attention weight.
    `choose` says which backend "auto" is; a named backend that cannot run here raises OptionError.
    """
    return attended(*parts, dropout=dropout, backend=backend)[0]


def attended(*parts: Part, dropout: float = 0.0, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`attend`, and the log-sum-exp [batch, heads, n, 1] without gradient, -inf for a query that attended to
    nothing."""
    if not parts:
        raise InputError("attention is over the keys of at least one part; give attend a Part")
    name, _ = choose(parts, dropout, backend)
    if name == "reference" and not any(isinstance(part.layout, Traced) for part in parts):
        device = parts[0].q.device.type
        # which would round the scores
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            return _plain(tuple(one for part in parts for one in part.way.plain(part)), dropout)
    if name == "flex":
        outs, lses = zip(*(flex.attention(part) for part in parts), strict=True)
        lse = _lse(torch.cat(lses, dim=-1))
        weights = [(one - lse.clamp(min=torch.finfo(lse.dtype).min)).exp().to(outs[0].dtype) for one in lses]
        return torch.stack([out * weight for out, weight in zip(outs, weights, strict=True)]).sum(dim=0), lse.detach()
    if not torch.compiler.is_compiling():
        parts = tuple(readied(parts, name))
    # parts may share their queries, but compiled code takes each tensor once
    queries = [p.q.view_as(p.q) if any(p.q is other.q for other in parts[:i]) else p.q for i, p in enumerate(parts)]
    tensors = [(q, p.k, p.v, *p.brought) for q, p in zip(queries, parts, strict=True)]
    if torch.compiler.is_compiling():
        if any(part.layout is not None and not isinstance(part.layout, Traced) for part in parts):
            raise InputError(
                "compiled code finds tiles when it runs; give attend parts with a layout of their own in eager code"
            )
        ways: list[Any] = [
            (part.layout or Traced(causal=part.causal), Told(backend, part.scale, dropout)) for part in parts
        ]
        tensors = [(q, k, v, drawn_seed() if dropout else None, *given) for q, k, v, *given in tensors]
    else:
        ways = [placed(part, name, dropout) for part in parts]
    # as the first line of `_Merged`, without its cost
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return merge(*(way.forward(kernel, *own) for (way, kernel), own in zip(ways, tensors, strict=True)))
    found: tuple[Tensor, Tensor] = _Merged.apply(
        ways, [len(each) for each in tensors], *(x for each in tensors for x in each)
    )  # type: ignore[no-untyped-call]
    return found


def merge(*results: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Outputs [..., n, d] and log-sum-exps [..., n, 1] of parts -> those of the softmax over the union of their
    keys."""
    if len(results) == 1:
        return results[0]
    if torch.compiler.is_compiling():
        return _opaque_merge([out for out, _ in results], [lse for _, lse in results])
    return _merge([out for out, _ in results], [lse for _, lse in results])


def _merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    lse = torch.stack(lses).logsumexp(dim=0)
    finite = lse.masked_fill(lse == -math.inf, 0.0)
    weights = [(part - finite).exp().to(outs[0].dtype) for part in lses]
    out = outs[0] * weights[0]
    for part, weight in zip(outs[1:], weights[1:], strict=True):
        out.addcmul_(part, weight)
    return out, lse


@torch.library.custom_op("effzoo::merge", mutates_args=())
def _opaque_merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """`_merge` for compiled graphs: inductor of torch 2.13 else adds the parts up in the buffer of one that is still
    read."""
    out, lse = _merge(outs, lses)
    return out.contiguous(), lse.contiguous()


@_opaque_merge.register_fake
def _(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


class _Merged(torch.autograd.Function):
    """`attended` tile by tile: parts forward, `merge`, parts backward with the merged out and log-sum-exp."""

    @staticmethod
    def forward(ctx, ways, counts, *tensors):  # type: ignore[no-untyped-def]
        out, lse = merge(
            *(
                layout.forward(kernel, *own)
                for (layout, kernel), own in zip(ways, _by_part(counts, tensors), strict=True)
            )
        )
        ctx.ways, ctx.counts = ways, counts
        ctx.save_for_backward(out, lse.masked_fill(lse == -math.inf, 0.0), *tensors)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        out, lse, *tensors = ctx.saved_tensors
        lse = lse.to(torch.promote_types(lse.dtype, torch.float32))
        grads: list[Tensor | None] = []
        for (layout, kernel), (q, k, v, *given) in zip(ctx.ways, _by_part(ctx.counts, tensors), strict=True):
            grads += [*layout.backward(kernel, grad, q, k, v, out, lse, *given), *(None for _ in given)]
        return None, None, *grads


def _by_part(counts: Sequence[int], tensors: Sequence[Any]) -> list[Sequence[Any]]:
    """q, k, v and the biases of every part."""
    ends = list(itertools.accumulate(counts))
    return [tensors[end - count : end] for count, end in zip(counts, ends, strict=True)]


def _plain(parts: tuple[Part, ...], dropout: float) -> tuple[Tensor, Tensor]:
    """`attended` with the scores written out, in float32 or better; O(m s) memory, differentiable by autograd alone."""
    cuts = [cast(Cut, part.way) for part in parts]
    tiles = [list(cut.tiles(part.q, part.k, part.v, part.brought)) for part, cut in zip(parts, cuts, strict=True)]
    scores = [[_score(tile, part.scale) for tile in own] for part, own in zip(parts, tiles, strict=True)]
    lse = torch.stack(
        [cut.join([_lse(score) for score in own], -math.inf) for cut, own in zip(cuts, scores, strict=True)]
    )
    lse = _lse(lse.movedim(0, -1)).squeeze(-1)
    out: Tensor | int = 0
    for cut, of_part, own in zip(cuts, tiles, scores, strict=True):
        rows = cut.rows(lse.clamp(min=torch.finfo(lse.dtype).min))
        weights = [F.dropout((score - of_rows).exp(), dropout) for score, of_rows in zip(own, rows, strict=True)]
        out = out + cut.join([weight @ tile.v.to(weight.dtype) for weight, tile in zip(weights, of_part, strict=True)])
    return cast(Tensor, out).to(parts[0].v.dtype), lse.detach()


def _score(tile: Tile, scale: float | None) -> Tensor:
    """scale q k^T + bias of a tile."""
    exact = torch.promote_types(tile.q.dtype, torch.float32)
    score = tile.q.to(exact) @ tile.k.to(exact).mT * factor(scale, tile.q)
    if tile.bias is not None:
        score = score + tile.bias.to(exact)
    if tile.causal:
        score = score.masked_fill(
            torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).triu(1), -math.inf
        )
    return score


def _lse(score: Tensor) -> Tensor:
    """log-sum-exp over the last axis, kept; rows of -inf give -inf, with gradient 0 instead of NaN."""
    top = score.detach().amax(dim=-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)
    total = (score - top).exp().sum(dim=-1, keepdim=True)
    return total.clamp(min=torch.finfo(total.dtype).tiny).log().masked_fill(total == 0, -math.inf) + top
