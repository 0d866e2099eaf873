"""Attention by features: the weight of a pair is phi(q_i) . phi(k_j), so keys and values enter as sums over positions.

    out_i = phi(q_i) S_i / phi(q_i) z_i,    S_i = sum_j phi(k_j) v_j^T,    z_i = sum_j phi(k_j),

over all tokens j, or those up to i when causal (Katharopoulos et al. 2020, arXiv:2006.16236, equations 5, 9 to 12).
`Sums` holds S and z of some keys. They are kept in float32 or better, and every feature is divided by its largest value
among these keys, which cancels in the ratio: with the largest term of each query at 1 nothing overflows, and no epsilon
is added to the divisor.
"""

from __future__ import annotations

import abc
import functools
import math
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from effzoo.attention.core import AttentionCore, Context, Mask, State
from effzoo.devices import without_autocast
from effzoo.errors import OptionError
from effzoo.sites import KeysValues

CHUNK = 64  # positions between which sums are kept in training


class Sums(NamedTuple):
    """S and z of some keys, side by side: sum_j phi(k_j) [v_j, 1]^T = exp(top) total.

    top [batch, heads, m, 1]: log of the largest phi(k_j), by feature; has no gradient.
    total [batch, heads, m, e + 1]
    """

    top: Tensor
    total: Tensor


def joined(*parts: Sums) -> Sums:
    """The sums over the keys of all parts."""
    top = functools.reduce(torch.maximum, (part.top for part in parts))
    total = torch.stack([_scaled(part.top - top) * part.total for part in parts]).sum(dim=0)
    return Sums(top, total)


def summed(log_k: Tensor, values: Tensor) -> Sums:
    """The sums over keys with features exp(log_k) [batch, heads, s, m] and values [batch, heads, s, e + 1]."""
    top = log_k.detach().amax(dim=2, keepdim=True)
    return Sums(top.mT, _scaled(log_k - top).mT @ values)


def read(log_q: Tensor, sums: Sums) -> Tensor:
    """phi(q) [S, z] for queries with features exp(log_q) [batch, heads, n, m], up to a factor for each query."""
    return _largest_1(log_q + sums.top.mT) @ sums.total


def read_causal(log_q: Tensor, log_k: Tensor, values: Tensor, before: Sums) -> Tensor:
    """`read` where query i sees the keys j <= i, and all that are in the sums `before`.

    The sums are computed at the borders of chunks (their recurrence takes log2 of so many steps), and the pairs inside
    a chunk are multiplied out: O(n m e / CHUNK) memory. Keys of which every feature is below e^-80 times the largest in
    their chunk count as that (in float64 e^-700).
    """
    n, size = log_q.shape[2], min(CHUNK, log_q.shape[2])
    rest = (0, 0, 0, -n % size)
    log_q, values = F.pad(log_q, rest), F.pad(values, rest)
    log_k = F.pad(log_k, rest, value=lowest(log_k.dtype))
    log_q, log_k, values = (rearrange(x, "b h (t s) d -> b h t s d", s=size) for x in (log_q, log_k, values))
    largest = torch.cat([before.top.mT.unsqueeze(2), log_k.detach().amax(dim=3, keepdim=True)], dim=2)
    largest = largest.cummax(dim=2).values  # of the keys before each chunk, and at the end of those behind the last
    top = largest[:, :, 1:]
    decay = _scaled(largest[:, :, :-1] - top).mT
    phi_k = _scaled(log_k - top)
    sums = recurrence(
        torch.cat([torch.ones_like(decay[:, :, :1]), decay], dim=2),
        torch.cat([before.total.unsqueeze(2), phi_k.mT @ values], dim=2),
    )
    phi_q = _largest_1(log_q + top)
    inside = (phi_q @ phi_k.mT).tril() @ values
    return (inside + phi_q @ (decay * sums[:, :, :-1])).flatten(2, 3)[:, :, :n]


