import math

import torch
from torch import nn
from torch.nn.functional import dropout

from effzoo.attention import AttentionCore, register


@register("my_linformer")
class MyLinformer(AttentionCore):
    """softmax(q (E K)^T / sqrt(d)) F V, with E and F [k, max_length]."""

    cost = "n * k"
    # not_causal = why there can be no causal layer, in a sentence

    def __init__(self, context, *, k: int = 4):
        super().__init__(context)
        self.E = nn.Parameter(torch.randn(k, context.max_length) / k**0.5)
        self.F = nn.Parameter(torch.randn(k, context.max_length) / k**0.5)

    def forward(self, q, k, v, *, mask):
        # q, k, v [batch, heads, n, d]; mask.valid bool[batch, n], or None where nothing is padding
        raise NotImplementedError("write the mixtures here")


def sizes(n, d, k):
    """The sizes of E K, of the scores and of the output of one head, {"keys": [..], "scores": [..], "output": [..]}."""
    raise NotImplementedError("write the sizes here")


def counter_example(q, k, v, E, F):
    """Values [n, d] that equal v up to the last position, with which the first query gives something else.

    q, k, v [n, d] and E, F [k, n] are those of one head.
    """
    raise NotImplementedError("change the last value here")
