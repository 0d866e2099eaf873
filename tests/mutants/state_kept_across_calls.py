"""The padding of the first batch of a length is kept on the core and used for every later one."""

from effzoo.attention import Part, memory_part, register
from effzoo.attention.full import Full

KILLED_BY = "calls_leave_nothing"


@register("mutant")
class Mutant(Full):
    """Full attention with a cache of biases that knows the length alone."""

    def __init__(self, context):
        super().__init__(context)
        self.biases = {}

    def forward(self, q, k, v, *, mask, memory=None):
        bias = self.biases.setdefault((k.shape[2], q.dtype), mask.key_bias(q.dtype))
        return self.attend(Part(q, k, v, bias, causal=self.context.causal), memory_part(q, memory))
