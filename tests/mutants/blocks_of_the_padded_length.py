"""Blocks are shares of the padded length: what a sequence sees depends on its neighbours in the batch."""

from effzoo.attention import register
from effzoo.attention.blockwise import Blockwise

KILLED_BY = "ragged_equals_alone"


@register("mutant")
class Mutant(Blockwise):
    """Blockwise attention that cuts the input at hand into equal blocks."""

    def forward(self, q, k, v, *, mask, memory=None):
        self.block = -(-q.shape[2] // self.blocks)
        return super().forward(q, k, v, mask=mask, memory=memory)
