"""The one softmax: attention over the union of several parts' keys, in O(n) memory, exact forward and backward.

A part is a choice of keys for the queries. Each part runs as one flash attention and returns its output and log-sum-exp;
`merge` combines them into the softmax over all keys together,

    L = log sum_i exp(lse_i),     out = sum_i exp(lse_i - L) out_i,

which is how FlashAttention merges its tiles (Dao et al. 2022, arXiv:2205.14135, section 3.1). No gradient flows
through the merge weights: with P = exp(S_i - L) the derivative dS_i = P * (dO V_i^T - rowsum(dO * out)) needs only the *merged*
out and L, so each part's flash backward runs with those (as ring attention does, Liu et al. 2023, arXiv:2310.01889).

The private operators of torch stay in this file; `_plain` is their readable twin, and tests hold the two equal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from effzoo.attention.dropped import Weights
from effzoo.attention.part import Cut, Kernel, Layout, Part, Tile
from effzoo.errors import InputError, OptionError

BACKENDS = ("auto", "reference", "sdpa", "blocks")
_aten_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_aten_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(*parts: Part, dropout: float = 0.0, backend: str = "auto") -> Tensor:
    """softmax(scale q k^T + bias) v over the keys of all parts together, [batch, heads, n, e].

    A query that may attend to nothing returns 0. `dropout` is the probability of dropping an attention weight.
    `choose` says which backend "auto" is; a named backend that cannot run here raises OptionError.
    """
    return attended(*parts, dropout=dropout, backend=backend)[0]


def attended(*parts: Part, dropout: float = 0.0, backend: str = "auto") -> tuple[Tensor, Tensor | None]:
    """`attend`, and the log-sum-exp [batch, heads, n, 1] without gradient, -inf for a query that attended to nothing (None from a fused kernel
    that does not tell)."""
    if not parts:
        raise InputError("attention is over the keys of at least one part; give attend a Part")
    backend, _ = choose(parts, dropout, backend)
    if backend == "reference" or torch.compiler.is_compiling():
        parts = tuple(one for part in parts for one in part.way.plain(part))
    if backend == "reference":
        device = parts[0].q.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():  # which would round the scores
            return _plain(parts, dropout)
    if backend == "blocks" or parts[0].q.device.type == "cpu":
        width = parts[0].v.shape[-1]
        same = [part if backend == "blocks" else _prepared(part) for part in parts]
        kernels = [_weights(p, dropout) if backend == "blocks" else Flash(p.scale) for p in same]
        # parts may share their queries, but compiled code takes each tensor once
        queries = [p.q.view_as(p.q) if any(p.q is other.q for other in same[:i]) else p.q for i, p in enumerate(same)]
        tensors = [(q, p.k, p.v, *p.brought) for q, p in zip(queries, same, strict=True)]
        ways = [(p.way, kernel) for p, kernel in zip(same, kernels, strict=True)]
        if torch.compiler.is_compiling() and backend == "blocks":
            ways = [(Seeded(p.way), kernel) for p, kernel in zip(same, kernels, strict=True)]
            tensors = [(q, k, v, _seed(), *given) for q, k, v, *given in tensors]
        out, lse = _Merged.apply(ways, [len(each) for each in tensors], *(x for each in tensors for x in each))  # type: ignore[no-untyped-call]
        return out[..., :width], lse
    part = parts[0]
    return F.scaled_dot_product_attention(part.q, part.k, part.v, is_causal=part.causal, scale=part.scale), None


def _seed() -> Tensor:
    return torch.randint(2**62, (1,), device="cpu")


@dataclass(frozen=True)
class Seeded(Layout):
    """A layout in compiled code with dropout, whose part brings the seed in front of the rest."""

    way: Layout

    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        assert isinstance(kernel, Weights) and given[0] is not None
        return self.way.forward(replace(kernel, seed=given[0]), q, k, v, *given[1:])

    def backward(
        self, kernel: Kernel, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *given: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert isinstance(kernel, Weights) and given[0] is not None
        return self.way.backward(replace(kernel, seed=given[0]), grad, q, k, v, out, lse, *given[1:])

    def plain(self, part: Part) -> list[Part]:
        return self.way.plain(part)


def _weights(part: Part, dropout: float) -> Weights:
    """How the weights of a part are made, with a seed from torch's generator: drawn again when a checkpoint restores its state."""
    drawn = 0
    if not torch.compiler.is_compiling():
        seed = _seed()
        drawn = 0 if isinstance(seed, FakeTensor) else int(seed)
    return Weights(dropout, drawn, 1 / math.sqrt(part.q.shape[-1]) if part.scale is None else part.scale)


