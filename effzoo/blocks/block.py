"""A transformer block: attention and feed-forward, each with a norm and a residual."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from effzoo.attention.core import Cache, Context, Mask, take_positions
from effzoo.blocks.attention import Attention
from effzoo.blocks.experts import Experts
from effzoo.blocks.feedforward import FeedForward
from effzoo.blocks.positions import Rotary
from effzoo.sites import Branch, HookContext, LayerNorm, Norm, RMSNorm, RMSNormPlusOne, Site, Stream, calling
from effzoo.sites.hooks import Mixture, positionwise
from effzoo.spec import Spec


@dataclass(frozen=True)
class Slots:
    """The parts of a block: sizes, norms, biases, positions, feed-forward.

    norm: "post", after the sum (BERT), "pre", before the sub-layer (GPT-2), "branch", after the sub-layer and before
        the sum (OLMo 2), or "sandwich", before and after the sub-layer (Gemma 2).
    first_norm: False: block 0 of a "pre" model has no norm before its attention (ModernBERT).
    value_dim: width of the values of a head, if it is not that of the keys.
    mlp_chunk: see `FeedForward`.
    expert_mlp: inner width of an expert; 0: mlp.
    experts: feed-forwards among which `router` chooses for each token; 0: one for every token.
    reads: cross-attention between the two, in the decoder of an encoder-decoder.
    activation_dropout: of the hidden units of the feed-forward.
    """

    dim: int
    mlp: int
    norm: Literal["pre", "post", "branch", "sandwich"] = "post"
    norm_kind: Literal["layer", "rms", "rms_plus_one"] = "layer"
    norm_bias: bool = True
    first_norm: bool = True
    eps: float = 1e-12
    activation: str = "gelu"
    gated: bool = False
    attn_bias: bool = True
    attn_out_bias: bool = True
    mlp_bias: bool = True
    mlp_out_bias: bool | None = None
    kv_heads: int | None = None
    qk_norm: bool | Literal["joint"] = False
    score_dim: float = 0.0
    value_dim: int = 0
    rotary: Rotary | None = None
    mlp_chunk: int = 0
    experts: int = 0
    expert_mlp: int = 0
    router: str = "switch"
    dropout: float = 0.0
    reads: bool = False
    activation_dropout: float = 0.0

    def make_norm(self, dim: int, role: str, layer: int | None = None) -> Norm:
        """A norm of the kind that the model has everywhere."""
        if self.norm_kind != "layer":
            kind = RMSNorm if self.norm_kind == "rms" else RMSNormPlusOne
            return kind(dim, self.eps, role=role, layer=layer)
        return LayerNorm(dim, self.eps, bias=self.norm_bias, role=role, layer=layer)


def attention_layer(slots: Slots, attention: Spec, context: Context) -> Attention:
    """The attention layer of a block."""
    return Attention(
        slots.dim, attention, context, bias=slots.attn_bias, out_bias=slots.attn_out_bias, kv_heads=slots.kv_heads,
        rotary=slots.rotary, qk_norm=slots.eps if slots.qk_norm else None, qk_joint=slots.qk_norm == "joint",
        qk_plus_one=slots.norm_kind == "rms_plus_one", score_dim=slots.score_dim or None,
        value_dim=slots.value_dim or None,
    )  # fmt: skip


def cross_attention(slots: Slots, context: Context) -> Attention:
    """The cross-attention of a block: full, of as many heads as the block's own, to states as wide as the block."""
    context = dataclasses.replace(context, causal=False, global_tokens=False, shared={})
    return Attention(
        slots.dim, Spec("full"), context, bias=slots.attn_bias, out_bias=slots.attn_out_bias, kv_heads=slots.kv_heads,
        qk_norm=slots.eps if slots.qk_norm else None, qk_joint=slots.qk_norm == "joint",
        qk_plus_one=slots.norm_kind == "rms_plus_one", score_dim=slots.score_dim or None, source_dim=slots.dim,
        value_dim=slots.value_dim or None, role="cross",
    )  # fmt: skip


def feed_forward(slots: Slots, context: Context) -> FeedForward | Experts:
    """The feed-forward of a block, or several behind a router."""
    width = slots.expert_mlp or slots.mlp if slots.experts else slots.mlp
    sizes = slots.dim, width, slots.activation, context.layer
    made = [
        FeedForward(
            *sizes,
            gated=slots.gated,
            bias=slots.mlp_bias,
            out_bias=slots.mlp_out_bias,
            chunk=slots.mlp_chunk,
            dropout=slots.activation_dropout,
        )
        for _ in range(max(1, slots.experts))
    ]
    return Experts(made, slots.dim, slots.router, causal=context.causal) if slots.experts else made[0]


