"""Locality-sensitive hashing by random rotations, and sorted sequences cut into tiles: the indexing of `lsh.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def automatic(max_length: int, chunk: int) -> tuple[int, ...]:
    """How many buckets a sequence of max_length needs: 2 n / chunk, as a power of two, in factors where one would make the rotations large.

    One and two factors are those of HF; more of them, where two would be larger than 2 chunk, keep the cost of hashing at n log n.
    """
    power = max(1, (2 * (max_length // chunk)).bit_length() - 1)
    if 2**power <= 2 * max(math.isqrt(max_length // chunk), chunk):
        return (2**power,)
    largest = (2 * max(chunk, 4)).bit_length() - 1
    count = max(2, -(-power // largest))
    return tuple(2 ** ((power + index) // count) for index in range(count))


def draw_rotations(seed: int, layer: int, rounds: range, heads: int, head_dim: int, factors: Sequence[int]) -> Tensor:
    """Standard normal rotations [rounds, heads, head_dim, sum(factors) / 2]; those of one round do not depend on the other rounds.

    From a generator of their own: torch's random state stays where it is.
    """
    width = sum(factor // 2 for factor in factors)
    drawn = [torch.empty(0, heads, head_dim, width, device="cpu")]
    for index in rounds:
        source = torch.Generator("cpu").manual_seed(((seed * 1_000_003 + layer) * 1_000_003 + index) % 2**63)
        drawn.append(torch.randn(1, heads, head_dim, width, generator=source, device="cpu"))
    return torch.cat(drawn)


@torch.no_grad()
def buckets_of(x: Tensor, rotations: Tensor, factors: Sequence[int]) -> Tensor:
    """The bucket of each row of x [batch, heads, n, d] in each round: argmax of [x R, -x R], int64[rounds, batch, heads, n].

    With factors b_1, b_2, ... the bucket is sum_f bucket_f b_1 ... b_(f-1), each bucket_f from rotations of its own. Computed in
    float32 or better, also under autocast.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    found = torch.zeros(rotations.shape[0], *x.shape[:3], dtype=torch.int64, device=x.device)
    start, product = 0, 1
    device = x.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        for factor in factors:
            half = factor // 2
            if half:  # the rounds side by side: to multiply by each would make a copy of x for it
                side_by_side = rotations[..., start : start + half].to(exact).movedim(0, 2).flatten(2)
                turned = rearrange(x.to(exact) @ side_by_side, "b h n (rounds half) -> rounds b h n half", half=half)
                place = turned.abs().argmax(dim=-1, keepdim=True)
                found += product * (place + half * (turned.gather(-1, place) < 0)).squeeze(-1)
            start, product = start + half, product * factor
    return found


def sort(buckets: Tensor) -> tuple[Tensor, Tensor]:
    """Positions in the order of (bucket, position) along the last axis, and the place of each position in that order."""
    order = buckets.sort(dim=-1, stable=True).indices
    return order, torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))