def _prepared(part: Part) -> Part:
    """The part as the flash kernel wants it: rows of one width (zeros change neither scores nor other columns of v), dense in memory.

    The kernel does not look at the last stride, and computes with what lies there.
    """
    d, e = part.q.shape[-1], part.v.shape[-1]
    if d == e:
        if any(x.stride(-1) != 1 for x in (part.q, part.k, part.v)):
            return replace(part, q=part.q.contiguous(), k=part.k.contiguous(), v=part.v.contiguous())
        return part
    q, k, v = (F.pad(x, (0, max(d, e) - x.shape[-1])) for x in (part.q, part.k, part.v))
    return replace(part, q=q, k=k, v=v, scale=1 / math.sqrt(d) if part.scale is None else part.scale)


def choose(parts: tuple[Part, ...], dropout: float, backend: str = "auto") -> tuple[str, str]:
    """The backend that `attend` takes for these parts, and the reason."""
    if backend not in BACKENDS:
        raise OptionError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return "reference", "asked for"
    device = parts[0].q.device.type
    obstacle = ""
    if backend == "blocks" or (dropout > 0 and backend == "auto"):
        needed = f"attention dropout {dropout} needs the weights themselves (attention_dropout=0 allows the fused kernel)"
        return "blocks", f"{'asked for' if backend == 'blocks' else needed}: some at a time, and again in the backward pass"
    if dropout > 0:
        obstacle = f"attention dropout {dropout} needs the weights themselves; set attention_dropout=0 for the fused kernel"
    elif device != "cpu" and (len(parts) > 1 or parts[0].bias is not None or parts[0].layout is not None):
        obstacle = f"merging parts or masks on {device} runs in plain PyTorch"
    elif device == "cpu" and parts[0].q.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        obstacle = f"the flash kernel has no {parts[0].q.dtype}"
    if not obstacle:
        return "sdpa", f"fused flash attention on {device}"
    if backend == "sdpa":
        raise OptionError(f"backend 'sdpa' cannot run here: {obstacle}; use backend='auto', 'blocks' or 'reference'")
    return "reference", obstacle


