import math

import torch
from torch.nn import functional as F

from effzoo.attention import AttentionCore, register


@register("my_blocks")
class MyBlocks(AttentionCore):
    """Each head reads one block of keys per block of queries: block i reads block permutation[i]."""

    cost = "n^2 / blocks"

    def __init__(self, context, *, blocks: int = 4, block: int = 16):
        super().__init__(context)
        self.blocks, self.block = blocks, block
        # head h has the cyclic shift by h: permutations[h][i] is the block of keys that block i of the queries reads
        self.permutations = [[(i + head) % blocks for i in range(blocks)] for head in range(context.heads)]

    def forward(self, q, k, v, *, mask):
        batch, heads, n, d = q.shape
        sizes, rest = (self.blocks, self.block), self.blocks * self.block - n
        valid = torch.ones(batch, n, dtype=torch.bool, device=q.device) if mask.valid is None else mask.valid
        q, k, v = (F.pad(x, (0, 0, 0, rest)).unflatten(2, sizes) for x in (q, k, v))
        seen = torch.tensor(self.permutations, device=q.device)  # [heads, blocks]
        head = torch.arange(heads, device=q.device)[:, None]
        keys, values = k[:, head, seen], v[:, head, seen]  # [batch, heads, blocks, block, d]
        allowed = F.pad(valid, (0, rest)).unflatten(1, sizes)[:, seen][:, :, :, None, :]
        if self.context.causal:
            place = torch.arange(n + rest, device=q.device).unflatten(0, sizes)
            allowed = allowed & (place[seen][:, :, None, :] <= place[:, :, None])
        scores = q @ keys.mT / math.sqrt(d)
        weights = scores.masked_fill(~allowed, -math.inf).softmax(dim=-1).nan_to_num(0.0)
        return (weights @ values).flatten(2, 3)[:, :, :n]


def reach(permutations, layers):
    """The share of pairs of blocks that are connected: powers of the matrix of one layer with its residual."""
    blocks = len(permutations[0])
    step = torch.eye(blocks)
    for permutation in permutations:
        step[torch.arange(blocks), permutation] = 1.0
    return float((torch.linalg.matrix_power(step, layers) > 0).double().mean())


def caught(pairs, permutation, block):
    """The share of pairs (query, key), int[number, 2], that a head with this permutation reads."""
    query, key = (pairs // block).unbind(dim=1)
    return float((torch.tensor(permutation)[query] == key).double().mean())


def compare(pairs, permutations, block, configurations):
    """Of each configuration the mean share of heads that read a dependency, and the best configuration."""
    of_each = [caught(pairs, permutation, block) for permutation in permutations]
    shares = [sum(g * s for g, s in zip(groups, of_each, strict=True)) / sum(groups) for groups in configurations]
    return {"shares": shares, "best": shares.index(max(shares))}
