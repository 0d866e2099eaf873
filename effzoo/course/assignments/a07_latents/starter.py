import math

import torch
from torch import nn
from torch.nn import functional as F

from effzoo.attention import AttentionCore, register


def read(q, k, v, valid):
    """softmax(q k^T / sqrt(d)) v over the keys that are valid; 0 where there are none.

    q [.., m, d], k [.., n, d], v [.., n, d_v], valid bool [.., n]  ->  [.., m, d_v]
    """
    raise NotImplementedError("write the reading here")


def encode(z, x, valid, cross, blocks):
    """Latents that read the input once, and then each other in every block.

    z [m, d], x [n, c], valid bool [n]; cross = [W_q [d, d], W_k [c, d], W_v [c, d]]; blocks is a list of such triples,
    all [d, d]  ->  [m, d]
    """
    raise NotImplementedError("write the encoder here")


@register("my_perceiver")
class MyPerceiver(AttentionCore):
    """Latents read keys and values, queries read what they have found."""

    cost = "n * latents"
    not_causal = "its latents summarise past and future together"

    def __init__(self, context, *, latents: int = 4):
        super().__init__(context)
        # one trained table [latents, heads d]; the first d columns belong to the first head
        self.latents = nn.Parameter(torch.randn(latents, context.heads * context.head_dim))

    def forward(self, q, k, v, *, mask):
        # q, k, v [batch, heads, n, d]; mask.valid bool[batch, n] or None
        raise NotImplementedError("write the kind here")
