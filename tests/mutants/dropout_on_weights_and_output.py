"""Dropout acts on the weights and once more on the output, as in a public Linformer."""

from torch.nn import functional as F

from effzoo.attention import register
from effzoo.attention.linformer import Linformer

KILLED_BY = "dropout_keeps_the_mean"


@register("mutant")
class Mutant(Linformer):
    """Linformer that drops twice."""

    def forward(self, q, k, v, *, mask, memory=None):
        return F.dropout(super().forward(q, k, v, mask=mask, memory=memory), self.dropout)
