"""Rounds of hashing, a few heads at a time.

What is sorted, gathered and masked for a few heads stays in the processor's cache; it is made again in the backward
pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from effzoo.attention.hashing import sort
from effzoo.attention.kernel import merge
from effzoo.attention.part import Cut, Kernel, Layout, Part, Tile, bias_of
from effzoo.attention.tiles import Run, Slots, Tiles
from effzoo.attention.triton_launch import Hashed, OnePass

TOGETHER = 2**19  # numbers of a tensor of queries or keys
# places in the sorted order (in chunks, unless `stable`) and buckets, [rounds, ..., n]
Standing = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class HashingRounds(Layout):
    """In every round positions are sorted by (bucket, position) and cut into chunks: a query sees its own, `before`
    ones before it and `after` after.

    A part with these rounds is given its buckets [rounds, batch, heads, n]: `padding`, larger than all others, where
    there is no token.
    A query does not see its own key. ring: the chunks of all rounds of a head stand in a ring. within: only keys of the
    query's own bucket.
    once: a pair that meets in several rounds counts once.
    stable: reach is counted from the query's place, and not from its chunk.
    """

    chunk: int
    before: int = 1
    after: int = 0
    ring: bool = False
    within: bool = False
    once: bool = False
    stable: bool = False
    causal: bool = False
    padding: int = 2**31

    def one_pass(self) -> list[tuple[list[int], OnePass | Hashed]]:
        """All rounds in one pass of our Triton kernels, which know no ring."""
        options = self.within, self.once, self.stable, self.causal
        return [] if self.ring else [([], Hashed(self.chunk, self.before, self.after, *options, padding=self.padding))]

    def plain(self, part: Part) -> list[Part]:
        return [replace(part, layout=one, given=()) for one in Sorted(self, _buckets(part.given)).rounds()]

    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, heads, n, _ = q.shape
        out = v.new_empty(batch, n, heads, v.shape[-1]).transpose(1, 2)
        lse = q.new_empty(batch, heads, n, 1, dtype=torch.promote_types(q.dtype, torch.float32))
        for where, rounds in self._few(q, given):
            own = [x[where].contiguous() for x in (q, k, v)]
            out[where], lse[where] = merge(*(one.forward(kernel, *own) for one in rounds))
        return out, lse

    def backward(
        self,
        kernel: Kernel,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *given: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients = tuple(
            x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v)
        )
        exact = torch.promote_types(q.dtype, torch.float32)
        for where, rounds in self._few(q, given):
            own = [x[where].contiguous() for x in (grad, q, k, v, out, lse)]
            sums = [x.to(exact) for x in rounds[0].backward(kernel, *own)]
            for one in rounds[1:]:
                sums = [total.add_(x) for total, x in zip(sums, one.backward(kernel, *own), strict=True)]
            for whole, total in zip(gradients, sums, strict=True):
                whole[where] = total
        return gradients  # type: ignore[return-value]

    def _few(self, q: Tensor, given: Sequence[Tensor | None]) -> Iterator[tuple[tuple[slice, slice], list[Round]]]:
        """Which examples and heads, and their rounds; always in the same order."""
        buckets = _buckets(given)
        batch, heads, n, d = q.shape
        together = max(1, TOGETHER // max(1, n * d))
        examples, of_heads = max(1, together // heads), min(together, heads)
        number = 0
        for example in range(0, batch, examples):
            for head in range(0, heads, of_heads):
                where = slice(example, example + examples), slice(head, head + of_heads)
                yield where, Sorted(self, buckets[:, where[0], where[1]]).rounds(number)
                number += len(buckets)

    def meetings(self, queries: Standing, keys: Standing, chunks: int) -> Tensor:
        """N_ij, int16[..., m, s]: how often queries see keys in all rounds, given where both stand. A ring of chunks
        may show a chunk twice."""
        (places, buckets), (key_places, key_buckets) = queries, keys
        total, rounds = torch.zeros((), dtype=torch.int16, device=places.device), range(len(places))
        for one, other in itertools.product(rounds, rounds) if self.ring else zip(rounds, rounds, strict=True):
            gap = places[one].unsqueeze(-1) - key_places[other].unsqueeze(-2)
            if self.ring:
                around = gap + (one - other) * chunks
                seen = torch.stack(
                    [(around - offset) % (len(rounds) * chunks) == 0 for offset in range(-self.after, self.before + 1)]
                ).sum(0)
            else:
                reach = self.chunk if self.stable else 1
                seen = (gap >= -self.after * reach) & (gap <= self.before * reach)
            same = buckets[one].unsqueeze(-1) == key_buckets[other].unsqueeze(-2) if self.within else True
            total = total + (seen * same).to(torch.int16)
        return total


class Sorted:
    """The slots of some heads: every round's sequence sorted by (bucket, position), and cut into chunks.

    Padding stands last in each round, so the chunks of tokens are those of the sequence alone. Chunks do not reach over
    the ends of a round, unless they stand in a ring.

    place: the slot of each position, [rounds, groups, n], with groups = batch heads. query, key: the position at each
        slot of the queries, and of the keys, [rounds, groups, slots]; n where a slot holds no token. tiles: the chunks,
        of queries and keys in the order of their slots.
    """

    def __init__(self, sight: HashingRounds, buckets: Tensor):
        self.sight, self.buckets, (_, *self.shape) = sight, buckets.flatten(1, 2), buckets.shape
        batch, heads, n = self.shape
        chunk, device = sight.chunk, buckets.device
        order, self.place = (x.flatten(1, 2) for x in sort(buckets))
        lengths = (buckets[0, :, :1] < sight.padding).sum(dim=-1).expand(-1, heads).flatten()
        position = order.masked_fill(torch.arange(n, device=device) >= lengths[:, None], n).int()
        self.query, self.key = self._slots(position, n)
        self.group = torch.arange(batch * heads, device=device)[:, None]
        self.query_rows, self.key_rows = (self.group * n + slots for slots in self._slots(order, 0))
        chunks = -(-n // chunk)
        run = Run(Slots(chunks, chunk, chunk), Slots(chunks, (sight.before + 1 + sight.after) * chunk, chunk))
        self.tiles = Tiles(self.key.shape[-1], (run,))

    def rounds(self, number: int = 0) -> list[Round]:
        """One after the other; number: that of the first one's tile."""
        return [Round(self, index, number + index) for index in range(len(self.place))]

    def _slots(self, order: Tensor, fill: int) -> tuple[Tensor, Tensor]:
        """[rounds, groups, n] in sorted order -> in whole chunks, and with the chunks that stand before them and after
        them."""
        before, after = self.sight.before * self.sight.chunk, self.sight.after * self.sight.chunk
        whole = F.pad(order, (0, -order.shape[-1] % self.sight.chunk), value=fill)
        if not self.sight.ring:
            return whole, F.pad(whole, (before, after), value=fill)
        rounds, groups, length = whole.shape
        ring = whole.transpose(0, 1).reshape(groups, -1)
        slot = torch.arange(rounds, device=order.device)[:, None] * length + torch.arange(
            -before, length + after, device=order.device
        )
        return whole, ring[:, slot % ring.shape[1]].transpose(0, 1)

    def at(self, of_queries: Tensor, of_keys: Tensor) -> tuple[Tensor, Tensor]:
        """What holds at slots, [..., groups, slots], by chunk, [..., chunks, groups, chunk, 1] and [..., chunks,
        groups, 1, width]."""
        (run,), before = self.tiles.runs, of_queries.shape[:-2]
        query, key = (x.reshape(-1, *x.shape[-2:], 1) for x in (of_queries, of_keys))
        query, key = run.queries.take(query), run.keys.take(key).mT
        return query.reshape(*before, -1, *query.shape[1:]), key.reshape(*before, -1, *key.shape[1:])


