import math

import torch

from effzoo.attention import AttentionCore, register


def masked_softmax(scores, allowed):
    """exp(scores) / sum of exp(scores) over the allowed keys of each row; a row of 0 where no key is allowed.

    scores [..., n, m] floats; allowed bool, of the same shape or with axes of size 1 -> [..., n, m]
    """
    raise NotImplementedError("write the softmax here")


@register("my_full")
class MyFull(AttentionCore):
    """softmax(q k^T / sqrt(d)) v over the keys that are tokens, and not later than the query where causal."""

    cost = "n^2"

    def forward(self, q, k, v, *, mask):
        # q, k, v [batch, heads, n, d]; mask.valid bool[batch, n] or None; self.context.causal
        raise NotImplementedError("write attention here")
