"""Python asks a tensor whether there is padding at all: the graph breaks there."""

from effzoo.attention import Mask, register
from effzoo.attention.full import Full

KILLED_BY = "compiles"


@register("mutant")
class Mutant(Full):
    """Full attention that saves a mask when there is no padding."""

    def forward(self, q, k, v, *, mask, memory=None):
        if mask.valid is not None and mask.valid.device.type != "meta" and mask.valid.all():
            mask = Mask()
        return super().forward(q, k, v, mask=mask, memory=memory)
