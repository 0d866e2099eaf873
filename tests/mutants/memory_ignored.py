"""The memory is taken and dropped, so that prefix tuning trains nothing."""

from effzoo.attention import register
from effzoo.attention.perceiver import Perceiver

KILLED_BY = "memory_is_attended"


@register("mutant")
class Mutant(Perceiver):
    """Latent attention that forgets what it is given to remember."""

    def forward(self, q, k, v, *, mask, memory=None):
        return super().forward(q, k, v, mask=mask)
