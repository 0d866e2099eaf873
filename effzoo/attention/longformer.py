"""Longformer attention: a sliding window and a few global tokens (Beltagy et al. 2020, arXiv:2004.05150, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from effzoo.attention import reference
from effzoo.attention.core import AttentionCore, Context, KeysValues, Mask, memory_part
from effzoo.attention.kernel import Part, bias_of
from effzoo.errors import OptionError
from effzoo.registry import attention


@attention.register("longformer")
class Longformer(AttentionCore):
    """Token i sees |i - j| <= window / 2 and the global tokens; global tokens see everything, with projections of their own.

    Local rows:   softmax over {j : |i - j| <= window / 2} and {j : j global} of q_i . k_j / sqrt(d).
    Global rows:  softmax over all j of q_global_i . k_global_j / sqrt(d), applied to v_global.
    With causal attention every set is cut to j <= i. Cost O(n window + n globals).

    window: even, positive; the whole width, as in HF Longformer (the paper's and allenai's one-sided width is half of it).
    One number, or one per layer.

    A global key is counted once, with the local projections, for local rows.
    """

    paper = "Beltagy et al. 2020, Longformer, arXiv:2004.05150, sections 3.1 and 3.2"
    projections = ("q", "k", "v", "q_global", "k_global", "v_global")
    copied_from = {"q_global": "q", "k_global": "k", "v_global": "v"}
    cost = "n * window"
    supports_global = True

    def __init__(self, context: Context, *, window: int | Sequence[int] = 512):
        super().__init__(context)
        windows = [window] * context.layers if isinstance(window, int) else list(window)
        if len(windows) != context.layers:
            raise OptionError(f"longformer has {len(windows)} windows for {context.layers} layers; give one number, or one per layer")
        if any(w <= 0 or w % 2 for w in windows):
            raise OptionError(f"longformer windows are even and positive (the whole width), got {window}; try {max(2, 2 * (max(windows) // 2))}")
        self.reach = windows[context.layer] // 2

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
        out = self.attend(self._window(q, k, v, mask), self._global_columns(q, k, v, mask), memory_part(q, memory))
        if mask.is_global is None or q_global is None or k_global is None or v_global is None:
            return out
        return self._global_rows(out, q_global, k_global, v_global, mask, memory)

    def _window(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Part:
        """Chunks of queries, each with its own keys and `reach` more on the left (and right), folded into the batch."""
        batch, _, n, _ = q.shape
        left = max(1, min(self.reach, n - 1))  # a window wider than the sequence would only add padding
        right = 0 if self.context.causal else left
        chunk = max(min(2 * left, n), left)  # smaller tiles are slow, larger ones compute more masked pairs
        padded = _round_up(n, chunk)

        def fold(x: Tensor) -> Tensor:
            return rearrange(F.pad(x, (0, 0, 0, padded - n)), "b h (chunks c) d -> (b chunks) h c d", c=chunk)

        def unfold(x: Tensor) -> Tensor:
            return rearrange(x, "(b chunks) h c d -> b h (chunks c) d", b=batch)[:, :, :n]

        def fold_keys(x: Tensor) -> Tensor:
            x = F.pad(x, (0, 0, left, right + padded - n))
            chunks = rearrange(x[:, :, left : left + padded], "b h (chunks c) d -> (b chunks) h c d", c=chunk)
            before = rearrange(x[:, :, :padded], "b h (chunks c) d -> (b chunks) h c d", c=chunk)[:, :, :left]
            if not right:
                return torch.cat([before, chunks], dim=2)
            after = rearrange(x[:, :, left + right :], "b h (chunks c) d -> (b chunks) h c d", c=chunk)[:, :, chunk - right :]
            return torch.cat([before, chunks, after], dim=2)

        bias = mask.memo(
            ("window", self.reach, q.dtype), lambda: bias_of(self._window_allowed(batch, n, chunk, left, right, mask, q.device), q.dtype)
        )
        return Part(fold(q), fold_keys(k), fold_keys(v), bias, fold=fold, unfold=unfold)

    def _window_allowed(self, batch: int, n: int, chunk: int, left: int, right: int, mask: Mask, device: torch.device) -> Tensor:
        """bool[batch * chunks, 1, chunk, left + chunk + right]: in reach, inside the sequence, a token, and not global."""
        chunks = _round_up(n, chunk) // chunk
        query = torch.arange(chunk, device=device)[:, None]
        offset = torch.arange(-left, chunk + right, device=device)[None, :]  # of the key, from the chunk's first query
        in_reach = (query - offset <= left) & (offset - query <= right)
        here = torch.ones(batch, n, dtype=torch.bool, device=device) if mask.valid is None else mask.valid
        if mask.is_global is not None:
            here = here & ~mask.is_global
        here = F.pad(here, (left, right + chunks * chunk - n)).unfold(1, left + chunk + right, chunk)  # [b, chunks, keys]
        return rearrange(here, "b chunks keys -> (b chunks) 1 1 keys") & in_reach

    def _global_columns(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Part | None:
        """Every query sees the global keys, gathered to the front of [batch, globals] and padded with a bias."""
        if mask.is_global is None:
            return None
        where, held = _gathered(mask)
        index = where[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        allowed = held[:, None, None, :]
        if self.context.causal:
            allowed = allowed & (where[:, None, None, :] <= torch.arange(q.shape[2], device=q.device)[:, None])
        bias = mask.memo(("global columns", q.dtype), lambda: bias_of(allowed, q.dtype))
        return Part(q, k.gather(2, index), v.gather(2, index), bias)

    def _global_rows(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask, memory: KeysValues | None) -> Tensor:
        """The rows of global tokens, replaced by attention over all tokens with the global projections."""
        where, held = _gathered(mask)
        queries = q.gather(2, where[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        allowed = reference.padding(q.shape[2], mask.valid, q.device)
        if self.context.causal:
            allowed = allowed & (torch.arange(q.shape[2], device=q.device) <= where[:, None, :, None])
        bias = mask.memo(("global rows", q.dtype), lambda: bias_of(allowed, q.dtype))
        rows = self.attend(Part(queries, k, v, bias), memory_part(queries, memory))
        example, slot = held.nonzero(as_tuple=True)
        return out.transpose(1, 2).index_put((example, where[example, slot]), rows.transpose(1, 2)[example, slot]).transpose(1, 2)

    def pattern(self, n: int, mask: Mask) -> Tensor:
        allowed = reference.padding(n, mask.valid)
        distance = reference.distance(n, allowed.device)
        in_sight = (distance.abs() <= self.reach)[None, None]
        if mask.is_global is not None:
            in_sight = in_sight | mask.is_global[:, None, None, :] | mask.is_global[:, None, :, None]
        return allowed & in_sight & (distance >= 0) if self.context.causal else allowed & in_sight

    def dense(self, *projected: Tensor, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        allowed = self.pattern(projected[0].shape[2], mask)
        q, k, v, *of_global = projected
        local = reference.dense(q, k, v, allowed, memory)
        if mask.is_global is None:
            return local
        q, k, v = of_global
        return torch.where(mask.is_global[:, None, :, None], reference.dense(q, k, v, allowed, memory), local)


def _gathered(mask: Mask) -> tuple[Tensor, Tensor]:
    """Positions of the global tokens of each example, [batch, most globals], and which of these slots hold one."""
    is_global = mask.is_global
    assert is_global is not None
    count = is_global.sum(dim=1)

    def make() -> tuple[Tensor, Tensor]:
        most = max(int(count.max()), 1)
        where = is_global.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        return where, torch.arange(most, device=where.device) < count[:, None]

    return mask.memo("gathered", make)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
