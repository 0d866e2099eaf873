"""Full attention: every query sees every key (Vaswani et al. 2017, arXiv:1706.03762, section 3.2)."""

from __future__ import annotations

from torch import Tensor

from effzoo.attention import reference
from effzoo.attention.core import AttentionCore, KeysValues, Mask, memory_part
from effzoo.attention.kernel import Part
from effzoo.registry import attention


@attention.register("full")
class Full(AttentionCore):
    """Every query sees every key: softmax(q k^T / sqrt(d)) v, the baseline of every comparison."""

    paper = "Vaswani et al. 2017, Attention is all you need, arXiv:1706.03762, section 3.2"
    cost = "n^2"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, memory: KeysValues | None = None) -> Tensor:  # type: ignore[override]
        sequence = Part(q, k, v, bias=mask.key_bias(q.dtype), causal=self.context.causal)
        return self.attend(sequence, memory_part(q, memory))

    def pattern(self, n: int, mask: Mask) -> Tensor:
        allowed = reference.padding(n, mask.valid)
        return allowed & (reference.distance(n, allowed.device) >= 0) if self.context.causal else allowed.expand(-1, 1, n, n)
