import torch
from torch import nn

from effzoo.peft import Method, PeftModule, register
from effzoo.sites import Memory, MemorySite


def joint(q, k, v, p_k, p_v):
    """The prefix in front of keys and values, in one softmax.

    q [n, d], k [m, d], v [m, d_v], p_k [l, d], p_v [l, d_v]  ->  [n, d_v]
    """
    raise NotImplementedError("write the joint form here")


def gate(q, k, p_k):
    """lambda: the share of the softmax that falls on the prefix.

    q [n, d], k [m, d], p_k [l, d]  ->  [n], from 0 to 1
    """
    raise NotImplementedError("write lambda here")


def gated(q, k, v, p_k, p_v):
    """The gate form: (1 - lambda) Attn(x C) + lambda Attn(prefix), and what it is made of.

    ->  {"lambda": [n], "own": Attn(x C) [n, d_v], "prefix": Attn(prefix) [n, d_v], "out": [n, d_v]}
    """
    raise NotImplementedError("write the gate form here")


class Prefix(PeftModule):
    """Trained keys and values of one layer."""

    def __init__(self, heads, length, head_dim):
        super().__init__()
        # self.keys and self.values, both [heads, length, head_dim]
        raise NotImplementedError("make the prefix here")

    def memory(self, context):
        # the keys and values that every query of the layer also sees: Memory(keys, values)
        raise NotImplementedError("return the prefix here")


@register("my_prefix")
class MyPrefix(Method):
    """Where the prefix hangs, and with which options."""

    accepts, default_targets, identity_at_init = (MemorySite,), ("attn.memory",), False

    def __init__(
        self, *, length: int = 4, targets: str | list[str] | None = None, layers: int | list[int] | None = None
    ):
        super().__init__(targets=targets, layers=layers)
        self.length = length

    def make(self, site):
        return Prefix(site.heads, self.length, site.head_dim)
