"""Scores are not divided by the square root of the width."""

from effzoo.attention import Part, memory_part, register
from effzoo.attention.full import Full

KILLED_BY = "is_no_known_slip"


@register("mutant")
class Mutant(Full):
    """Full attention without a scale."""

    def forward(self, q, k, v, *, mask, memory=None):
        part = Part(q, k, v, mask.key_bias(q.dtype), causal=self.context.causal, scale=1.0)
        return self.attend(part, memory_part(q, memory))
