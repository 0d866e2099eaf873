"""Longformer attention: a sliding window, dilated on some heads, and a few global tokens (Beltagy et al. 2020, arXiv:2004.05150, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from effzoo.annotations import Count
from effzoo.attention import reference
from effzoo.attention.band import Band
from effzoo.attention.core import AttentionCore, Context, KeysValues, Mask, State, memory_part, of_heads
from effzoo.attention.part import Part, bias_of
from effzoo.errors import InputError, OptionError
from effzoo.registry import attention


@attention.register("longformer", "sliding_window")
class Longformer(AttentionCore):
    """Token i sees |i - j| <= window / 2 and the global tokens; global tokens see everything, with projections of their own.

    Local rows:   softmax over {j : |i - j| <= dilation window / 2, dilation divides i - j} and {j : j global} of q_i . k_j / sqrt(d).
    Global rows:  softmax over all j of q_global_i . k_global_j / sqrt(d), applied to v_global.
    With causal attention every set is cut to j <= i. A global key is counted once, with the local projections, for local rows.
    Cost O(n window + n globals).

    window: even, positive; the whole width, as in HF Longformer (the paper's and allenai's one-sided width is half of it). One
    number, or one per layer: the paper goes from small windows in low layers to large ones in high layers. dilation: 1 for none; one number,
    or one per head (2 on two heads of the upper layers in the paper; give a spec per layer for that). global_projections: whether
    global rows have projections of their own (without: section 5's ablation; Mistral, ModernBERT); None: in encoders, as decoders mark no
    token unless asked to, and what no batch reaches would be counted and trained for nothing. max_globals: room for global tokens
    per sequence under torch.compile, where shapes must be known; more raise an error. Without compilation there is no limit.

    Decoding keeps the last dilation window / 2 keys and the global ones; tokens that follow the prompt cannot be global.
    """

    paper = "Beltagy et al. 2020, Longformer, arXiv:2004.05150, sections 3.1 and 3.2"
    projections: tuple[str, ...] = ("q", "k", "v", "q_global", "k_global", "v_global")
    key_side = ("k", "v", "k_global", "v_global")
    row_side = ("q", "q_global")
    copied_from = {"q_global": "q", "k_global": "k", "v_global": "v"}
    cost = "n * window"
    supports_global = True
    supports_cache = True
    shift_invariant = True

    def __init__(
        self,
        context: Context,
        *,
        window: Count | Sequence[Count] = 512,
        dilation: Count | Sequence[Count] = 1,
        global_projections: bool | None = None,
        max_globals: Count = 16,
    ):
        super().__init__(context)
        windows = [window] * context.layers if isinstance(window, int) else list(window)
        dilations = [dilation] * context.heads if isinstance(dilation, int) else list(dilation)
        if len(windows) != context.layers:
            raise OptionError(f"longformer has {len(windows)} windows for {context.layers} layers; give one number, or one per layer")
        if any(w <= 0 or w % 2 for w in windows):
            raise OptionError(f"longformer windows are even and positive (the whole width), got {window}; try {max(2, 2 * (max(windows) // 2))}")
        if len(dilations) != context.heads or min(dilations) < 1:
            raise OptionError(f"longformer dilation is 1 (none) or more, one number or one for each of {context.heads} heads, got {dilation}")
        if max(dilations) > max(2, context.max_length):
            raise OptionError(f"longformer dilation is at most max_length, {context.max_length}, got {dilation}; beyond it a token sees itself alone")
        self.reach, self.dilations, self.max_globals = windows[context.layer] // 2, tuple(dilations), max_globals
        if not (context.global_tokens and not context.causal if global_projections is None else global_projections):
            self.projections = self.projections[:3]

    def uses(self, mask: Mask) -> tuple[str, ...]:
        return self.projections if mask.is_global is not None else self.projections[:3]

    def forward(  # type: ignore[override]
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_global: Tensor | None = None,
        k_global: Tensor | None = None,
        v_global: Tensor | None = None,
        *,
        mask: Mask,
        memory: KeysValues | None = None,
    ) -> Tensor:
        out = self._local_rows(q, k, v, mask, memory)
        if mask.is_global is None:
            return out
        if q_global is None or k_global is None or v_global is None:
            q_global, k_global, v_global = q, k, v
        return self._global_rows(out, q_global, k_global, v_global, mask, memory)

    def _local_rows(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, memory: KeysValues | None) -> Tensor:
        """Window, global columns and memory; heads of one dilation at a time."""
        rows: list[Tensor | None] = [None] * len(self.dilations)
        for dilation in dict.fromkeys(self.dilations):
            heads = [head for head, own in enumerate(self.dilations) if own == dilation]
            every = len(heads) == len(rows)
            of_q, of_k, of_v = (x if every else x[:, heads] for x in (q, k, v))
            of_memory = memory if every else of_heads(memory, heads)
            window = self._window(of_q, of_k, of_v, mask, dilation)
            out = self.attend(window, self._global_columns(of_q, of_k, of_v, mask), memory_part(of_q, of_memory))
            if every:
                return out
            for place, head in enumerate(heads):
                rows[head] = out[:, place]
        return torch.stack([row for row in rows if row is not None], dim=1)

    def _window(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, dilation: int) -> Part:
        """Local keys that are tokens; the global ones are a part of their own."""
        band = Band.of(q.shape[2], self.reach, 0 if self.context.causal else self.reach, dilation)

        def given() -> list[Tensor | None]:
            if mask.is_global is None:
                return band.given(mask.valid, q)
            return band.given(~mask.is_global if mask.valid is None else mask.valid & ~mask.is_global, q)

        return Part(q, k, v, mask.memo(("window", band, q.dtype), given), band=band)

    def _global_columns(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Part | None:
        """Every query sees the global keys, gathered to the front of [batch, globals] and padded with a bias."""
        if mask.is_global is None:
            return None
        where, held = self._gathered(mask)
        allowed = held[:, None, None, :]
        if self.context.causal:
            allowed = allowed & (where[:, None, None, :] <= torch.arange(q.shape[2], device=q.device)[:, None])
        bias = mask.memo(("global columns", q.dtype), lambda: bias_of(allowed, q.dtype))
        return Part(q, _at(k, where), _at(v, where), bias)

    def _global_rows(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask, memory: KeysValues | None) -> Tensor:
        """The rows of global tokens, replaced by attention over all tokens with the global projections."""
        where, _ = self._gathered(mask)
        queries = _at(q, where)
        allowed = reference.padding(q.shape[2], mask.valid, q.device)
        if self.context.causal:
            allowed = allowed & (torch.arange(q.shape[2], device=q.device) <= where[:, None, :, None])
        bias = mask.memo(("global rows", q.dtype), lambda: bias_of(allowed, q.dtype))
        rows = self.attend(Part(queries, k, v, bias), memory_part(queries, memory))
        assert mask.is_global is not None  # a scatter would be as short, but compiled code then reads what it has overwritten (torch 2.13)
        slot = (mask.is_global.cumsum(dim=1) - 1).clamp(min=0)
        return torch.where(mask.is_global[:, None, :, None], _at(rows, slot), out)

    def _gathered(self, mask: Mask) -> tuple[Tensor, Tensor]:
        """Positions of the global tokens of each example, [batch, most globals], and which of these slots hold one."""
        is_global = mask.is_global
        assert is_global is not None

        def make() -> tuple[Tensor, Tensor]:
            count = is_global.sum(dim=1)
            if torch.compiler.is_compiling():
                most = min(self.max_globals, is_global.shape[1])
                torch._assert_async((count <= most).all(), f"more than {most} global tokens in a sequence; raise longformer[max_globals=...]")
            else:
                most = 1 if count.is_meta else max(int(count.max()), 1)
            where = is_global.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
            return where, torch.arange(most, device=where.device) < count[:, None]

        found: tuple[Tensor, Tensor] = mask.memo("gathered", make)
        return found

    def rows(self, where: Tensor, *projected: Tensor, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        q, k, v, *of_global = projected
        gap = (where[:, :, None] - torch.arange(k.shape[2], device=q.device))[:, None]
        seen = gap >= 0 if self.context.causal else torch.ones_like(gap, dtype=torch.bool)
        if mask.valid is not None:
            seen = seen & mask.valid[:, None, None, :]
        dilation = torch.tensor(self.dilations, device=q.device)[:, None, None]
        near = (gap.abs() <= self.reach * dilation) & (gap % dilation == 0)
        if mask.is_global is not None:
            near = near | mask.is_global[:, None, None, :]
        out = self.attend(Part(q, k, v, bias_of(seen & near, q.dtype)), memory_part(q, memory))
        if mask.is_global is None:
            return out
        q, k, v = of_global or (q, k, v)
        whole = self.attend(Part(q, k, v, bias_of(seen, q.dtype)), memory_part(q, memory))
        return torch.where(mask.is_global.gather(1, where)[:, None, :, None], whole, out)

    def alone(self, *projected: Tensor, mask: Mask, memory: KeysValues, where: Tensor | None = None) -> Tensor:
        q, q_global = projected[0], projected[3] if len(projected) > 3 else None
        if q_global is not None and mask.is_global is not None:
            is_global = mask.is_global if where is None else mask.is_global.gather(1, where)
            q = torch.where(is_global[:, None, :, None], q_global, q)
        return self.attend(memory_part(q, memory))

    def step(  # type: ignore[override]
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_global: Tensor | None = None,
        k_global: Tensor | None = None,
        v_global: Tensor | None = None,
        *,
        mask: Mask,
        past: State | None,
        memory: KeysValues | None = None,
    ) -> tuple[Tensor, State]:
        kept = self.reach * max(self.dilations)  # how far back a later query can look
        if past is None:
            return self(q, k, v, q_global, k_global, v_global, mask=mask, memory=memory), self._state(k, v, mask, kept)
        if mask.is_global is not None:
            raise InputError(
                "tokens that follow the prompt cannot be global: keys that they would need are not in the cache; mark them in the prompt"
            )
        k, v = torch.cat([past["k"], k], dim=2), torch.cat([past["v"], v], dim=2)
        is_global = F.pad(past["is_global"], (0, q.shape[2]))
        new, total = q.shape[2], k.shape[2]
        distance = torch.arange(total - new, total, device=q.device)[:, None] - torch.arange(total, device=q.device)
        dilation = torch.tensor(self.dilations, device=q.device)[:, None, None]
        allowed = (distance >= 0) & (distance <= self.reach * dilation) & (distance % dilation == 0) & ~is_global[:, None, None, :]
        if mask.valid is not None:
            allowed = allowed & mask.valid[:, None, None, -total:]
        columns = None
        if past["k_global"].shape[2]:
            columns = Part(q, past["k_global"], past["v_global"], bias_of(past["held"][:, None, None, :], q.dtype))
        out = self.attend(Part(q, k, v, bias_of(allowed, q.dtype)), columns, memory_part(q, memory))
        window = {"k": k[:, :, -kept:], "v": v[:, :, -kept:], "is_global": is_global[:, -kept:]}
        return out, {**past, **window}

    def _state(self, k: Tensor, v: Tensor, mask: Mask, kept: int) -> State:
        """What decoding needs of a prompt: the last `kept` keys and values, and those of the global tokens."""
        batch, _, n, _ = k.shape
        where, held = torch.zeros(2, batch, 0, dtype=torch.long, device=k.device)
        is_global = torch.zeros(batch, n, dtype=torch.bool, device=k.device)
        if mask.is_global is not None:
            is_global = mask.is_global
            where, held = self._gathered(mask)
        return {
            "k": k[:, :, -kept:], "v": v[:, :, -kept:], "is_global": is_global[:, -kept:],
            "k_global": _at(k, where), "v_global": _at(v, where), "held": held.bool(),
        }  # fmt: skip

    def pattern(self, n: int, mask: Mask) -> Tensor:
        allowed = reference.padding(n, mask.valid)
        distance = reference.distance(n, allowed.device)
        dilation = torch.tensor(self.dilations, device=allowed.device)[:, None, None]
        in_sight = ((distance.abs() <= self.reach * dilation) & (distance % dilation == 0))[None]
        if mask.is_global is not None:
            in_sight = in_sight | mask.is_global[:, None, None, :] | mask.is_global[:, None, :, None]
        return allowed & in_sight & (distance >= 0) if self.context.causal else allowed & in_sight

    def dense(self, *projected: Tensor, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        allowed = self.pattern(projected[0].shape[2], mask)
        q, k, v, *of_global = projected
        local = reference.dense(q, k, v, allowed, memory)
        if mask.is_global is None:
            return local
        q, k, v = of_global or (q, k, v)
        return torch.where(mask.is_global[:, None, :, None], reference.dense(q, k, v, allowed, memory), local)


def _at(x: Tensor, where: Tensor) -> Tensor:
    """Rows `where` [batch, g] of x [batch, heads, n, d] -> [batch, heads, g, d]."""
    return x.gather(2, where[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
