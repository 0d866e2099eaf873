"""Rounds of hashing (LSH), a few heads at a time: what is sorted and gathered for them fits the processor's cache.

It is sorted and gathered again in the backward pass.
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
from effzoo.attention.part import DisjointTiling, Gradients, Kernel, Part, Tile, Tiling, bias_of
from effzoo.attention.tiles import TilePositions, TileRun, Tiles
from effzoo.attention.triton_launch import Hashed, OnePass

TOGETHER = 2**19  # numbers of a tensor of queries or keys
# places in the sorted order (of the chunk, unless `stable`) and buckets, [rounds, ..., n]
Order = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class HashingRounds(Tiling):
    """In every round positions are sorted by (bucket, position) and cut into chunks; a query sees the keys of its own
    chunk, of `before` chunks before it and of `after` chunks after it, but not its own key.

    Input of the part: the buckets int[rounds, batch, heads, n]; `padding`, larger than all others, where there is no
    token.

    ring: the last chunks of a round stand before the first ones of the next.
    within: only keys in the bucket of the query.
    once: a pair that meets in several rounds counts once.
    stable: `before` and `after` are counted from the query instead of from its chunk.
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
        """All rounds in one pass; the kernel has no ring."""
        options = self.within, self.once, self.stable, self.causal
        return [] if self.ring else [([], Hashed(self.chunk, self.before, self.after, *options, padding=self.padding))]

    def disjoint(self, part: Part) -> list[Part]:
        return [replace(part, tiling=one, inputs=()) for one in Sorted(self, _buckets(part.inputs)).rounds()]

    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, heads, n, _ = q.shape
        out = v.new_empty(batch, n, heads, v.shape[-1]).transpose(1, 2)
        lse = q.new_empty(batch, heads, n, 1, dtype=torch.promote_types(q.dtype, torch.float32))
        for some, rounds in self._few(q, inputs):
            args = [x[some].contiguous() for x in (q, k, v)]
            out[some], lse[some] = merge(*(one.forward(kernel, *args) for one in rounds))
        return out, lse

    def backward(
        self, kernel: Kernel, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        *inputs: Tensor | None,
    ) -> Gradients:  # fmt: skip
        grad_q, grad_k, grad_v = (
            x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v)
        )
        exact = torch.promote_types(q.dtype, torch.float32)
        for some, rounds in self._few(q, inputs):
            args = [x[some].contiguous() for x in (grad, q, k, v, out, lse)]
            sums = [x.to(exact) for x in rounds[0].backward(kernel, *args)]
            for one in rounds[1:]:
                sums = [total.add_(x) for total, x in zip(sums, one.backward(kernel, *args), strict=True)]
            grad_q[some], grad_k[some], grad_v[some] = sums
        return grad_q, grad_k, grad_v

    def _few(self, q: Tensor, inputs: Sequence[Tensor | None]) -> Iterator[tuple[tuple[slice, slice], list[Round]]]:
        """A few examples and heads at a time, and their rounds; always in the same order."""
        buckets = _buckets(inputs)
        batch, heads, n, d = q.shape
        few = max(1, TOGETHER // max(1, n * d))
        few_examples, few_heads = max(1, few // heads), min(few, heads)
        number = 0
        for example in range(0, batch, few_examples):
            for head in range(0, heads, few_heads):
                some = slice(example, example + few_examples), slice(head, head + few_heads)
                yield some, Sorted(self, buckets[:, some[0], some[1]]).rounds(number)
                number += len(buckets)

    def meetings(self, queries: Order, keys: Order, chunks: int) -> Tensor:
        """N_ij int16[..., m, s]: how often query i sees key j in all rounds; a ring may show a chunk twice."""
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
    """The positions of some heads, sorted by (bucket, position) in each round and cut into chunks.

    Padding stands last in each round, so it does not shift the chunks of tokens.

    place [rounds, groups, n]: the slot of each position in the sorted order; groups = batch heads.
    query, key [rounds, groups, slots]: the position in each slot of the chunks' queries, and of their keys; n in a slot
        without a token.
    query_index, key_index: the same among all groups one after the other.
    tiles: the chunks, over the slots.
    """

    def __init__(self, hashing: HashingRounds, buckets: Tensor):
        self.hashing, self.buckets, (_, *self.shape) = hashing, buckets.flatten(1, 2), buckets.shape
        batch, heads, n = self.shape
        chunk, device = hashing.chunk, buckets.device
        order, self.place = (x.flatten(1, 2) for x in sort(buckets))
        lengths = (buckets[0, :, :1] < hashing.padding).sum(dim=-1).expand(-1, heads).flatten()
        position = order.masked_fill(torch.arange(n, device=device) >= lengths[:, None], n).int()
        self.query, self.key = self._slots(position, n)
        self.group = torch.arange(batch * heads, device=device)[:, None]
        self.query_index, self.key_index = (self.group * n + slots for slots in self._slots(order, 0))
        chunks = -(-n // chunk)
        width = (hashing.before + 1 + hashing.after) * chunk
        run = TileRun(TilePositions(chunks, chunk, chunk), TilePositions(chunks, width, chunk))
        self.tiles = Tiles(self.key.shape[-1], (run,))

    def rounds(self, number: int = 0) -> list[Round]:
        """The rounds; number: of the first one's tile."""
        return [Round(self, index, number + index) for index in range(len(self.place))]

    def _slots(self, order: Tensor, fill: int) -> tuple[Tensor, Tensor]:
        """[rounds, groups, n] in sorted order -> in whole chunks, and with the chunks before and after them."""
        chunk = self.hashing.chunk
        before, after = self.hashing.before * chunk, self.hashing.after * chunk
        whole = F.pad(order, (0, -order.shape[-1] % chunk), value=fill)
        if not self.hashing.ring:
            return whole, F.pad(whole, (before, after), value=fill)
        rounds, groups, length = whole.shape
        ring = whole.transpose(0, 1).reshape(groups, -1)
        first = torch.arange(rounds, device=order.device)[:, None] * length
        slot = first + torch.arange(-before, length + after, device=order.device)
        return whole, ring[:, slot % ring.shape[1]].transpose(0, 1)

    def by_chunk(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Values of slots [..., groups, slots] -> [..., chunks, groups, chunk, 1] of queries, [..., chunks, groups, 1,
        width] of keys."""
        (run,), before = self.tiles.runs, query.shape[:-2]
        query, key = (x.reshape(-1, *x.shape[-2:], 1) for x in (query, key))
        query, key = run.queries.take(query), run.keys.take(key).mT
        return query.reshape(*before, -1, *query.shape[1:]), key.reshape(*before, -1, *key.shape[1:])


@dataclass(frozen=True, eq=False)
class Round(DisjointTiling):
    """One round as one tile [chunks, groups, chunk or width, d]: flash operators write the first axis outermost."""

    slots: Sorted
    number: int
    first: int = 0

    def tiles(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor | None]) -> Iterator[Tile]:
        queries, keys = self.slots.query_index[self.number], self.slots.key_index[self.number]
        for tile in self.slots.tiles.tiles(_sorted(q, queries), _sorted(k, keys), _sorted(v, keys), [None]):
            yield tile._replace(bias=self._bias(q.dtype))

    def split(self, x: Tensor) -> Iterator[Tensor]:
        return self.slots.tiles.split(_sorted(x, self.slots.query_index[self.number]))

    def join(self, tiles: Sequence[Tensor], fill: float = 0.0) -> Tensor:
        return self._unsorted(self.slots.tiles.join(tiles), self.slots.place[self.number])

    def key_gradients(self, k: Tensor, v: Tensor, grads: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        slots, hashing = self.slots, self.slots.hashing
        grad_k, grad_v = slots.tiles.key_gradients(k.flatten(0, 1)[None], v.flatten(0, 1)[None], grads)
        if hashing.ring:
            index = slots.key_index[self.number].flatten()
            grad_k, grad_v = (
                x.new_zeros(k[..., 0].numel(), x.shape[-1]).index_add_(0, index, x.flatten(0, 2)).view(*k.shape[:3], -1)
                for x in (grad_k, grad_v)
            )
        else:  # each key has one slot: gathering its gradient is many times faster than scattering it
            place = slots.place[self.number] + hashing.before * hashing.chunk
            grad_k, grad_v = (self._unsorted(x, place) for x in (grad_k, grad_v))
        return grad_k, grad_v

    def _unsorted(self, x: Tensor, place: Tensor) -> Tensor:
        """Values of slots [1, groups, slots, d] -> of positions [batch, heads, n, d]."""
        index = (place * x.shape[1] + self.slots.group).flatten()
        return x.transpose(1, 2).reshape(-1, x.shape[-1]).index_select(0, index).view(*self.slots.shape, x.shape[-1])

    def _bias(self, dtype: torch.dtype) -> Tensor:
        """Which keys a query sees, as an additive bias."""
        slots, hashing, n = self.slots, self.slots.hashing, self.slots.shape[-1]
        query, key = slots.by_chunk(slots.query[self.number], slots.key[self.number])
        if hashing.causal:
            allowed = key < query.masked_fill(query == n, -1)
        else:
            allowed = (key != query) & (key < n) & (query < n)
        if hashing.within:
            query_bucket, key_bucket = self._by_chunk(slots.buckets[self.number])
            allowed = allowed & (query_bucket == key_bucket)
        if hashing.stable:
            slot, key_slot = (torch.arange(size, device=query.device) for size in (query.shape[-2], key.shape[-1]))
            ahead = key_slot - slot[:, None]  # counted from look_back chunk places before the query
            allowed = allowed & (ahead >= 0) & (ahead <= (hashing.before + hashing.after) * hashing.chunk)
        bias = bias_of(allowed, dtype)
        if hashing.once:
            place = slots.place if hashing.stable else slots.place // hashing.chunk
            query_place, key_place = self._by_chunk(place)
            query_bucket, key_bucket = self._by_chunk(slots.buckets)
            queries = query_place.squeeze(-1), query_bucket.squeeze(-1)
            keys = key_place.squeeze(-2), key_bucket.squeeze(-2)
            bias -= hashing.meetings(queries, keys, len(query)).clamp(min=1).to(dtype).log()
        return bias

    def _by_chunk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values of positions [..., groups, n] -> of the queries and keys of each chunk."""
        slots, n = self.slots, self.slots.shape[-1]
        query, key = (
            x.gather(-1, (index[self.number] - slots.group * n).expand(*x.shape[:-1], -1))
            for index in (slots.query_index, slots.key_index)
        )
        return slots.by_chunk(query, key)


def _sorted(x: Tensor, index: Tensor) -> Tensor:
    """x [batch, heads, n, d] at index [groups, slots] of all its vectors -> [1, groups, slots, d]."""
    return x.reshape(-1, x.shape[-1]).index_select(0, index.flatten()).view(1, *index.shape, x.shape[-1])


def _buckets(inputs: Sequence[Tensor | None]) -> Tensor:
    (buckets,) = inputs
    assert buckets is not None
    return buckets
