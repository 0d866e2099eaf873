"""forward takes a tensor that `projections` does not name, so no layer builds it."""

from effzoo.attention import register
from effzoo.attention.full import Full

KILLED_BY = "projections_match"


@register("mutant")
class Mutant(Full):
    """Full attention with a gate that nobody projects."""

    def forward(self, q, k, v, gate, *, mask, memory=None):
        return super().forward(q, k, v, mask=mask, memory=memory) * gate.sigmoid()
