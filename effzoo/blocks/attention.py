"""The attention layer: projections, an attention core of any kind, and the output projection."""

from __future__ import annotations

from typing import Any

from einops import rearrange, repeat
from torch import Tensor, nn

from effzoo.attention.core import AttentionCore, Cache, Context, Mask, take_positions
from effzoo.blocks.positions import Rotary, rotate
from effzoo.errors import IncompatibleError
from effzoo.registry import attention as registry
from effzoo.sites import HookContext, KeysValues, Linear, Memory, MemorySite, RMSNorm, calling
from effzoo.sites.dtypes import autocasts
from effzoo.spec import Spec

KEY_SIDE = ("key", "value")  # of what is attended alone, which may come from another sequence and have fewer heads


class Attention(nn.Module):
    """o(core(q(x), k(x), v(x), ...)), [batch, n, dim] -> [batch, n, dim].

    The core declares which projections it eats; each becomes a Linear site with the role `attn.<projection>`. This
    layer knows no attention kind. Slots, all optional:

    bias, out_bias: of the projections and of the output.
    kv_heads: fewer heads on the key side, each shared by heads / kv_heads query heads (grouped queries, Ainslie et
        al. 2023, arXiv:2305.13245).
    rotary: turns what is compared.
    qk_norm: eps of an RMSNorm over each head of what is compared, before it is turned.
    source_dim: width of the source in cross-attention.
    value_dim: width of a value head where it differs from `context.head_dim`.
    out_dim: width of the result, dim when None, 0 for the heads side by side.
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
        source_dim: int | None = None,
        value_dim: int | None = None,
        out_dim: int | None = None,
    ):
        super().__init__()
        self.core: AttentionCore = registry.create(spec, context)
        self.rotary, self.kv_heads = rotary, kv_heads or context.heads
        if source_dim is not None:
            self._check_crosses()
        value_dim = value_dim or context.head_dim
        self.norms = nn.ModuleDict()
        for name, side in self.core.projections.items():
            width = self.heads(name) * (value_dim if side == "value" else context.head_dim)
            inputs = source_dim if source_dim is not None and side in KEY_SIDE else dim
            linear = Linear(inputs, width, bias=bias, role=f"attn.{name}", layer=context.layer)
            linear.heads = self.heads(name)
            self.add_module(name, linear)
            if qk_norm is not None and side != "value":
                self.norms[name] = RMSNorm(context.head_dim, qk_norm, role=f"attn.norm.{name}", layer=context.layer)
        inner = context.heads * value_dim
        self.o = None
        if out_dim != 0:
            self.o = Linear(
                inner, out_dim or dim, bias=bias if out_bias is None else out_bias, role="attn.o", layer=context.layer
            )
            self.o.heads = context.heads
        self.memory = MemorySite(
            self.kv_heads, context.head_dim, value_dim=value_dim, role="attn.memory", layer=context.layer
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
        """source [batch, s, source_dim]: what is attended in cross-attention; mask then speaks of it. cache: of a
        causal model that decodes.
        wanted [batch, r]: the positions whose outputs are wanted, [batch, r, dim]; None for all."""
        if source is not None:
            self._check_crosses()
        valid = None if mask.valid is None or source is not None else mask.valid[:, -x.shape[1] :]
        with calling(context := HookContext(valid, mask, x, self.keys_values)):
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
        memory, gated = self.remembered(context)
        used = core.uses(mask)
        if source is not None and not autocasts(x):
            source = source.to(x.dtype)
        inputs = {name: source if source is not None and self.on_key_side(name) else x for name in used}
        projected = [self.project(name, inputs[name], mask) if name in used else None for name in core.projections]
        at = wanted if core.has_forward_at else None  # else all outputs are computed, and the wanted ones are taken
        if at is not None:
            for index, side in enumerate(core.projections.values()):
                q = projected[index]
                projected[index] = take_positions(q, at) if q is not None and side == "query" else q
        given: dict[str, Any] = {"mask": mask} if memory is None else {"mask": mask, "memory": memory}
        if at is not None:
            heads = core.forward_at(at, *projected, **given)
        elif cache is None:
            heads = core(*projected, **given)
        else:
            layer = core.context.layer
            heads, cache.states[layer] = core.step(*projected, past=cache.states.get(layer), **given)
        for extra in gated:
            assert extra.gate is not None
            own = self._grouped(extra.keys), self._grouped(extra.values)
            added = extra.gate[..., None, None] * core.attend_memory(*projected, mask=mask, memory=own, wanted=at)
            heads = heads + added.to(heads.dtype)
        if wanted is not None and at is None:
            heads = take_positions(heads, wanted)
        merged = heads.transpose(1, 2).flatten(2)
        return merged if self.o is None else self.o(merged)

    def heads(self, name: str) -> int:
        """How many heads a projection has: those of the key side may be grouped."""
        return self.kv_heads if self.on_key_side(name) else self.core.context.heads

    def on_key_side(self, name: str) -> bool:
        """Whether a projection is of what is attended, and of that alone."""
        return self.core.projections[name] in KEY_SIDE

    def _check_crosses(self) -> None:
        if not self.core.crosses:
            raise IncompatibleError(
                f"attention {self.core.name!r} attends within one sequence only; use 'full' for cross-attention"
            )

    def project(self, name: str, x: Tensor, mask: Mask) -> Tensor:
        """One projection, [batch, heads, n, head_dim]: normalised and turned where it is compared, repeated where its
        heads are grouped."""
        turned = self.core.projections[name] != "value" and (self.rotary is not None or name in self.norms)
        linear = getattr(self, name)
        flat = linear(x) if turned else self.core.project(name, x, linear, mask)
        count = self.heads(name)
        heads = flat.unflatten(-1, (count, flat.shape[-1] // count)).transpose(1, 2)
        if name in self.norms:
            heads = self.norms[name](heads)
        if turned and self.rotary is not None:
            rotary, positions = self.rotary, mask.positions
            if positions is None:
                raise IncompatibleError(
                    "rotary positions need mask.positions; call the model rather than the block, or give them"
                )
            angles = mask.memo(rotary, lambda: rotary.angles(positions))
            heads = rotate(heads, *angles)
        return self._grouped(heads)

    def keys_values(self, rows: Tensor) -> KeysValues:
        """What this layer's projections make of rows [..., r, source_dim]: keys [..., kv_heads, r, head_dim] and
        values, not rotated."""
        names = [
            next(name for name, side in self.core.projections.items() if what in side) for what in ("key", "value")
        ]
        found = [rearrange(getattr(self, name)(rows), "... r (h d) -> ... h r d", h=self.heads(name)) for name in names]
        return self.norms[names[0]](found[0]) if names[0] in self.norms else found[0], found[1]

    def remembered(self, context: HookContext) -> tuple[KeysValues | None, list[Memory]]:
        """Keys and values of the memory site that join the softmax, one for each query head, and those with a softmax
        of their own."""
        memory, gated = self.memory(context)
        if memory is None:
            return None, gated
        self.core.check_memory()
        return (self._grouped(memory[0]), self._grouped(memory[1])), gated

    def _grouped(self, heads: Tensor) -> Tensor:
        """[..., kv_heads, rows, d] -> [..., heads, rows, d]; what has all heads stays."""
        group = self.core.context.heads // heads.shape[-3]
        return heads if group == 1 else repeat(heads, "... h n d -> ... (h group) n d", group=group)
