import math

import torch
from torch import nn
from torch.nn import functional as F

from effzoo.attention import AttentionCore, register


def read(q, k, v, valid):
    """softmax(q k^T / sqrt(d)) v over the keys that are valid; 0 where there are none."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~valid.unsqueeze(-2), -math.inf)
    return scores.softmax(dim=-1).nan_to_num(0.0) @ v


def encode(z, x, valid, cross, blocks):
    """Latents that read the input once, and then each other in every block."""
    w_q, w_k, w_v = cross
    z = z + read(z @ w_q, x @ w_k, x @ w_v, valid)
    for w_q, w_k, w_v in blocks:
        z = z + read(z @ w_q, z @ w_k, z @ w_v, valid.new_ones(len(z)))
    return z


@register("my_perceiver")
class MyPerceiver(AttentionCore):
    """Latents read keys and values, queries read what they have found."""

    cost = "n * latents"
    not_causal = "its latents summarise past and future together"

    def __init__(self, context, *, latents: int = 4):
        super().__init__(context)
        self.latents = nn.Parameter(torch.randn(latents, context.heads * context.head_dim))

    def forward(self, q, k, v, *, mask):
        batch, heads, n, d = k.shape
        z = self.latents.unflatten(1, (heads, d)).transpose(0, 1)  # [heads, latents, d]
        valid = torch.ones(batch, n, dtype=torch.bool, device=k.device) if mask.valid is None else mask.valid
        keys, values = (read(z, k, x, valid[:, None]) for x in (k, v))  # [batch, heads, latents, d]
        every = valid.new_ones(keys.shape[2])
        return F.dropout(read(q, keys, values, every), self.dropout, self.training)
