"""One transformer block: attention and feed-forward, each with a norm, a PEFT branch and a residual."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from effzoo.attention.core import Context, Mask
from effzoo.blocks.attention import Attention
from effzoo.blocks.feedforward import FeedForward
from effzoo.sites import Branch, LayerNorm
from effzoo.spec import Spec


class Block(nn.Module):
    """x <- x + attn(x); x <- x + mlp(x), with the norm after the sum (BERT, "post") or before the sub-layer (GPT-2, "pre").

    Slots are filled or absent: `attn_norm` and `mlp_norm` exist once, on the side that `norm` says.
    """

    def __init__(
        self, dim: int, mlp: int, attention: Spec, context: Context, *, norm: Literal["pre", "post"], eps: float, activation: str, dropout: float
    ):
        super().__init__()
        layer = context.layer
        self.norm = norm
        self.attn = Attention(dim, attention, context)
        self.attn_branch = Branch(dim, role="attn.branch", layer=layer)
        self.attn_norm = LayerNorm(dim, eps, role="attn.norm", layer=layer)
        self.mlp = FeedForward(dim, mlp, activation, layer)
        self.mlp_branch = Branch(dim, role="mlp.branch", layer=layer)
        self.mlp_norm = LayerNorm(dim, eps, role="mlp.norm", layer=layer)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        if self.norm == "post":
            x = self.attn_norm(x + self.attn_branch(x, self.dropout(self.attn(x, mask))))
            return self.mlp_norm(x + self.mlp_branch(x, self.dropout(self.mlp(x))))
        h = self.attn_norm(x)
        x = x + self.attn_branch(h, self.dropout(self.attn(h, mask)))
        h = self.mlp_norm(x)
        return x + self.mlp_branch(h, self.dropout(self.mlp(h)))
