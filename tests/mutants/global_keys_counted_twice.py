"""A global key inside the window is counted with the window and again with the global columns: the classic slip of
re-implementations."""

from effzoo.attention import register
from effzoo.attention.longformer import Longformer

KILLED_BY = "global_tokens"


@register("mutant")
class Mutant(Longformer):
    """Longformer attention whose window part forgets which keys are global."""

    def key_mask(self, mask, n):
        return mask.valid
