"""The window is a mask over all pairs: right values, but n x n entries where n x window were promised."""

from effzoo.attention import Part, bias_of, memory_part, register
from effzoo.attention.longformer import Longformer

KILLED_BY = "cost_grows_as_declared"


@register("mutant")
class Mutant(Longformer):
    """Longformer attention as full attention under a mask."""

    def visible(self, query, key):
        return (query - key).abs() <= self.reach

    def forward(self, q, k, v, q_global=None, k_global=None, v_global=None, *, mask, memory=None):
        return self.attend(
            Part(q, k, v, bias_of(self.pattern(q.shape[2], mask).to(q.device), q.dtype)), memory_part(q, memory)
        )