@dataclass(frozen=True, eq=False)
class Round(Cut):
    """One round, as one tile [chunks, groups, chunk or width, d]: flash operators write the first axis outermost, which
    puts a few heads in order."""

    slots: Sorted
    index: int
    first: int = 0

    def tiles(self, q: Tensor, k: Tensor, v: Tensor, given: Sequence[Tensor | None]) -> Iterator[Tile]:
        rows, key_rows = self.slots.query_rows[self.index], self.slots.key_rows[self.index]
        for tile in self.slots.tiles.tiles(_sorted(q, rows), _sorted(k, key_rows), _sorted(v, key_rows), [None]):
            yield tile._replace(bias=self._bias(q.dtype))

    def rows(self, x: Tensor) -> Iterator[Tensor]:
        return self.slots.tiles.rows(_sorted(x, self.slots.query_rows[self.index]))

    def join(self, tiles: Sequence[Tensor], fill: float = 0.0) -> Tensor:
        return self._back(self.slots.tiles.join(tiles), self.slots.place[self.index])

    def keys_back(self, k: Tensor, v: Tensor, grads: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        found, sight = self.slots.tiles.keys_back(k.flatten(0, 1)[None], v.flatten(0, 1)[None], grads), self.slots.sight
        if sight.ring:
            rows = self.slots.key_rows[self.index].flatten()
            of_k, of_v = (
                x.new_zeros(k[..., 0].numel(), x.shape[-1]).index_add_(0, rows, x.flatten(0, 2)).view(*k.shape[:3], -1)
                for x in found
            )
        else:  # each row went to one place, where its gradient is found many times faster than it would be scattered
            of_k, of_v = (self._back(x, self.slots.place[self.index] + sight.before * sight.chunk) for x in found)
        return of_k, of_v

    def _back(self, x: Tensor, place: Tensor) -> Tensor:
        """What stands at the slots, [1, groups, slots, d], by position, [batch, heads, n, d]."""
        groups = x.shape[1]
        rows = x.transpose(1, 2).reshape(-1, x.shape[-1]).index_select(0, (place * groups + self.slots.group).flatten())
        return rows.view(*self.slots.shape, x.shape[-1])

    def _bias(self, dtype: torch.dtype) -> Tensor:
        """What queries see, as an additive bias."""
        s, sight, n = self.slots, self.slots.sight, self.slots.shape[-1]
        query, key = s.at(s.query[self.index], s.key[self.index])
        allowed = key < query.masked_fill(query == n, -1) if sight.causal else (key != query) & (key < n) & (query < n)
        if sight.within:
            of_queries, of_keys = self._of_positions(s.buckets[self.index])
            allowed = allowed & (of_queries == of_keys)
        if sight.stable:
            slot, key_slot = (torch.arange(size, device=query.device) for size in (query.shape[-2], key.shape[-1]))
            ahead = key_slot - slot[:, None]  # counted from look_back chunk places before the query
            allowed = allowed & (ahead >= 0) & (ahead <= (sight.before + sight.after) * sight.chunk)
        bias = bias_of(allowed, dtype)
        if sight.once:
            stands = [self._of_positions(x) for x in (s.place if sight.stable else s.place // sight.chunk, s.buckets)]
            queries, keys = zip(*((query.squeeze(-1), key.squeeze(-2)) for query, key in stands), strict=True)
            bias -= sight.meetings(queries, keys, len(query)).clamp(min=1).to(dtype).log()
        return bias

    def _of_positions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What holds of positions, [..., groups, n], by chunk."""
        s, n = self.slots, self.slots.shape[-1]
        return s.at(
            *(
                x.gather(-1, (rows[self.index] - s.group * n).expand(*x.shape[:-1], -1))
                for rows in (s.query_rows, s.key_rows)
            )
        )


def _sorted(x: Tensor, rows: Tensor) -> Tensor:
    """Rows [groups, slots] of x [batch, heads, n, d] -> [1, groups, slots, d]."""
    return x.reshape(-1, x.shape[-1]).index_select(0, rows.flatten()).view(1, *rows.shape, x.shape[-1])


def _buckets(given: Sequence[Tensor | None]) -> Tensor:
    (buckets,) = given
    assert buckets is not None
    return buckets
