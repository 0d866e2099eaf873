"""In cross-attention the mask speaks of the keys; here as many of its entries are used as there are queries."""

from effzoo.attention import Mask, register
from effzoo.attention.perceiver import Perceiver

KILLED_BY = "crosses_to_a_source"


@register("mutant")
class Mutant(Perceiver):
    """Latent attention that reads at most as many keys as there are queries."""

    def forward(self, q, k, v, *, mask, memory=None):
        n = q.shape[2]
        valid = None if mask.valid is None else mask.valid[:, :n]
        return super().forward(q, k[:, :, :n], v[:, :, :n], mask=Mask(valid), memory=memory)