def merge(*results: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Outputs [..., n, d] and log-sum-exps [..., n, 1] of parts -> those of the softmax over the union of their keys."""
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
    """`_merge` for compiled graphs: inductor of torch 2.13 else adds the parts up in the buffer of one that is still read."""
    out, lse = _merge(outs, lses)
    return out.contiguous(), lse.contiguous()


@_opaque_merge.register_fake
def _(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


@torch.library.custom_op("effzoo::flash", mutates_args=())
def _opaque_flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """The flash operator as compiled graphs take it: with dense results, whatever strides the compiler believes in."""
    out, lse = _honest_flash(q.contiguous(), k.contiguous(), v.contiguous(), bias, causal, scale)
    return out.contiguous(), lse.contiguous()


@_opaque_flash.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("effzoo::flash_backward", mutates_args=())
def _opaque_flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    dense = (x.contiguous() for x in (grad, q, k, v, out, lse))
    of_q, of_k, of_v = _aten_flash_backward(*dense, 0.0, causal, attn_mask=bias, scale=scale)
    return of_q.contiguous(), of_k.contiguous(), of_v.contiguous()


@_opaque_flash_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """Flash attention of one part: output [g, h, m, d] and log-sum-exp [g, h, m]."""
    if torch.compiler.is_compiling():
        return _opaque_flash(q, k, v, bias, causal, scale)
    return _honest_flash(q, k, v, bias, causal, scale)


def _honest_flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """The flash operator, with NaN where the definition has NaN: without a bias it makes 0 of a row whose scores are NaN, and 0 of its log-sum-exp.

    Looking for that 0 costs one pass over the log-sum-exps, which have one number for each row of q.
    """
    out, lse = _aten_flash(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    if bias is not None or isinstance(lse, FakeTensor) or lse.is_meta or bool(lse.all()):
        return out, lse
    largest = k.abs().amax(dim=(-1, -2), keepdim=True).to(lse.dtype)[..., 0] * q.abs().amax(dim=-1).to(lse.dtype) * q.shape[-1]
    lost = (lse == 0) & ~largest.isfinite()  # NaN, or products that overflow with both signs
    return out.masked_fill(lost[..., None], math.nan), lse.masked_fill(lost, math.nan)


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given those of the output, the output and the log-sum-exp (the merged ones, where parts are merged)."""
    if torch.compiler.is_compiling():
        return _opaque_flash_backward(grad, q, k, v, out, lse, bias, causal, scale)
    return _aten_flash_backward(grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale)


@dataclass(frozen=True)
class Flash:
    """A tile by the flash operators."""

    scale: float | None

    def forward(self, tile: Tile, index: int) -> tuple[Tensor, Tensor]:
        out, lse = _flash(*tile, self.scale)
        if tile.bias is not None:  # the operator reports 0 for a row without keys
            lse = lse.masked_fill(_dead_rows(tile.bias, tile.causal).squeeze(-1), -math.inf)
        return out, lse

    def backward(self, tile: Tile, index: int, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _flash_backward(grad, tile.q, tile.k, tile.v, out, lse, tile.bias, tile.causal, self.scale)


class _Merged(torch.autograd.Function):
    """`attended` tile by tile: parts forward, `merge`, parts backward with the merged out and log-sum-exp."""

    @staticmethod
    def forward(ctx, ways, counts, *tensors):  # type: ignore[no-untyped-def]
        out, lse = merge(*(layout.forward(kernel, *own) for (layout, kernel), own in zip(ways, _by_part(counts, tensors), strict=True)))
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


def _dead_rows(bias: Tensor, causal: bool) -> Tensor:
    """Rows of a part that may attend to none of its keys, broadcastable to [g, h, m, 1]."""
    if causal:  # a key bias [g, 1, 1, s] under the causal triangle: nothing allowed at or before the row
        return (bias.cummax(dim=-1).values == -math.inf).transpose(-1, -2)
    return bias.amax(dim=-1, keepdim=True) == -math.inf


def _plain(parts: tuple[Part, ...], dropout: float) -> tuple[Tensor, Tensor]:
    """`attended` with the scores written out, in float32 or better; O(m s) memory, differentiable by autograd alone."""
    cuts = [cast(Cut, part.way) for part in parts]
    tiles = [list(cut.tiles(part.q, part.k, part.v, part.brought)) for part, cut in zip(parts, cuts, strict=True)]
    scores = [[_score(tile, part.scale) for tile in own] for part, own in zip(parts, tiles, strict=True)]
    lse = torch.stack([cut.join([_lse(score) for score in own], -math.inf) for cut, own in zip(cuts, scores, strict=True)])
    lse = _lse(lse.movedim(0, -1)).squeeze(-1)
    out: Tensor | int = 0
    for cut, of_part, own in zip(cuts, tiles, scores, strict=True):
        rows = cut.rows(lse.clamp(min=torch.finfo(lse.dtype).min))
        weights = [F.dropout((score - of_rows).exp(), dropout) for score, of_rows in zip(own, rows, strict=True)]
        out = out + cut.join([weight.to(tile.v.dtype) @ tile.v for weight, tile in zip(weights, of_part, strict=True)])
    return out, lse.detach()  # type: ignore[return-value]


def _score(tile: Tile, scale: float | None) -> Tensor:
    """scale q k^T + bias of a tile."""
    exact = torch.promote_types(tile.q.dtype, torch.float32)
    score = tile.q.to(exact) @ tile.k.to(exact).mT * (1 / math.sqrt(tile.q.shape[-1]) if scale is None else scale)
    if tile.bias is not None:
        score = score + tile.bias.to(exact)
    if tile.causal:
        score = score.masked_fill(torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).triu(1), -math.inf)
    return score


def _lse(score: Tensor) -> Tensor:
    """log-sum-exp over the last axis, kept; rows of -inf give -inf, with gradient 0 instead of NaN."""
    top = score.detach().amax(dim=-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)
    total = (score - top).exp().sum(dim=-1, keepdim=True)
    return total.clamp(min=torch.finfo(total.dtype).tiny).log().masked_fill(total == 0, -math.inf) + top
