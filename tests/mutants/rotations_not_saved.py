"""Rotations are drawn from the global generator at the start and kept out of the state: a loaded model hashes
differently."""

import torch

from effzoo.attention import register
from effzoo.attention.lsh import LSH

KILLED_BY = "copies_are_equal"


@register("mutant")
class Mutant(LSH):
    """LSH attention with rotations that nothing can restore."""

    def __init__(self, context, *, chunk: int = 8):
        super().__init__(context, chunk=chunk)
        self.rotations = torch.randn(self.rotations.shape)
