"""Projected attention layers: a small attention per block, between two projections that all blocks share."""

from __future__ import annotations

import math
from collections.abc import Mapping

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.annotations import Count
from effzoo.errors import IncompatiblePeft, OptionError
from effzoo.peft.method import Layers, Method, Targets, predicts_next
from effzoo.registry import peft
from effzoo.sites import Branch, HookContext, PeftModule, Site


class PAL(PeftModule):
    """y' = y + V_D MHA(V_E x), MHA the softmax attention of all tokens without an output matrix.

    V_E: [width, dim].
    V_D: [dim, width].
    """

    def __init__(self, encode: nn.Linear, decode: nn.Linear, heads: int):
        super().__init__()
        self.encode, self.decode, self.heads = encode, decode, heads
        width = encode.out_features
        self.qkv = nn.Linear(width, 3 * width)
        nn.init.normal_(self.qkv.weight, std=width**-0.5)
        nn.init.zeros_(self.qkv.bias)

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        return y + self.decode(self.attention(self.encode(x), context.valid))

    def attention(self, x: Tensor, valid: Tensor | None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "... n (three h d) -> three ... h n d", three=3, h=self.heads)
        # all positions, where an example has no token: the softmax of nothing is NaN
        seen = None if valid is None else (valid | ~valid.any(dim=-1, keepdim=True))[..., None, None, :]
        return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=seen), "... h n d -> ... n (h d)")


@peft.register("pals", "pal", "projected_attention_layers")
class PALs(Method):
    """y' = y + V_D MHA(V_E x) at each feed-forward: a narrow attention for each block, V_E and V_D the same for all.

    width: of the narrow attention (204 in the paper, with 12 heads, at a model width of 768).
    heads: of it, a divisor of width.

    The paper adds it to a whole block, before its last norm; here it is added to the block's feed-forward, before the
    same norm, and reads the feed-forward's input. Every token sees every token, so its cost grows with n^2 on any
    attention kind. V_D starts at 0. A causal model, or the decoder of an encoder-decoder, is refused (layers= can name
    the encoder's): decoding step by step, the narrow attention would need a cache of its own.
    """

    paper = (
        "Stickland & Murray 2019, BERT and PALs: Projected attention layers for efficient adaptation in "
        "multi-task learning, arXiv:1902.02671"
    )
    accepts = (Branch,)
    default_targets = ("mlp.branch",)
    size = "width"
    learning_rate = 1e-3

    def __init__(self, *, width: Count = 48, heads: Count = 4, targets: Targets = None, layers: Layers = None):
        super().__init__(targets=targets, layers=layers)
        if width % heads:
            raise OptionError(f"pals: heads divides width, got width={width}, heads={heads}")
        self.width, self.heads = width, heads

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        if getattr(getattr(model, "config", None), "causal", False) or predicts_next(model, found):
            reason = "its narrow attention would need a cache of its own to decode with"
            raise IncompatiblePeft(self.name, "a causal model", reason, "use parallel, which reads each token alone")
        branch = next(iter(found.values()))
        assert isinstance(branch, Branch)
        self.encode, self.decode = nn.Linear(branch.dim, self.width), nn.Linear(self.width, branch.dim)
        nn.init.kaiming_uniform_(self.encode.weight, a=math.sqrt(5))
        for tensor in (self.encode.bias, self.decode.weight, self.decode.bias):
            nn.init.zeros_(tensor)

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Branch)
        return PAL(self.encode, self.decode, self.heads)
