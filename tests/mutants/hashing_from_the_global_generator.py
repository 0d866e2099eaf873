"""New rotations in every call, drawn from torch's global generator: evaluation is not repeatable and moves everybody's
random numbers."""

import torch

from effzoo.attention import register
from effzoo.attention.lsh import LSH

KILLED_BY = "evaluation_draws_nothing"


@register("mutant")
class Mutant(LSH):
    """LSH attention that hashes anew each time."""

    def __init__(self, context, *, chunk: int = 8):
        super().__init__(context, chunk=chunk)

    def forward(self, qk, v, *, mask, memory=None):
        self.rotations = torch.randn_like(self.rotations)
        return super().forward(qk, v, mask=mask, memory=memory)
