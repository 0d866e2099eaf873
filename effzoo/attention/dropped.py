"""Attention with dropout of its weights in O(n) memory: weights are written out a block at a time, and again in the
backward pass.

A block holds some heads, or some rows of one, so few that it stays in the processor's cache. Which weights are dropped
is drawn from a seed, block after block, and drawn again from it in the backward pass, so nothing of size n^2 is kept.
With P the softmax over the keys of all parts together, M the mask that keeps a weight with probability q, and lse the
log-sum-exp,

    out = (P * M / q) v,      dv = (P * M / q)^T dO,      dS = P * (M / q * (dO v^T) - rowsum(dO * out)),

which is the backward pass of FlashAttention with dropout (Dao et al. 2022, arXiv:2205.14135, appendix B.4).
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
    """Scores and sums stay in float32 where autocast would halve them."""

    @functools.wraps(method)
    def run(self: Weights, tile: Tile, *given: Any) -> Result:
        with torch.autocast(tile.q.device.type, enabled=False):
            return method(self, tile, *given)

    return run


@dataclass(frozen=True)
class Weights:
    """How the weights of one part are made: which are dropped, drawn from the seed and the number of the tile; the
    scale of its scores."""

    dropout: float
    seed: int
    scale: float | None

    @property
    def kept(self) -> float:
        """The probability of keeping a weight, in whole steps; 1 / kept makes up for what is rounded."""
        return max(1, round((1 - self.dropout) * STEPS)) / STEPS

    @_without_autocast
    def forward(self, tile: Tile, index: int) -> tuple[Tensor, Tensor]:
        q, k, v, _, _ = tile
        out, lse = v.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=_exact(q.dtype))
        flat_q, flat_k, flat_v = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
        flat_out, flat_lse = out.view(-1, *out.shape[-2:]), lse.view(-1, lse.shape[-1])
        for heads, rows, mask in self._blocks(q, k, index):
            scores = self._scores(flat_q[heads, rows], flat_k[heads], tile, heads, rows)
            top = scores.amax(dim=-1, keepdim=True)
            weights = scores.sub_(top.masked_fill_(top == -math.inf, 0.0)).exp_()
            total = weights.sum(dim=-1, keepdim=True)
            flat_lse[heads, rows] = (total.log() + top).squeeze(-1)
            out_of_rows = torch.bmm(weights.mul_(mask).to(v.dtype), flat_v[heads])
            flat_out[heads, rows] = out_of_rows.div_(total.clamp_(min=torch.finfo(total.dtype).tiny).mul_(self.kept))
        return out, lse

    @_without_autocast
    def backward(self, tile: Tile, index: int, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = tile
        exact, scale = _exact(q.dtype), factor(self.scale, q)
        gradients = of_q, of_k, of_v = tuple(
            torch.zeros(x.shape, dtype=exact, device=x.device).reshape(-1, *x.shape[-2:]) for x in (q, k, v)
        )
        flat_q, flat_k, flat_v, flat_grad = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v, grad))
        delta = (grad.to(exact) * out.to(exact)).sum(dim=-1).reshape(-1, q.shape[2], 1)
        flat_lse = lse.reshape(-1, q.shape[2], 1)
        for heads, rows, mask in self._blocks(q, k, index):
            own_q, own_k, own_v, own_grad = (
                x.to(exact) for x in (flat_q[heads, rows], flat_k[heads], flat_v[heads], flat_grad[heads, rows])
            )
            own_grad = own_grad / self.kept  # factors act on what is narrow
            weights = self._scores(own_q, own_k, tile, heads, rows).sub_(flat_lse[heads, rows]).exp_()
            of_weights = torch.bmm(own_grad, own_v.mT).mul_(mask)
            of_scores = of_weights.sub_(delta[heads, rows]).mul_(weights)
            of_q[heads, rows] = torch.bmm(of_scores, own_k).mul_(scale)
            of_k[heads].baddbmm_(of_scores.mT, own_q, alpha=scale)
            of_v[heads].baddbmm_(weights.mul_(mask).mT, own_grad)
        return tuple(x.view(like.shape).to(like.dtype) for x, like in zip(gradients, (q, k, v), strict=True))  # type: ignore[return-value]

    def _blocks(self, q: Tensor, k: Tensor, index: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Heads, rows and the mask (1 where a weight is kept) of one block after the other, always in the same
        order."""
        heads, m, s = q.shape[:2].numel(), q.shape[2], k.shape[2]
        of_rows = min(m, max(1, BLOCK // max(1, s)))
        of_heads = min(heads, max(1, BLOCK // max(1, m * s))) if of_rows == m else 1
        draw = torch.Generator(device=q.device).manual_seed(self.seed + index)
        for head in range(0, heads, of_heads):
            for row in range(0, m, of_rows):
                size = (min(of_heads, heads - head), min(of_rows, m - row), s)
                words = torch.empty(-(-math.prod(size) // 4), dtype=torch.int64, device=q.device).random_(
                    -(2**63), None, generator=draw
                )
                steps = words.view(torch.int16)[: math.prod(size)].view(size)
                kept = steps <= round(self.kept * STEPS) - STEPS // 2 - 1
                yield slice(head, head + of_heads), slice(row, row + of_rows), kept.to(_exact(q.dtype))
                if isinstance(q, FakeTensor):
                    return  # whose values nobody reads: the first block, which is the largest, tells what a block takes

    def _scores(self, q: Tensor, k: Tensor, tile: Tile, heads: slice, rows: slice) -> Tensor:
        """scale q k^T + bias of a block, in float32 or better, with -inf above the causal diagonal."""
        exact = _exact(q.dtype)
        q, k, scale = q.to(exact), k.to(exact), factor(self.scale, tile.q)
        if tile.bias is None:
            scores = torch.bmm(q, k.mT).mul_(scale)
        else:
            shape = tile.q.shape
            if tile.bias.shape[:-2].numel() == 1:  # of all heads
                of_heads = tile.bias.expand(1, 1, -1, -1)[0]
            else:
                index = torch.arange(heads.start, heads.start + len(q), device=q.device)
                of_heads = tile.bias.expand(*shape[:2], -1, -1)[index // shape[1], index % shape[1]]
            of_rows = of_heads[:, rows] if of_heads.shape[1] > 1 else of_heads
            scores = torch.baddbmm(of_rows.to(exact), q, k.mT, alpha=scale)
        if tile.causal:
            row = torch.arange(rows.start, rows.start + q.shape[1], device=q.device)
            scores.masked_fill_(torch.arange(k.shape[1], device=q.device) > row[:, None], -math.inf)
        return scores


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
