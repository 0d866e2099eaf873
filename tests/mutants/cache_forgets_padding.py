"""In decoding, the padding in front of a prompt is masked in the prompt and seen by every later step."""

from effzoo.attention import Mask, register
from effzoo.attention.full import Full

KILLED_BY = "cache_equals_forward"


@register("mutant")
class Mutant(Full):
    """Full attention whose steps know no padding."""

    def step(self, q, k, v, *, mask, past, memory=None):
        return super().step(q, k, v, mask=mask if past is None else Mask(), past=past, memory=memory)