class Sorted:
    """Every round's sequence sorted by (bucket, position) and cut into chunks; the chunks of all rounds, batch rows and heads are tiles.

    A query's tile holds the keys of its own chunk, of `before` chunks before it and `after` chunks after it. Chunks do not reach over the
    ends of a round, unless `circular`: then the rounds of one head stand in a ring, one after the other. Padding stands last in each
    round, so the chunks of tokens are those of the sequence alone.

    place: the slot of each position, [rounds, groups, n], with groups = batch heads. position, key_position: the positions at the slots of
    the queries, [rounds, groups, chunks, chunk], and of the keys, [rounds, groups, chunks, width]; n where a slot holds no token.
    """

    def __init__(self, buckets: Tensor, lengths: Tensor, *, chunk: int, before: int, after: int, circular: bool):
        """buckets [rounds, batch, heads, n], the largest ones at padding; lengths [batch]: how many tokens there are."""
        rounds, batch, heads, n = buckets.shape
        groups, chunks = batch * heads, -(-n // chunk)
        self.batch, self.heads, self.n, self.rounds, self.chunk, self.chunks = batch, heads, n, rounds, chunk, chunks
        self.before, self.after, self.circular, self.width = before, after, circular, (before + 1 + after) * chunk
        device = buckets.device
        slot = torch.arange(n, device=device)
        order, place = sort(buckets)
        self._order, self.place = order.view(rounds, groups, n), place.view(rounds, groups, n)
        empty = slot >= lengths[:, None, None]
        position = order.masked_fill(empty, n).view(rounds, groups, n).int()
        self.position = self._slots(position, n).view(rounds, groups, chunks, chunk)
        self.key_position = self._key_slots(position, n).unfold(-1, self.width, chunk)
        first_row = torch.arange(groups, device=device)[:, None]
        self._rows = first_row * n + self._slots(self._order, 0)
        self._key_rows = first_row * n + self._key_slots(self._order, 0)
        shift = torch.arange(rounds, device=device)[:, None, None] * groups + first_row
        self._back = shift[0] * (chunks * chunk) + self.place
        self._key_back = shift * self._key_rows.shape[-1] + before * chunk + self.place

    def _slots(self, x: Tensor, fill: int) -> Tensor:
        """[rounds, groups, n] in sorted order -> [rounds, groups, chunks chunk]."""
        return F.pad(x, (0, self.chunks * self.chunk - self.n), value=fill)

    def _key_slots(self, x: Tensor, fill: int) -> Tensor:
        """[rounds, groups, n] in sorted order -> [rounds, groups, (before + chunks + after) chunk]."""
        x = self._slots(x, fill)
        before, after, length = self.before * self.chunk, self.after * self.chunk, self.chunks * self.chunk
        if not self.circular:
            return F.pad(x, (before, after), value=fill)
        ring = x.transpose(0, 1).reshape(x.shape[1], -1)
        start = torch.arange(self.rounds, device=x.device)[:, None] * length
        slot = start + torch.arange(-before, length + after, device=x.device)
        return ring[:, slot % ring.shape[1]].transpose(0, 1)

    def queries(self, x: Tensor) -> tuple[Tensor, ...]:
        """[batch, heads, n, d] -> for each round [groups, chunks, chunk, d]."""
        rows = _gather(x, self._rows, self._back + torch.arange(self.rounds, device=x.device)[:, None, None] * self._rows[0].numel())
        return rows.view(self.rounds, -1, self.chunks, self.chunk, x.shape[-1]).unbind(0)

    def keys(self, x: Tensor) -> tuple[Tensor, ...]:
        """[batch, heads, n, d] -> for each round [groups, chunks, width, d], overlapping views of the sorted rows."""
        rows = _gather(x, self._key_rows, None if self.circular else self._key_back)
        return tuple(windows(one, self.width, self.chunk) for one in rows.unbind(0))

    def keys_of(self, x: Tensor, index: int) -> Tensor:
        """Rows [groups n, d] -> what the chunks of one round see, [groups, chunks, width, d], a view of the sorted rows."""
        rows = x.index_select(0, self._key_rows[index].flatten()).view(*self._key_rows[index].shape, -1)
        return rows.unfold(1, self.width, self.chunk).transpose(-1, -2)

    def keys_back(self, grad: Tensor, index: int) -> Tensor:
        """The gradient of what `keys_of` gave -> that of the rows, [batch, heads, n, d]."""
        total = _summed(grad, self._key_rows.shape[-1], self.chunk).flatten(0, 1)
        if self.circular:
            of_rows = total.new_zeros(self.batch * self.heads * self.n, total.shape[-1]).index_add_(0, self._key_rows[index].flatten(), total)
        else:
            of_rows = total.index_select(0, (self._key_back[index] - index * len(total)).flatten())
        return of_rows.view(self.batch, self.heads, self.n, -1)

    def of_queries(self, x: Tensor) -> Tensor:
        """What holds of positions, [rounds or 1, groups, n], at the slots of the queries: [rounds, groups, chunks, chunk]."""
        return self._slots(self._sorted(x), -1).view(self.rounds, -1, self.chunks, self.chunk)

    def of_keys(self, x: Tensor) -> Tensor:
        """The same at the slots of the keys: [rounds, groups, chunks, width]; -2 where a slot is empty."""
        return self._key_slots(self._sorted(x), -2).unfold(-1, self.width, self.chunk)

    def _sorted(self, x: Tensor) -> Tensor:
        return x.expand_as(self._order).gather(-1, self._order)

    def folds(self, index: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """`fold` and `unfold` of the part of one round: [batch, heads, n, e] -> [groups, chunks, chunk, e] and the way back."""
        rows, back = self._rows[index].flatten(), self._back[index].flatten()
        groups, n, batch, heads, chunks, chunk = self.batch * self.heads, self.n, self.batch, self.heads, self.chunks, self.chunk

        def fold(x: Tensor) -> Tensor:
            return x.reshape(groups * n, x.shape[-1]).index_select(0, rows).view(groups, chunks, chunk, -1)

        def unfold(x: Tensor) -> Tensor:
            return x.reshape(groups * chunks * chunk, x.shape[-1]).index_select(0, back).view(batch, heads, n, -1)

        return fold, unfold


@dataclass(frozen=True, eq=False)
class Standing:
    """Place (chunk, or slot when stable) and bucket in one round of the queries and keys in the tiles of every round.

    query, bucket [rounds, groups, chunks, chunk]; key, key_bucket [rounds, groups, chunks, width].
    """

    query: Tensor
    key: Tensor
    bucket: Tensor
    key_bucket: Tensor

    def same_bucket(self, index: int) -> Tensor:
        """bool[groups, chunks, chunk, width] for the tiles of round `index`."""
        return self.bucket[index].unsqueeze(-1) == self.key_bucket[index].unsqueeze(-2)


def windows(x: Tensor, width: int, step: int) -> Tensor:
    """Overlapping windows [groups, count, width, d] of [groups, rows, d], one every `step` rows, without a copy."""
    seen: Tensor = _Windows.apply(x, width, step)  # type: ignore[no-untyped-call]
    return seen


class _Windows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int, step: int) -> Tensor:
        ctx.sizes = (x.shape[1], width, step)
        return x.unfold(1, width, step).transpose(-1, -2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, _, step = ctx.sizes
        return _summed(grad, rows, step), None, None


def _summed(grad: Tensor, rows: int, step: int) -> Tensor:
    """Windows [groups, count, width, d], one every `step` rows, added up: [groups, rows, d]."""
    count, width = grad.shape[1:3]
    total = grad.new_zeros(grad.shape[0], rows, grad.shape[-1])
    for offset in range(0, width, step):  # the chunks of a window: of all windows at once
        total[:, offset : offset + count * step].view(-1, count, step, total.shape[-1]).add_(grad[:, :, offset : offset + step])
    return total


def _gather(x: Tensor, rows: Tensor, back: Tensor | None) -> Tensor:
    """Rows of x [batch, heads, n, d], counted over (batch heads n), at rows [rounds, groups, s] -> [rounds, groups, s, d].

    back [rounds, groups, n]: where each row went in each round, if it went to one place only; the gradient is then gathered too, which is
    many times faster than to scatter it.
    """
    flat = x.reshape(-1, x.shape[-1])
    if back is None:
        return flat.index_select(0, rows.flatten()).view(*rows.shape, -1)
    gathered: Tensor = _Gather.apply(flat, rows, back)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, rows: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return flat.index_select(0, rows.flatten()).view(*rows.shape, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        total = grad.index_select(0, back[0].flatten())
        for one in back[1:]:
            total += grad.index_select(0, one.flatten())
        return total, None, None
