import math

import torch

from effzoo.attention import AttentionCore, register


def masked_softmax(scores, allowed):
    """exp(scores) / sum of exp(scores) over the allowed keys of each row; a row of 0 where no key is allowed."""
    has_key = allowed.any(dim=-1, keepdim=True)
    hidden = ~allowed & has_key  # a row without a key keeps its scores, and its weights become 0 at the end
    scores = scores.masked_fill(hidden, -math.inf)
    shifted = scores - scores.amax(dim=-1, keepdim=True)
    e = shifted.exp()
    return e / e.sum(dim=-1, keepdim=True) * has_key


@register("my_full")
class MyFull(AttentionCore):
    """softmax(q k^T / sqrt(d)) v over the keys that are tokens, and not later than the query where causal."""

    cost = "n^2"

    def forward(self, q, k, v, *, mask):
        n, d = q.shape[-2:]
        scores = q @ k.mT / math.sqrt(d)
        allowed = torch.ones(n, n, dtype=torch.bool, device=q.device)
        if self.context.causal:
            allowed = allowed.tril()
        if mask.valid is not None:
            allowed = allowed & mask.valid[:, None, None, :]
        return masked_softmax(scores, allowed) @ v