class Block(nn.Module):
    """x + f(norm(x)), with f attention, cross-attention in a decoder that reads a source, and then the feed-forward.

    norm = "pre":    x <- x + attn(norm(x));    x <- x + mlp(norm(x))     (GPT-2)
    norm = "post":   x <- norm(x + attn(x));    x <- norm(x + mlp(x))     (BERT; Vaswani et al. 2017, arXiv:1706.03762)
    norm = "branch": x <- x + norm(attn(x));    x <- x + norm(mlp(x))     (OLMo 2: arXiv:2501.00656, section 2.1)
    norm = "sandwich": x <- x + norm_2(attn(norm(x))), the same with mlp  (Gemma 2: arXiv:2408.00118, section 2)

    `attend`, `read` and `feed` are the sub-layers with dropout and without residual; adapters that hang on
    `attn_branch`, `cross_branch` and `mlp_branch` see what they add to x, those on `stream` what comes out; in
    reversible residuals there is none.
    """

    shows_mask = True  # adapters are given the mask of the batch

    def __init__(self, slots: Slots, attention: Spec, context: Context):
        super().__init__()
        layer, dim = context.layer, slots.dim
        self.norm = slots.norm
        self.attn = attention_layer(slots, attention, context)
        self.attn_branch = Branch(dim, role="attn.branch", layer=layer)
        self.attn_norm = slots.make_norm(dim, "attn.norm", layer) if slots.first_norm or layer > 0 else None
        if slots.reads:
            self.cross = cross_attention(slots, context)
            self.cross_branch = Branch(dim, role="cross.branch", layer=layer)
            self.cross_norm = slots.make_norm(dim, "cross.norm", layer)
        self.reads = slots.reads
        self.mlp = feed_forward(slots, context)
        self.mlp_branch = Branch(dim, role="mlp.branch", layer=layer)
        self.mlp_norm = slots.make_norm(dim, "mlp.norm", layer)
        sandwich = slots.norm == "sandwich"
        self.attn_out_norm = slots.make_norm(dim, "attn.norm.out", layer) if sandwich else None
        if slots.reads:
            self.cross_out_norm = slots.make_norm(dim, "cross.norm.out", layer) if sandwich else None
        self.mlp_out_norm = slots.make_norm(dim, "mlp.norm.out", layer) if sandwich else None
        self.stream: Stream | None = Stream(dim, role="stream", layer=layer, causal=context.causal)
        self.dropout = nn.Dropout(slots.dropout)

    def calling(self, x: Tensor, mask: Mask, past: int = 0) -> AbstractContextManager[None]:
        """Inside, the adapters of the block are given the mask.

        past: positions in the cache.
        """
        return calling(HookContext(_tokens(x, mask, None), mask, past=past))

    def forward(self, x: Tensor, mask: Mask, cache: Cache | None = None, wanted: Tensor | None = None) -> Tensor:
        """x [batch, n, dim] -> [batch, n, dim].

        cache: of a causal model that decodes.
        wanted int[batch, r]: the positions whose outputs are wanted, [batch, r, dim]; None for all.
        """
        with self.calling(x, mask, 0 if cache is None else cache.length):
            out = self.sublayers(x, mask, cache, wanted)
            return out if self.stream is None else self.stream(out)

    def sublayers(self, x: Tensor, mask: Mask, cache: Cache | None, wanted: Tensor | None) -> Tensor:
        """Attention and feed-forward, and cross-attention between them, each with its norm and residual."""
        residual = x if wanted is None else take_positions(x, wanted)
        if self.norm == "post":
            assert self.attn_norm is not None
            x = self.attn_norm(residual + self.attend(x, mask, cache, wanted))
            if self.reads:
                x = self.cross_norm(x + self.read(x, mask, cache))
            return self.mlp_norm(x + self.feed(x, mask, wanted))
        if self.norm == "branch":
            x = residual + self.attend(x, mask, cache, wanted)
            if self.reads:
                x = x + self.read(x, mask, cache)
            return x + self.feed(x, mask, wanted)
        x = residual + self.attend(x if self.attn_norm is None else self.attn_norm(x), mask, cache, wanted)
        if self.reads:
            x = x + self.read(self.cross_norm(x), mask, cache)
        return x + self.feed(self.mlp_norm(x), mask, wanted)

    def attend(self, x: Tensor, mask: Mask, cache: Cache | None = None, wanted: Tensor | None = None) -> Tensor:
        """dropout(attn(x)) at the wanted positions; with the norm of the branch, if there is one."""
        added = self.attn(x, mask, cache=cache, wanted=wanted)
        end = self.attn_norm if self.norm == "branch" else self.attn_out_norm
        added = self.dropout(added if end is None else end(added))
        return self.attn_branch(x if wanted is None else take_positions(x, wanted), added)

    def read(self, x: Tensor, mask: Mask, cache: Cache | None = None) -> Tensor:
        """dropout(cross(x, source)), likewise."""
        source = mask.source
        assert source is not None  # the decoder sees to it
        added = self.cross(x, source.mask, source=source.states, cache=cache)
        end = self.cross_norm if self.norm == "branch" else self.cross_out_norm
        return self.cross_branch(x, self.dropout(added if end is None else end(added)))

    def feed(self, x: Tensor, mask: Mask, wanted: Tensor | None = None) -> Tensor:
        """dropout(mlp(x)), likewise; wanted: the positions of x, if they are not all."""
        tokens = _tokens(x, mask, wanted)
        added = self.mlp(x, tokens, mask) if isinstance(self.mlp, Experts) else self.mlp(x)
        end = self.mlp_norm if self.norm == "branch" else self.mlp_out_norm
        return self.mlp_branch(x, self.dropout(added if end is None else end(added)))

    @property
    def positionwise(self) -> bool:
        """Whether adapters and the router of experts compute each position by itself, so that some can be left out."""
        if isinstance(self.mlp, Experts) and not self.mlp.positionwise:
            return False
        hung = [module for part in self.modules() if isinstance(part, Site) for module in part.hung()]
        return all(map(positionwise, hung))

    @property
    def apart(self) -> bool:
        """Whether adapters, those of the attention layer aside, compute each position by itself, and no router there
        measures its batch."""
        for path, part in self.named_modules():
            for module in part.hung() if isinstance(part, Site) else ():
                if isinstance(module, Mixture) or not (path.startswith("attn.") or positionwise(module)):
                    return False
        return True


def _tokens(x: Tensor, mask: Mask, wanted: Tensor | None) -> Tensor | None:
    """Which positions of x hold a token; with a cache, mask.valid covers the past too."""
    if mask.valid is None:
        return None
    return mask.valid[:, -x.shape[1] :] if wanted is None else mask.valid.gather(1, wanted)
