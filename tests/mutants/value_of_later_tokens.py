"""LSH chunks by the sorted order of the whole sequence, so later values move earlier outputs; it hides that no gradient
shows it."""

from effzoo.attention import register
from effzoo.attention.lsh import LSH

KILLED_BY = "future_changes_nothing"


@register("mutant")
class Mutant(LSH):
    """LSH attention that does not declare what its chunks depend on."""

    later_values_matter = ""

    def __init__(self, context, *, chunk: int = 8):
        super().__init__(context, chunk=chunk)
        self.later_values_matter = ""
