"""Cross-attention between arrays of different lengths: latents read the input, output queries read the latents."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effzoo.attention import reference
from effzoo.attention.core import AttentionCore, Context, Mask, memory_part
from effzoo.attention.part import Part
from effzoo.blocks import Attention, FeedForward, Slots
from effzoo.sites import Branch, KeysValues, sites
from effzoo.spec import Spec


class Cross(nn.Module):
    """x <- x + attn(norm(x), norm(source)); x <- x + mlp(norm(x)), [batch, m, dim] reading [batch, n, source_dim].

    Cost O(m n) (Jaegle et al. 2021, arXiv:2103.03206, section 3.1).

    context.causal: x are the last m of the n positions, and see those before them and themselves.
    source_dim, value_dim: width of the source, and of a value head.
    residual: whether what is read adds to x or takes its place, which suits queries that mean something else than the
        output (Jaegle et al. 2022, arXiv:2107.14795).
    role: of the sites (`<role>.q`, `<role>.mlp.up`, ...), which belong to no block.
    """

    def __init__(self, slots: Slots, context: Context, *, source_dim: int, value_dim: int, residual: bool, role: str):
        super().__init__()
        self.norm = slots.make_norm(slots.dim, "norm")
        self.source_norm = slots.make_norm(source_dim, "source_norm")
        self.attn = Attention(
            slots.dim, Spec("full"), context, bias=slots.attn_bias, out_bias=slots.attn_out_bias,
            source_dim=source_dim, value_dim=value_dim,
        )  # fmt: skip
        if context.causal:
            self.attn.core = LastPositions(context)
        self.branch = Branch(slots.dim, role="branch")
        self.mlp_norm = slots.make_norm(slots.dim, "mlp.norm")
        self.mlp = FeedForward(
            slots.dim, slots.mlp, slots.activation, None, gated=slots.gated, bias=slots.mlp_bias, chunk=slots.mlp_chunk
        )
        self.mlp_branch = Branch(slots.dim, role="mlp.branch")
        self.dropout = nn.Dropout(slots.dropout)
        self.residual = residual
        # the layers inside are those of any block; here they have roles of their own, and no number
        for _, site in sites(self):
            site.role, site.layer = f"{role}.{site.role.removeprefix('attn.')}", None

    def forward(self, x: Tensor, source: Tensor, mask: Mask) -> Tensor:
        """x [batch, m, dim] reads source [batch, n, source_dim], of which `mask` says what is padding."""
        query = self.norm(x)
        read = self.branch(query, self.dropout(self.attn(query, mask, source=self.source_norm(source))))
        x = x + read if self.residual else read
        inner = self.mlp_norm(x)
        added: Tensor = self.mlp_branch(inner, self.dropout(self.mlp(inner)))
        return x + added


class LastPositions(AttentionCore):
    """Causal attention of the last m of n positions: query i, at position n - m + i, sees the keys j <= n - m + i.

    Two parts of one softmax: the n - m positions before all queries, and the triangle over the last m. No mask of m n
    entries is made (Hawthorne et al. 2022, Perceiver AR, arXiv:2202.07765, section 2.2).
    """

    name = "last_positions"
    paper = (
        "Hawthorne et al. 2022, General-purpose, long-context autoregressive modeling with Perceiver AR, "
        "arXiv:2202.07765, section 2.2"
    )

    @property
    def crosses(self) -> bool:
        return True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        before = k.shape[2] - q.shape[2]
        bias = mask.key_bias(q.dtype)
        earlier, later = (None, None) if bias is None else (bias[..., :before], bias[..., before:])
        prefix = Part(q, k[:, :, :before], v[:, :, :before], earlier) if before else None
        # torch.compile wants each input once
        triangle = Part(q.view_as(q), k[:, :, before:], v[:, :, before:], later, causal=True)
        return self.attend(prefix, triangle, memory_part(q, memory))

    def dense(self, *projected: Tensor, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        q, k, v = projected
        m, n = q.shape[2], k.shape[2]
        seen = torch.arange(n, device=q.device) <= torch.arange(n - m, n, device=q.device)[:, None]
        return reference.dense(q, k, v, reference.padding(n, mask.valid, q.device) & seen, memory)
