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
        # q, k, v [batch, heads, n, d], n at most blocks * block; mask.valid bool[batch, n] or None; self.context.causal
        raise NotImplementedError("write blockwise attention here")


def reach(permutations, layers):
    """The share, from 0 to 1, of pairs (i, j) such that block i knows of block j after these layers.

    permutations: a list of lists, each with the block that block i reads, counted from 0; every layer has them all
    """
    raise NotImplementedError("write what layers hand on here")


def caught(pairs, permutation, block):
    """The share, from 0 to 1, of pairs (query, key), int[number, 2], that a head with this permutation reads."""
    raise NotImplementedError("count the dependencies here")


def compare(pairs, permutations, block, configurations):
    """Of each configuration the mean share of heads that read a dependency, and the best configuration.

    configurations: lists with the number of heads for each permutation
    -> {"shares": [float, ...], "best": index of the first that has the largest share}
    """
    raise NotImplementedError("compare the configurations here")
