import math

import torch
from torch.nn import functional as F

from effzoo.attention import AttentionCore, register


@register("my_window")
class MyWindow(AttentionCore):
    """softmax(q k^T / sqrt(d)) v over the keys at most window / 2 away, by blocks of queries."""

    cost = "n"

    def __init__(self, context, *, window: int = 8):
        super().__init__(context)
        self.reach = window // 2

    def forward(self, q, k, v, *, mask):
        batch, _, n, d = q.shape
        r, block = self.reach, 4 * self.reach
        rest = -n % block  # positions that fill the last block
        blocks = F.pad(q, (0, 0, 0, rest)).unflatten(2, (-1, block))  # [.., blocks, block, d]
        band = block + 2 * r  # the keys that a block can reach
        k_bands = F.pad(k, (0, 0, r, r + rest)).unfold(2, band, block).mT
        v_bands = F.pad(v, (0, 0, r, r + rest)).unfold(2, band, block).mT
        valid = torch.ones(batch, n, dtype=torch.bool, device=q.device) if mask.valid is None else mask.valid
        is_key = F.pad(valid, (r, r + rest)).unfold(1, band, block)[:, None, :, None]  # [batch, 1, blocks, 1, band]
        i = torch.arange(block, device=q.device)[:, None]
        j = torch.arange(band, device=q.device) - r  # both counted from the start of the block
        allowed = ((i - j).abs() <= r) & is_key
        if self.context.causal:
            allowed = allowed & (j <= i)
        scores = blocks @ k_bands.mT / math.sqrt(d)
        weights = scores.masked_fill(~allowed, -math.inf).softmax(dim=-1).nan_to_num(0.0)
        weights = F.dropout(weights, self.dropout, self.training)
        return (weights @ v_bands).flatten(2, 3)[:, :, :n]
