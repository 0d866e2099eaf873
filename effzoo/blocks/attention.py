"""The attention layer: projections, an attention core of any kind, and the output projection."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from effzoo.attention.core import AttentionCore, Context, Mask
from effzoo.registry import attention as registry
from effzoo.sites import Linear, Memory
from effzoo.spec import Spec


class Attention(nn.Module):
    """o(core(q(x), k(x), v(x), ...)), [batch, n, dim] -> [batch, n, dim].

    The core declares which projections it eats; each becomes a Linear site with the role `attn.<projection>`. This layer
    knows no attention kind.
    """

    def __init__(self, dim: int, spec: Spec, context: Context):
        super().__init__()
        self.core: AttentionCore = registry.create(spec, context)
        inner = context.heads * context.head_dim
        for name in self.core.projections:
            self.add_module(name, Linear(dim, inner, role=f"attn.{name}", layer=context.layer))
        self.o = Linear(inner, dim, role="attn.o", layer=context.layer)
        self.memory = Memory(context.heads, context.head_dim, role="attn.memory", layer=context.layer)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        used = self.core.uses(mask)
        projected = [self.project(name, x) if name in used else None for name in self.core.projections]
        heads = self.core(*projected, mask=mask, memory=self.memory())
        return self.o(rearrange(heads, "b h n d -> b n (h d)"))

    def project(self, name: str, x: Tensor) -> Tensor:
        return rearrange(getattr(self, name)(x), "b n (h d) -> b h n d", h=self.core.context.heads)
