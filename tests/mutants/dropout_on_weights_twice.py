"""The weights pass through two dropouts: more of them are gone than was asked for, though the mean is right."""

from effzoo.attention import register
from effzoo.attention.local import Local

KILLED_BY = "dropout_keeps_the_mean"


@register("mutant")
class Mutant(Local):
    """Local attention that drops twice."""

    @property
    def dropout(self):
        return 1 - (1 - self.context.dropout * self.training) ** 2
