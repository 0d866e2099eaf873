"""Attention as it is defined: the dense reference that every kind must equal, for reading and for float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dense(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, memory: tuple[Tensor, Tensor] | None = None, cap: float = 0.0,
    added: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """out = softmax(q k^T / sqrt(d)) v over the allowed keys (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1).

    A query without an allowed key gets 0.

    q [batch, heads, n, d], k and v [batch, heads, s, d]
    allowed bool[batch, heads, n, s], or broadcastable: which keys a query sees; whole numbers: how often each counts.
    memory: keys and values [heads, m, d] that every query also sees (prefix tuning, Li & Liang 2021).
    cap: scores s become cap tanh(s / cap) (Gemma 2: arXiv:2408.00118, section 2); 0: they stay.
    added: to the scores of the keys, broadcastable to [batch, heads, n, s] (relative positions).
    """
    batch, heads, n, d = q.shape
    allowed = allowed.expand(batch, heads, n, k.shape[2])
    if memory is not None:
        keys, values = (x.expand(batch, *x.shape[-3:]) for x in memory)
        k, v = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        allowed = torch.cat([allowed.new_ones(batch, heads, n, keys.shape[2]), allowed], dim=3)
        added = None if added is None else torch.nn.functional.pad(added, (keys.shape[2], 0))
    scores = q @ k.mT / math.sqrt(d)
    scores = cap * torch.tanh(scores / cap) if cap else scores
    scores = scores if added is None else scores + added
    seen = allowed != 0
    scores = scores if allowed.dtype == torch.bool else scores + allowed.clamp(min=1).to(scores.dtype).log()
    has_key = seen.any(dim=-1, keepdim=True)  # a softmax over no key would be NaN: its weights become 0
    weights = scores.masked_fill(~seen & has_key, -math.inf).softmax(dim=-1) * has_key
    return weights @ v


def padding(n: int, valid: Tensor | None, device: torch.device | None = None) -> Tensor:
    """Which of n keys are tokens, bool[batch, 1, 1, n]; valid bool[batch, n], None without padding."""
    return torch.ones(1, 1, 1, n, dtype=torch.bool, device=device) if valid is None else valid[:, None, None, :]
