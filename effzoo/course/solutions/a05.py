import math

import torch
from torch import nn
from torch.nn.functional import dropout

from effzoo.attention import AttentionCore, register


@register("my_linformer")
class MyLinformer(AttentionCore):
    """softmax(q (E K)^T / sqrt(d)) F V, with E and F [k, max_length]."""

    cost = "n * k"
    not_causal = "every mixture of keys holds positions that come after the query"

    def __init__(self, context, *, k: int = 4):
        super().__init__(context)
        self.E = nn.Parameter(torch.randn(k, context.max_length) / k**0.5)
        self.F = nn.Parameter(torch.randn(k, context.max_length) / k**0.5)

    def forward(self, q, k, v, *, mask):
        n, d = k.shape[2:]
        if mask.valid is not None:
            k, v = (x * mask.valid[:, None, :, None] for x in (k, v))
        keys, values = self.E[:, :n] @ k, self.F[:, :n] @ v
        weights = (q @ keys.mT / math.sqrt(d)).softmax(dim=-1)
        return dropout(weights, self.dropout, self.training) @ values


def sizes(n, d, k):
    """The sizes of E K, of the scores and of the output of one head."""
    return {"keys": [k, d], "scores": [n, k], "output": [n, d]}


def counter_example(q, k, v, E, F):
    """Values that differ at the last position alone: each row of F V holds it."""
    other = v.clone()
    other[-1] += 10
    return other