def read_visible(log_q: Tensor, log_k: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """`read` with all pairs multiplied out; visible: bool, broadcastable to [batch, heads, n, s]."""
    top = log_k.detach().amax(dim=2, keepdim=True)
    pairs = _largest_1(log_q + top) @ _scaled(log_k - top).mT
    return pairs.masked_fill(~visible, 0.0) @ values


def recurrence(decay: Tensor, update: Tensor) -> Tensor:
    """S_t = decay_t S_(t-1) + update_t along axis 2, S_0 = update_0: first of pairs, whose number halves each time."""
    n = update.shape[2]
    if n == 1:
        return update
    pairs = n // 2
    first, second = (slice(0, 2 * pairs, 2), slice(1, None, 2))
    odd = recurrence(
        decay[:, :, first] * decay[:, :, second], decay[:, :, second] * update[:, :, first] + update[:, :, second]
    )
    later = decay[:, :, 2::2] * odd[:, :, : (n - 1) // 2] + update[:, :, 2::2]
    even = torch.cat([update[:, :, :1], later], dim=2)
    both = torch.stack([even[:, :, :pairs], odd], dim=3).flatten(2, 3)
    return torch.cat([both, even[:, :, pairs:]], dim=2)


def lowest(dtype: torch.dtype) -> float:
    """A log that counts as that of 0, and of which differences are finite."""
    return torch.finfo(dtype).min / 4


def _scaled(logs: Tensor) -> Tensor:
    """exp of logs <= 0; what is below the smallest number counts as that, so that a divisor stays above 0."""
    return logs.clamp(min=8 - math.log(torch.finfo(logs.dtype).max)).exp()


def _largest_1(logs: Tensor) -> Tensor:
    """exp(logs), divided by the largest feature of each query."""
    return (logs - logs.detach().amax(dim=-1, keepdim=True)).exp()


class FeatureAttention(AttentionCore):
    """out_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j), over all tokens j, or j <= i when causal.

    A kind says log phi. Decoding keeps the sums S and z, whose size does not grow. Memory keys (prefix tuning) are more
    keys that every query sees. A query that sees no token gives 0. The weights of pairs are never formed, so dropout
    draws once for a key and its weights for all queries: of each weight and in the mean over draws as usual.
    """

    cost = "n * d"
    shift_invariant = True

    def __init__(self, context: Context):
        super().__init__(context)
        self.features = context.head_dim  # m, the width of phi
        if context.backend not in ("auto", "reference"):
            raise OptionError(
                f"attention {self.name!r} has no softmax over keys, which is what backend {context.backend!r} "
                "computes; leave backend='auto'"
            )

    @abc.abstractmethod
    def log_phi(self, x: Tensor) -> Tensor:
        """log phi(x), [batch, heads, n, head_dim] -> [batch, heads, n, m], for queries and keys alike."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        with without_autocast(q):
            if self.context.causal:
                return self.continued(q, k, v, mask.valid, self.sums_of(memory, q, v))
            return self.read(q, joined(self.sums(k, v, mask.valid), self.sums_of(memory, q, v)), v.dtype)

    def forward_at(self, wanted: Tensor, *projected: Any, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        q, k, v = projected
        if not self.context.causal:
            return self.forward(q, k, v, mask=mask, memory=memory)
        key = torch.arange(k.shape[2], device=k.device)
        return self._multiplied_out(q, k, v, mask, memory, key <= wanted[:, None, :, None])

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, past: State | None, memory: KeysValues | None = None
    ) -> tuple[Tensor, State]:
        valid = None if mask.valid is None else mask.valid[:, -q.shape[2] :]
        with without_autocast(q):
            before = self.sums_of(None, q, v) if past is None else Sums(past["top"], past["total"])
            out = self.continued(q, k, v, valid, joined(before, self.sums_of(memory, q, v)))
            after = joined(before, self.sums(k, v, valid))
        return out, {"top": after.top, "total": after.total}

    def attend_memory(self, *projected: Any, mask: Mask, memory: KeysValues, wanted: Tensor | None = None) -> Tensor:
        q, _, v = projected
        with without_autocast(q):
            return self.read(q, self.sums_of(memory, q, v), v.dtype)

    def dense(self, *projected: Tensor, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        """The definition with the weights of all pairs written out."""
        q, k, v = projected
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        return self._multiplied_out(q, k, v, mask, memory, visible.tril() if self.context.causal else visible)

    @property
    def crosses(self) -> bool:
        return not self.context.causal

    def sums(self, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Sums:
        """S and z of these keys, in float32 or better; valid bool[batch, s]: which of them are tokens."""
        return summed(*self._keys(k, v, valid))

    def sums_of(self, memory: KeysValues | None, q: Tensor, v: Tensor) -> Sums:
        """S and z of a memory; without one, those of no key."""
        if memory is None:
            exact = _exact(q)
            top = exact.new_full((*q.shape[:2], self.features, 1), lowest(exact.dtype))
            return Sums(top, exact.new_zeros(*q.shape[:2], self.features, v.shape[-1] + 1))
        return self.sums(*_of_batch(memory, q))

    def read(self, q: Tensor, sums: Sums, dtype: torch.dtype) -> Tensor:
        """The output of queries that see the keys of these sums."""
        return _divided(read(self.log_phi(_exact(q)), sums), dtype)

    def continued(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, before: Sums) -> Tensor:
        """The causal output at positions that follow the keys of the sums `before`."""
        return _divided(read_causal(self.log_phi(_exact(q)), *self._keys(k, v, valid), before), v.dtype)

    def _multiplied_out(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, memory: KeysValues | None, visible: Tensor
    ) -> Tensor:
        """The output of queries that see the visible tokens, [..., n, s], and the memory."""
        with without_autocast(q):
            log_k, values = self._keys(k, v, mask.valid)
            if memory is not None:
                in_front = self._keys(*_of_batch(memory, q))
                log_k, values = (torch.cat(pair, dim=2) for pair in zip(in_front, (log_k, values), strict=True))
                visible = F.pad(visible, (memory[0].shape[-2], 0), value=True)
            return _divided(read_visible(self.log_phi(_exact(q)), log_k, values, visible), v.dtype)

    def _keys(self, k: Tensor, v: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log phi(k) and [v, 1], of a key that is no token the log of 0 and zeros; dropped values are 0."""
        k, v = _exact(k), _exact(v)
        ones = v.new_ones(*v.shape[:-1], 1)
        values = torch.cat([F.dropout(ones, self.dropout) * v if self.dropout else v, ones], dim=-1)
        if valid is None:
            return self.log_phi(k), values
        padding = ~valid[:, None, :, None]
        log_k = self.log_phi(k.masked_fill(padding, 0.0))
        return log_k.masked_fill(padding, lowest(k.dtype)), values.masked_fill(padding, 0.0)


def _of_batch(memory: KeysValues, q: Tensor) -> KeysValues:
    keys, values = (x.to(q.dtype).expand(q.shape[0], *x.shape[-3:]) for x in memory)
    return keys, values


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _divided(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """phi(q) S / phi(q) z; 0 for a query that sees no key."""
    divisor = sums[..., -1:]
    return (sums[..., :-1] / torch.where(divisor == 0, 1.0, divisor)).to(dtype)
