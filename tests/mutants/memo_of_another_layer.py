"""What one layer computed from its own keys is put into the mask that all layers share."""

from effzoo.attention import register
from effzoo.attention.full import Full

KILLED_BY = "calls_leave_nothing"


@register("mutant")
class Mutant(Full):
    """Full attention with one norm of the keys for all layers."""

    def forward(self, q, k, v, *, mask, memory=None):
        norm = mask.memo(("norm", q.dtype), lambda: k.detach()[:, :, :1].norm(dim=-1, keepdim=True))
        return super().forward(q, k / norm, v, mask=mask, memory=memory)
