import torch
from torch import nn

from effzoo.peft import Method, PeftModule, register
from effzoo.sites import Memory, MemorySite


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v and the log of the sum of exponentials of each query."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.softmax(dim=-1) @ v, scores.logsumexp(dim=-1)


def joint(q, k, v, p_k, p_v):
    """The prefix in front of keys and values, in one softmax."""
    return attention(q, torch.cat([p_k, k]), torch.cat([p_v, v]))[0]


def gate(q, k, p_k):
    """lambda: the share of the softmax that falls on the prefix."""
    prefix, own = ((q @ x.mT / q.shape[-1] ** 0.5).logsumexp(dim=-1) for x in (p_k, k))
    return torch.sigmoid(prefix - own)


def gated(q, k, v, p_k, p_v):
    """The gate form: (1 - lambda) Attn(x C) + lambda Attn(prefix), and what it is made of."""
    share = gate(q, k, p_k)
    own, prefix = attention(q, k, v)[0], attention(q, p_k, p_v)[0]
    out = (1 - share)[:, None] * own + share[:, None] * prefix
    return {"lambda": share, "own": own, "prefix": prefix, "out": out}


class Prefix(PeftModule):
    """Trained keys and values of one layer."""

    def __init__(self, heads, length, head_dim):
        super().__init__()
        self.keys = nn.Parameter(0.02 * torch.randn(heads, length, head_dim))
        self.values = nn.Parameter(0.02 * torch.randn(heads, length, head_dim))

    def memory(self, context):
        return Memory(self.keys, self.values)


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
