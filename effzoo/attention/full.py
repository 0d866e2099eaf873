"""Full attention: every query sees every key (Vaswani et al. 2017, arXiv:1706.03762, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from effzoo.annotations import Whole
from effzoo.attention import reference
from effzoo.attention.core import AttentionCore, Context, KeysValues, Mask, State, memory_part
from effzoo.attention.part import Part, bias_of
from effzoo.registry import attention


@attention.register("full")
class Full(AttentionCore):
    """Every query sees every key: softmax(q k^T / sqrt(d)) v, the baseline of every comparison.

    chunk: queries computed at a time, 0 for all. The fused kernel and attention dropout need O(n) memory as they are; with backend="reference",
    chunks need O(chunk n) instead of O(n^2), and compute each chunk again in the backward pass (Rabe & Staats 2021, arXiv:2112.05682).
    """

    paper = "Vaswani et al. 2017, Attention is all you need, arXiv:1706.03762, section 3.2"
    cost = "n^2"
    row_side = ("q",)
    supports_cross = True
    supports_cache = True
    shift_invariant = True

    def __init__(self, context: Context, *, chunk: Whole = 0):
        super().__init__(context)
        self.chunk = chunk

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, memory: KeysValues | None = None) -> Tensor:  # type: ignore[override]
        n = q.shape[2]
        if not self.chunk or n <= self.chunk:
            return self.attend(Part(q, k, v, bias=mask.key_bias(q.dtype), causal=self.context.causal), memory_part(q, memory))
        bias, rows = mask.key_bias(q.dtype), []
        for start in range(0, n, self.chunk):
            inputs = (q[:, :, start : start + self.chunk], k, v, bias, memory, start)
            rows.append(checkpoint(self._rows, *inputs, use_reentrant=False) if torch.is_grad_enabled() else self._rows(*inputs))
        return torch.cat(rows, dim=2)

    def rows(self, where: Tensor, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, memory: KeysValues | None = None) -> Tensor:  # type: ignore[override]
        bias = mask.key_bias(q.dtype)
        if self.context.causal:
            past = torch.arange(k.shape[2], device=q.device) <= where[:, None, :, None]
            bias = bias_of(past, q.dtype) if bias is None else bias + bias_of(past, q.dtype)
        return self.attend(Part(q, k, v, bias), memory_part(q, memory))

    def step(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, past: State | None, memory: KeysValues | None = None) -> tuple[Tensor, State]:  # type: ignore[override]
        if past is None:
            return self(q, k, v, mask=mask, memory=memory), {"k": k, "v": v}
        start = past["k"].shape[2]
        k, v = torch.cat([past["k"], k], dim=2), torch.cat([past["v"], v], dim=2)
        return self._rows(q, k, v, mask.key_bias(q.dtype), memory, start), {"k": k, "v": v}

    def _rows(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, memory: KeysValues | None, start: int) -> Tensor:
        """The rows of queries that stand at `start` and after."""
        if self.context.causal:
            end = start + q.shape[2]
            k, v = k[:, :, :end], v[:, :, :end]
            past = torch.arange(end, device=q.device) <= torch.arange(start, end, device=q.device)[:, None]
            bias = bias_of(past, q.dtype) if bias is None else bias[..., :end] + bias_of(past, q.dtype)
        return self.attend(Part(q, k, v, bias), memory_part(q, memory))

    def pattern(self, n: int, mask: Mask) -> Tensor:
        allowed = reference.padding(n, mask.valid)
        return allowed & (reference.distance(n, allowed.device) >= 0) if self.context.causal else allowed.expand(-1, 1, n, n)
