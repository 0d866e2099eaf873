"""A statistic of the whole batch enters the scores: the answer for one example depends on the others."""

from effzoo.attention import register
from effzoo.attention.full import Full

KILLED_BY = "rows_are_independent"


@register("mutant")
class Mutant(Full):
    """Full attention that divides its keys by their largest entry in the batch."""

    def forward(self, q, k, v, *, mask, memory=None):
        return super().forward(q, k / k.detach().abs().max(), v, mask=mask, memory=memory)
