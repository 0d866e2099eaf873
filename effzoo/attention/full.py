"""Full attention: every query sees every key (Vaswani et al. 2017, arXiv:1706.03762, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from effzoo.attention.band import Window
from effzoo.attention.predicate import PredicateAttention
from effzoo.registry import attention


@attention.register("full")
class Full(PredicateAttention):
    """softmax(q k^T / sqrt(d)) v over every key: the baseline of every comparison."""

    paper = "Vaswani et al. 2017, Attention is all you need, arXiv:1706.03762, section 3.2"
    cost = "n^2"

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        return torch.ones_like(query + key, dtype=torch.bool)

    def window_of(self, head: int) -> Window:
        return Window(None, None)
