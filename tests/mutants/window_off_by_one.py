"""The window reaches one further to each side than its definition says."""

from effzoo.attention import register
from effzoo.attention.longformer import Longformer

KILLED_BY = "is_no_known_slip"


@register("mutant")
class Mutant(Longformer):
    """Longformer attention with a window that is two wider."""

    def forward(self, q, k, v, q_global=None, k_global=None, v_global=None, *, mask, memory=None):
        self.reach += 1
        try:
            return super().forward(q, k, v, q_global, k_global, v_global, mask=mask, memory=memory)
        finally:
            self.reach -= 1
