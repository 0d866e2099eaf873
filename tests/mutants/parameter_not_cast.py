"""A parameter of its own, float32 under autocast, meets bfloat16 queries: they become float32, and the keys do not."""

import torch
from torch import nn

from effzoo.attention import register
from effzoo.attention.full import Full

KILLED_BY = "runs_under_autocast"


@register("mutant")
class Mutant(Full):
    """Full attention with a learned temperature."""

    def __init__(self, context):
        super().__init__(context)
        self.temperature = nn.Parameter(torch.ones(1, context.heads, 1, 1))

    def forward(self, q, k, v, *, mask, memory=None):
        return super().forward(q * self.temperature, k, v, mask=mask, memory=memory)

    def dense(self, q, k, v, *, mask, memory=None):
        return super().dense(q * self.temperature, k, v, mask=mask, memory=memory)
