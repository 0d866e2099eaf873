"""The attention layer: projections, an attention core of any kind, and the output projection."""

from __future__ import annotations

import math
from typing import Any

from einops import rearrange, repeat
from torch import Tensor, nn

from effzoo.attention.core import AttentionCore, Cache, Context, Mask, State, take_positions
from effzoo.blocks.positions import Rotary, rotate
from effzoo.devices import is_portable
from effzoo.errors import IncompatibleError
from effzoo.registry import attention as registry
from effzoo.sites import HookContext, KeysValues, Linear, Memory, MemorySite, RMSNorm, RMSNormPlusOne, calling
from effzoo.sites.dtypes import autocasts
from effzoo.spec import Spec

KEY_SIDE = ("key", "value")  # what may come from another sequence and have fewer heads


class Attention(nn.Module):
    """o(core(q(x), k(x), v(x))), [batch, n, dim] -> [batch, n, dim].

    The core declares its projections; each is a Linear site with the role `attn.NAME`.

    bias, out_bias: of the projections, and of the output o.
    kv_heads: number of heads of keys and values, each shared by heads / kv_heads heads of queries (grouped queries,
        Ainslie et al. 2023, arXiv:2305.13245); None: all.
    rotary: rotary positions of queries and keys.
    qk_norm: eps of an RMSNorm of queries and keys over each head, before the rotation; None: no norm.
    qk_joint: the norm is over all heads of a token together (OLMo 2).
    qk_plus_one: it multiplies by 1 + w (Gemma 3).
    score_dim: scores are q . k / sqrt(score_dim); None: of the width of a head.
    source_dim: width of the other sequence in cross-attention.
    role: of the sites, `ROLE.NAME`.
    value_dim: width of the values of a head; None: `context.head_dim`.
    out_dim: width of the output; None: dim; 0: the heads side by side, without o.
    """

    def __init__(
        self,
        dim: int,
        spec: Spec,
        context: Context,
        *,
        bias: bool = True,
        out_bias: bool | None = None,
        kv_heads: int | None = None,
        rotary: Rotary | None = None,
        qk_norm: float | None = None,
        qk_joint: bool = False,
        qk_plus_one: bool = False,
        score_dim: float | None = None,
        source_dim: int | None = None,
        value_dim: int | None = None,
        out_dim: int | None = None,
        role: str = "attn",
    ):
        super().__init__()
        self.core: AttentionCore = registry.create(spec, context)
        self.rotary, self.kv_heads = rotary, kv_heads or context.heads
        if source_dim is not None:
            self._check_crosses()
        value_dim = value_dim or context.head_dim
        self._joint, self._stretch = qk_joint, self._stretched(score_dim)
        self.norms = nn.ModuleDict()
        for name, side in self.core.projections.items():
            width = self.heads(name) * (value_dim if side == "value" else context.head_dim)
            inputs = source_dim if source_dim is not None and side in KEY_SIDE else dim
            linear = Linear(inputs, width, bias=bias, role=f"{role}.{name}", layer=context.layer)
            linear.heads = self.heads(name)
            self.add_module(name, linear)
            if qk_norm is not None and side != "value":
                kind = RMSNormPlusOne if qk_plus_one else RMSNorm
                normed = width if qk_joint else context.head_dim
                self.norms[name] = kind(normed, qk_norm, role=f"{role}.norm.{name}", layer=context.layer)
        inner = context.heads * value_dim
        self.o = None
        if out_dim != 0:
            self.o = Linear(
                inner,
                out_dim or dim,
                bias=bias if out_bias is None else out_bias,
                role=f"{role}.o",
                layer=context.layer,
            )
            self.o.heads = context.heads
        self.memory = MemorySite(
            self.kv_heads, context.head_dim, value_dim=value_dim, role=f"{role}.memory", layer=context.layer
        )

    def forward(
        self,
        x: Tensor,
        mask: Mask,
        *,
        source: Tensor | None = None,
        cache: Cache | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """x [batch, n, dim] -> [batch, n, dim].

        mask: the positions of x, of the source in cross-attention.
        source [batch, s, source_dim]: the other sequence in cross-attention.
        cache: of a causal model that decodes; in cross-attention it keeps what is projected of the source.
        wanted int[batch, r]: the positions whose outputs are wanted, [batch, r, dim]; None for all.
        """
        if mask.documents is not None:
            joined: Tensor = mask.documents.each(x, mask, self.forward)
            return joined
        if source is not None:
            self._check_crosses()
        valid = None if mask.valid is None or source is not None else mask.valid[:, -x.shape[1] :]
        with calling(context := HookContext(valid, mask, x, self.keys_values)):
            if source is not None:  # a memory stands beside the keys, which are the source's
                context = HookContext(mask.valid, mask, source, self.keys_values)
            return self._attended(x, mask, source, cache, wanted, context)

    def _attended(
        self,
        x: Tensor,
        mask: Mask,
        source: Tensor | None,
        cache: Cache | None,
        wanted: Tensor | None,
        context: HookContext,
    ) -> Tensor:
        core = self.core
        memory, gated = self.memories(context)
        used = core.uses(mask)
        if source is not None and not autocasts(x):
            source = source.to(x.dtype)
        kept = None if source is None or cache is None else cache.sources.setdefault(core.context.layer, {})
        projected = [
            self._projected(name, x, source, mask, kept) if name in used else None for name in core.projections
        ]
        at = (
            wanted if core.has_forward_at and not is_portable() else None
        )  # else all outputs are computed, and the wanted ones are taken
        if at is not None:
            for index, side in enumerate(core.projections.values()):
                q = projected[index]
                projected[index] = take_positions(q, at) if q is not None and side == "query" else q
        given: dict[str, Any] = {"mask": mask} if memory is None else {"mask": mask, "memory": memory}
        if mask.over_ranks is not None:
            heads = mask.over_ranks(core, *projected, group=core.context.heads // self.kv_heads, **given)
        elif at is not None:
            heads = core.forward_at(at, *projected, **given)
        elif cache is None or source is not None:
            # of projections that the kind compresses, its definition takes what comes before
            written_out = is_portable() and type(core).project is AttentionCore.project
            compute: Any = core.dense if written_out else core
            heads = compute(*projected, **given)
        else:
            layer = core.context.layer
            heads, cache.states[layer] = core.step(*projected, past=cache.states.get(layer), **given)
        for extra in gated:
            assert extra.gate is not None
            keys_values = self._grouped(extra.keys), self._grouped(extra.values)
            added = core.attend_memory(*projected, mask=mask, memory=keys_values, wanted=at)
            added = extra.gate[..., None, None] * added
            heads = heads + added.to(heads.dtype)
        if wanted is not None and at is None:
            heads = take_positions(heads, wanted)
        merged = heads.transpose(1, 2).flatten(2)
        return merged if self.o is None else self.o(merged)

    def _projected(self, name: str, x: Tensor, source: Tensor | None, mask: Mask, kept: State | None) -> Tensor:
        """A projection of x, or of the source, which is made once where it is kept."""
        if source is None or not self.on_key_side(name):
            return self.project(name, x, mask)
        if kept is None:
            return self.project(name, source, mask)
        if name not in kept:
            kept[name] = self.project(name, source, mask)
        return kept[name]

    def heads(self, name: str) -> int:
        """Number of heads of a projection: keys and values may have fewer."""
        return self.kv_heads if self.on_key_side(name) else self.core.context.heads

    def on_key_side(self, name: str) -> bool:
        """Whether a projection is keys or values."""
        return self.core.projections[name] in KEY_SIDE

    def _stretched(self, score_dim: float | None) -> float:
        """What queries are multiplied by, so that a kind's q . k / sqrt(head_dim) is q . k / sqrt(score_dim)."""
        context = self.core.context
        if context.score_cap and not self.core.takes_cap():
            raise IncompatibleError(
                f"attention {self.core.name!r} has no cap of its scores; use one that is a predicate (full, "
                "longformer, local, blockwise), or score_cap=0"
            )
        if score_dim is None or score_dim == context.head_dim:
            return 1.0
        if "query and key" in self.core.projections.values():
            raise IncompatibleError(
                f"attention {self.core.name!r} has one projection for queries and keys, whose scores are divided by "
                "the root of the width of a head; use another kind, or score_dim=0"
            )
        if not self.core.scaled:
            if score_dim == 1:
                return 1.0
            raise IncompatibleError(
                f"attention {self.core.name!r} divides q . k by nothing, got score_dim={score_dim:g}; use another "
                "kind, or score_dim=0 or 1"
            )
        return math.sqrt(context.head_dim / score_dim)

    def _check_crosses(self) -> None:
        if not self.core.crosses:
            raise IncompatibleError(
                f"attention {self.core.name!r} attends within one sequence only; use 'full' for cross-attention"
            )

    def project(self, name: str, x: Tensor, mask: Mask) -> Tensor:
        """A projection of x, [batch, heads, n, head_dim]: with norm and rotation, and grouped heads repeated."""
        side = self.core.projections[name]
        turned = side != "value" and (self.rotary is not None or name in self.norms)
        linear = getattr(self, name)
        flat = linear(x) if turned else self.core.project(name, x, linear, mask)
        if self._joint and name in self.norms:
            flat = self.norms[name](flat)
        count = self.heads(name)
        heads = flat.unflatten(-1, (count, flat.shape[-1] // count)).transpose(1, 2)
        if name in self.norms and not self._joint:
            heads = self.norms[name](heads)
        if turned and self.rotary is not None:
            rotary, position_ids = self.rotary, mask.position_ids
            if position_ids is None:
                raise IncompatibleError(
                    "rotary positions need mask.position_ids; call the model rather than the block, or give them"
                )
            angles = mask.memo(rotary, lambda: rotary.angles(position_ids))
            heads = rotate(heads, *angles)
        if side == "query" and self._stretch != 1:
            heads = heads * self._stretch
        return self._grouped(heads)

    def keys_values(self, x: Tensor) -> KeysValues:
        """Keys [..., kv_heads, r, head_dim] and values that this layer projects from x [..., r, source_dim], without
        rotation."""
        key, value = (
            next(name for name, side in self.core.projections.items() if what in side) for what in ("key", "value")
        )
        flat = getattr(self, key)(x)
        flat = self.norms[key](flat) if self._joint and key in self.norms else flat
        keys, values = (
            rearrange(y, "... r (h d) -> ... h r d", h=self.heads(name))
            for name, y in ((key, flat), (value, getattr(self, value)(x)))
        )
        return self.norms[key](keys) if key in self.norms and not self._joint else keys, values

    def memories(self, context: HookContext) -> tuple[KeysValues | None, list[Memory]]:
        """The memory that joins the softmax, with all heads of queries, and the memories with a softmax of their
        own."""
        memory, gated = self.memory(context)
        if memory is None:
            return None, gated
        self.core.check_memory()
        return (self._grouped(memory[0]), self._grouped(memory[1])), gated

    def _grouped(self, heads: Tensor) -> Tensor:
        """[..., kv_heads, n, d] -> [..., heads, n, d], each head repeated for its group of queries."""
        group = self.core.context.heads // heads.shape[-3]
        return heads if group == 1 else repeat(heads, "... h n d -> ... (h group) n d", group=group)
