"""A causal triangle that is one too wide: every query sees the next token."""

import torch

from effzoo.attention import Part, bias_of, memory_part, register
from effzoo.attention.full import Full

KILLED_BY = "future_is_unseen"


@register("mutant")
class Mutant(Full):
    """Full attention that looks one ahead."""

    def forward(self, q, k, v, *, mask, memory=None):
        if not self.context.causal:
            return super().forward(q, k, v, mask=mask, memory=memory)
        place = torch.arange(q.shape[2], device=q.device)
        allowed = (place <= place[:, None] + 1) & (
            torch.ones_like(place).bool() if mask.valid is None else mask.valid[:, None, None, :]
        )
        return self.attend(Part(q, k, v, bias_of(allowed, q.dtype)), memory_part(q, memory))
