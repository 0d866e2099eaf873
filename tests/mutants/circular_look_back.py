"""The first chunk looks back to the last one, which in a padded batch is padding, and alone is the end of the
sequence."""

from effzoo.attention import register
from effzoo.attention.local import Local

KILLED_BY = "ragged_equals_alone"


@register("mutant")
class Mutant(Local):
    """Chunks in a ring, as in the published Reformer."""

    def __init__(self, context, *, chunk: int = 8):
        super().__init__(context, chunk=chunk, circular=True)
