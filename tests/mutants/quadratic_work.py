"""No tensor has n x n entries, thanks to the fused kernel, but every query is compared with every key: the work is
quadratic."""

from effzoo.attention import register
from effzoo.attention.full import Full

KILLED_BY = "cost_grows_as_declared"


@register("mutant")
class Mutant(Full):
    """Full attention that claims to be linear."""

    cost = "n"
