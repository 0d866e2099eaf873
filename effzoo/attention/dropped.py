"""Attention with dropout of its weights in O(n) memory: weights are computed block by block, forward and backward.

A block is a few heads, or a few queries of one, and fits the processor's cache. Its dropout mask is drawn again in the
backward pass, from the same seed. With P the softmax over the keys of all parts, M the mask, which keeps a weight with
probability q,

    out = (P * M / q) v,      dv = (P * M / q)^T dO,      dS = P * (M / q * (dO v^T) - rowsum(dO * out)),

which is the backward pass of FlashAttention with dropout (Dao et al. 2022, arXiv:2205.14135, appendix B.4). Where
scores are capped, S = c tanh(R / c), dR = dS * (1 - tanh^2(R / c)).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from effzoo.attention.part import Tile, factor

BLOCK = 2**19  # weights at a time
STEPS = 2**16  # in which probabilities are drawn: four from each random number of 64 bits
Result = TypeVar("Result")


def _without_autocast(method: Callable[..., Result]) -> Callable[..., Result]:
    """Scores and sums stay float32 under autocast."""

    @functools.wraps(method)
    def run(self: Weights, tile: Tile, *given: Any) -> Result:
        with torch.autocast(tile.q.device.type, enabled=False):
            return method(self, tile, *given)

    return run


@dataclass(frozen=True)
class Weights:
    """The kernel of one part. seed: of dropout, with the number of the tile; cap: of the scores."""

    dropout: float
    seed: int
    scale: float | None
    cap: float = 0.0

    @property
    def kept(self) -> float:
        """The probability q of keeping a weight, in whole steps."""
        return max(1, round((1 - self.dropout) * STEPS)) / STEPS

    @_without_autocast
    def forward(self, tile: Tile, index: int) -> tuple[Tensor, Tensor]:
        q, k, v, _, _ = tile
        out, lse = v.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=_exact(q.dtype))
        flat_q, flat_k, flat_v = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
        flat_out, flat_lse = out.view(-1, *out.shape[-2:]), lse.view(-1, lse.shape[-1])
        for heads, queries, mask in self._blocks(q, k, index):
            scores, _ = self._scores(flat_q[heads, queries], flat_k[heads], tile, heads, queries)
            top = scores.amax(dim=-1, keepdim=True)
            weights = scores.sub_(top.masked_fill_(top == -math.inf, 0.0)).exp_()
            total = weights.sum(dim=-1, keepdim=True)
            flat_lse[heads, queries] = (total.log() + top).squeeze(-1)
            total = total.clamp_(min=torch.finfo(total.dtype).tiny).mul_(self.kept)
            flat_out[heads, queries] = torch.bmm(weights.mul_(mask).to(v.dtype), flat_v[heads]).div_(total)
        return out, lse

    @_without_autocast
    def backward(self, tile: Tile, index: int, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = tile
        exact, scale = _exact(q.dtype), factor(self.scale, q)
        grad_q, grad_k, grad_v = (
            torch.zeros(x.shape, dtype=exact, device=x.device).reshape(-1, *x.shape[-2:]) for x in (q, k, v)
        )
        flat_q, flat_k, flat_v, flat_grad = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v, grad))
        delta = (grad.to(exact) * out.to(exact)).sum(dim=-1).reshape(-1, q.shape[2], 1)
        flat_lse = lse.reshape(-1, q.shape[2], 1)
        for heads, queries, mask in self._blocks(q, k, index):
            block = flat_q[heads, queries], flat_k[heads], flat_v[heads], flat_grad[heads, queries]
            block_q, block_k, block_v, block_grad = (x.to(exact) for x in block)
            block_grad = block_grad / self.kept
            scores, slope = self._scores(block_q, block_k, tile, heads, queries)
            weights = scores.sub_(flat_lse[heads, queries]).exp_()
            of_weights = torch.bmm(block_grad, block_v.mT).mul_(mask)
            of_scores = of_weights.sub_(delta[heads, queries]).mul_(weights)
            of_scores = of_scores if slope is None else of_scores.mul_(slope)
            grad_q[heads, queries] = torch.bmm(of_scores, block_k).mul_(scale)
            grad_k[heads].baddbmm_(of_scores.mT, block_q, alpha=scale)
            grad_v[heads].baddbmm_(weights.mul_(mask).mT, block_grad)
        return grad_q.view(q.shape).to(q.dtype), grad_k.view(k.shape).to(k.dtype), grad_v.view(v.shape).to(v.dtype)

    def _blocks(self, q: Tensor, k: Tensor, index: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Heads, queries and mask (1 where a weight is kept) of each block, always in the same order."""
        heads, m, s = q.shape[:2].numel(), q.shape[2], k.shape[2]
        few_queries = min(m, max(1, BLOCK // max(1, s)))
        few_heads = min(heads, max(1, BLOCK // max(1, m * s))) if few_queries == m else 1
        draw = torch.Generator(device=q.device).manual_seed(self.seed + index)
        for head in range(0, heads, few_heads):
            for query in range(0, m, few_queries):
                size = (min(few_heads, heads - head), min(few_queries, m - query), s)
                words = torch.empty(-(-math.prod(size) // 4), dtype=torch.int64, device=q.device).random_(
                    -(2**63), None, generator=draw
                )
                steps = words.view(torch.int16)[: math.prod(size)].view(size)
                kept = steps <= round(self.kept * STEPS) - STEPS // 2 - 1
                yield slice(head, head + few_heads), slice(query, query + few_queries), kept.to(_exact(q.dtype))
                if isinstance(q, FakeTensor):
                    return  # the first block is the largest, so that it shows the memory of all

    def _scores(self, q: Tensor, k: Tensor, tile: Tile, heads: slice, queries: slice) -> tuple[Tensor, Tensor | None]:
        """scale q k^T + bias of a block, in float32 or better, with -inf above the causal diagonal; and the derivative
        of the cap, where there is one."""
        exact = _exact(q.dtype)
        q, k, scale = q.to(exact), k.to(exact), factor(self.scale, tile.q)
        if tile.bias is None:
            scores = torch.bmm(q, k.mT).mul_(scale)
            bias = None
        else:
            shape = tile.q.shape
            if tile.bias.shape[:-2].numel() == 1:  # the same for all heads
                bias = tile.bias.expand(1, 1, -1, -1)[0]
            else:
                index = torch.arange(heads.start, heads.start + len(q), device=q.device)
                bias = tile.bias.expand(*shape[:2], -1, -1)[index // shape[1], index % shape[1]]
            bias = bias[:, queries] if bias.shape[1] > 1 else bias
            scores = torch.bmm(q, k.mT).mul_(scale) if self.cap else torch.baddbmm(bias.to(exact), q, k.mT, alpha=scale)
        slope = None
        if self.cap:
            bounded = scores.div_(self.cap).tanh_()
            slope = 1 - bounded.square()
            scores = bounded.mul_(self.cap) if bias is None else torch.add(bias.to(exact), bounded, alpha=self.cap)
        if tile.causal:
            query = torch.arange(queries.start, queries.start + q.shape[1], device=q.device)
            scores.masked_fill_(torch.arange(k.shape[1], device=q.device) > query[:, None], -math.inf)
        return scores, slope


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
