"""Rounds of hashing, a few heads at a time.

What is sorted, gathered and masked for a few heads stays in the processor's cache; it is made again in the backward pass.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from effzoo.attention.hashing import sort
from effzoo.attention.kernel import merge
from effzoo.attention.part import Folded, Kernel, Layout, Part, Tile, bias_of
from effzoo.attention.triton_launch import Hashed

TOGETHER = 2**19  # numbers of a tensor of queries or keys
Standing = tuple[Tensor, Tensor]  # places in the sorted order (in chunks, unless `stable`) and buckets, [rounds, ..., n]


@dataclass(frozen=True)
class HashingRounds(Layout):
    """In every round positions are sorted by (bucket, position) and cut into chunks: a query sees its own, `before` ones before it and `after` after.

    A part with these rounds is given its buckets [rounds, batch, heads, n]: `padding`, larger than all others, where there is no token.
    A query does not see its own key. ring: the chunks of all rounds of a head stand in a ring. within: only keys of the query's own bucket.
    once: a pair that meets in several rounds counts once. stable: reach is counted from the query's place, and not from its chunk.
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

    def one_pass(self) -> Hashed | None:
        """All rounds in one pass of our Triton kernels, which know no ring."""
        options = self.within, self.once, self.stable, self.causal
        return None if self.ring else Hashed(self.chunk, self.before, self.after, *options, padding=self.padding)

    def plain(self, part: Part) -> list[Part]:
        tiles, found = Sorted(self, _buckets(part.given)), []
        q, k, v = (_rows(x) for x in (part.q, part.k, part.v))
        for index in range(tiles.rounds):
            layout = Folded(fold=functools.partial(tiles.queries, index=index), unfold=functools.partial(tiles.back, index=index))
            keys, values, bias = tiles.keys(k, index), tiles.keys(v, index), tiles.bias(index, q.dtype)
            found.append(Part(tiles.queries(q, index), keys, values, bias, scale=part.scale, layout=layout))
        return found

    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, heads, n, _ = q.shape
        out = v.new_empty(batch, n, heads, v.shape[-1]).transpose(1, 2)
        lse = q.new_empty(batch, heads, n, 1, dtype=torch.promote_types(q.dtype, torch.float32))
        for where, tiles, number in self._few(q, given):
            of_q, of_k, of_v = (_rows(x[where]) for x in (q, k, v))
            results = []
            for index in range(tiles.rounds):
                one_out, one_lse = kernel.forward(tiles.tile(of_q, of_k, of_v, index), number + index)
                results.append((tiles.back(one_out, index), tiles.back(one_lse.unsqueeze(-1), index)))
            out[where], lse[where] = merge(*results)
        return out, lse

    def backward(
        self, kernel: Kernel, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *given: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients = tuple(x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v))
        exact = torch.promote_types(q.dtype, torch.float32)
        for where, tiles, number in self._few(q, given):
            of_grad, of_q, of_k, of_v, of_out, of_lse = (_rows(x[where]) for x in (grad, q, k, v, out, lse))
            sums: list[Tensor] = []
            for index in range(tiles.rounds):
                of_queries = tiles.queries(of_grad, index), tiles.queries(of_out, index), tiles.queries(of_lse, index).squeeze(-1)
                found = kernel.backward(tiles.tile(of_q, of_k, of_v, index), number + index, *of_queries)
                placed = tiles.back(found[0], index), tiles.keys_back(found[1], index), tiles.keys_back(found[2], index)
                sums = [x.to(exact) for x in placed] if not sums else [total.add_(x) for total, x in zip(sums, placed, strict=True)]
            for whole, total in zip(gradients, sums, strict=True):
                whole[where] = total
        return gradients  # type: ignore[return-value]

    def _few(self, q: Tensor, given: Sequence[Tensor | None]) -> Iterator[tuple[tuple[slice, slice], Sorted, int]]:
        """Which examples and heads, their tiles, and the number of the first round among all; always in the same order."""
        buckets = _buckets(given)
        batch, heads, n, d = q.shape
        together = max(1, TOGETHER // max(1, n * d))
        examples, of_heads = max(1, together // heads), min(together, heads)
        number = 0
        for example in range(0, batch, examples):
            for head in range(0, heads, of_heads):
                where = slice(example, example + examples), slice(head, head + of_heads)
                yield where, Sorted(self, buckets[:, where[0], where[1]]), number
                number += len(buckets)

    def meetings(self, queries: Standing, keys: Standing, chunks: int) -> Tensor:
        """N_ij, int16[..., m, s]: how often queries see keys in all rounds, given where both stand. A ring of chunks may show a chunk twice."""
        (places, buckets), (key_places, key_buckets) = queries, keys
        total, rounds = torch.zeros((), dtype=torch.int16, device=places.device), range(len(places))
        for one, other in itertools.product(rounds, rounds) if self.ring else zip(rounds, rounds, strict=True):
            gap = places[one].unsqueeze(-1) - key_places[other].unsqueeze(-2)
            if self.ring:
                around = gap + (one - other) * chunks
                seen = torch.stack([(around - offset) % (len(rounds) * chunks) == 0 for offset in range(-self.after, self.before + 1)]).sum(0)
            else:
                reach = self.chunk if self.stable else 1
                seen = (gap >= -self.after * reach) & (gap <= self.before * reach)
            same = buckets[one].unsqueeze(-1) == key_buckets[other].unsqueeze(-2) if self.within else True
            total = total + (seen * same).to(torch.int16)
        return total


class Sorted:
    """The tiles of some heads: every round's sequence sorted by (bucket, position), and cut into chunks.

    Padding stands last in each round, so the chunks of tokens are those of the sequence alone. Chunks do not reach over the ends of a round,
    unless they stand in a ring.

    place: the slot of each position, [rounds, groups, n], with groups = batch heads. position, key_position: the positions at the slots of
    the queries, [rounds, groups, chunks, chunk], and of the keys, [rounds, groups, chunks, width]; n where a slot holds no token.
    Tensors by tile are [chunks, groups, chunk or width, d]: the flash operator writes its first axis outermost, and a few heads are then in order
    without a copy.
    """

    def __init__(self, sight: HashingRounds, buckets: Tensor):
        rounds, batch, heads, n = buckets.shape
        groups, chunk = batch * heads, sight.chunk
        chunks, device = -(-n // chunk), buckets.device
        self.sight, self.buckets, self.rounds, self.n, self.chunks = sight, buckets.flatten(1, 2), rounds, n, chunks
        self.batch, self.heads, self.width = batch, heads, (sight.before + 1 + sight.after) * chunk
        order, place = (x.view(rounds, groups, n) for x in sort(buckets))
        lengths = (buckets[0, :, :1] < sight.padding).sum(dim=-1).expand(-1, heads).flatten()
        position = order.masked_fill(torch.arange(n, device=device) >= lengths[:, None], n).int()
        self.place = place
        self.position = self._slots(position, n).view(rounds, groups, chunks, chunk)
        self.key_position = self._key_slots(position, n).unfold(-1, self.width, chunk)
        self._first_row = torch.arange(groups, device=device)[:, None]
        self._query_rows = self._first_row * n + self._slots(order, 0)
        self._key_rows = self._first_row * n + self._key_slots(order, 0)

    def _slots(self, x: Tensor, fill: int) -> Tensor:
        """[rounds, groups, n] in sorted order -> [rounds, groups, chunks chunk]."""
        return F.pad(x, (0, self.chunks * self.sight.chunk - self.n), value=fill)

    def _key_slots(self, x: Tensor, fill: int) -> Tensor:
        """[rounds, groups, n] in sorted order -> [rounds, groups, (before + chunks + after) chunk]."""
        x = self._slots(x, fill)
        before, after, length = self.sight.before * self.sight.chunk, self.sight.after * self.sight.chunk, x.shape[-1]
        if not self.sight.ring:
            return F.pad(x, (before, after), value=fill)
        ring = x.transpose(0, 1).reshape(x.shape[1], -1)
        slot = torch.arange(self.rounds, device=x.device)[:, None] * length + torch.arange(-before, length + after, device=x.device)
        return ring[:, slot % ring.shape[1]].transpose(0, 1)

    def tile(self, q: Tensor, k: Tensor, v: Tensor, index: int) -> Tile:
        """The tiles of one round as one, of rows [groups n, d]."""
        return Tile(self.queries(q, index), self.keys(k, index), self.keys(v, index), self.bias(index, q.dtype), False)

    def queries(self, x: Tensor, index: int) -> Tensor:
        """Rows [groups n, d], or [batch, heads, n, d], by chunk of one round."""
        taken = x.reshape(-1, x.shape[-1]).index_select(0, self._query_rows[index].flatten())
        return taken.view(-1, self.chunks, self.sight.chunk, x.shape[-1]).transpose(0, 1)

    def back(self, x: Tensor, index: int) -> Tensor:
        """The way back, [batch, heads, n, d]."""
        rows = self._first_row * (self.chunks * self.sight.chunk) + self.place[index]
        return x.transpose(0, 1).reshape(-1, x.shape[-1]).index_select(0, rows.flatten()).view(self.batch, self.heads, self.n, -1)

    def keys(self, x: Tensor, index: int) -> Tensor:
        """Rows [groups n, d] -> what the chunks of one round see, a view of the sorted rows."""
        rows = x.index_select(0, self._key_rows[index].flatten()).view(*self._key_rows[index].shape, -1)
        return rows.unfold(1, self.width, self.sight.chunk).transpose(-1, -2).transpose(0, 1)

    def keys_back(self, grad: Tensor, index: int) -> Tensor:
        """The gradient of what `keys` gave -> that of the rows, [batch, heads, n, d]."""
        chunk, key_rows = self.sight.chunk, self._key_rows[index]
        total = grad.new_zeros(*key_rows.shape, grad.shape[-1])
        for offset in range(0, self.width, chunk):  # the chunks of a window: of all windows at once
            of_chunk = total[:, offset : offset + self.chunks * chunk].view(-1, self.chunks, chunk, grad.shape[-1])
            of_chunk.add_(grad[:, :, offset : offset + chunk].transpose(0, 1))
        total = total.flatten(0, 1)
        if self.sight.ring:
            of_rows = total.new_zeros(self.batch * self.heads * self.n, total.shape[-1]).index_add_(0, key_rows.flatten(), total)
        else:  # each row went to one place, where its gradient is found many times faster than it would be scattered
            back = self._first_row * key_rows.shape[1] + self.sight.before * chunk + self.place[index]
            of_rows = total.index_select(0, back.flatten())
        return of_rows.view(self.batch, self.heads, self.n, -1)

    def bias(self, index: int, dtype: torch.dtype) -> Tensor:
        """What queries see in one round, as an additive bias."""
        sight, empty = self.sight, self.n
        query, key = self.position[index].unsqueeze(-1), self.key_position[index].unsqueeze(-2)
        allowed = key < query.masked_fill(query == empty, -1) if sight.causal else (key != query) & (key < empty) & (query < empty)
        if sight.within:
            of_queries, of_keys = self._at(self.buckets[index], index)
            allowed = allowed & (of_queries.unsqueeze(-1) == of_keys.unsqueeze(-2))
        if sight.stable:
            slot, key_slot = (torch.arange(size, device=query.device) for size in (sight.chunk, self.width))
            ahead = key_slot - slot[:, None]  # counted from look_back chunk places before the query
            allowed = allowed & (ahead >= 0) & (ahead <= (sight.before + sight.after) * sight.chunk)
        bias = bias_of(allowed, dtype)
        if sight.once:
            places = self.place if sight.stable else self.place // sight.chunk
            (place, of_key), (bucket, of_bucket) = self._at(places, index), self._at(self.buckets, index)
            bias -= sight.meetings((place, bucket), (of_key, of_bucket), self.chunks).clamp(min=1).to(dtype).log()
        return bias.transpose(0, 1)

    def _at(self, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """What holds of positions, [..., groups, n], at the slots of queries and keys of one round, [..., groups, chunks, chunk or width]."""
        where = [(rows[index] - self._first_row * self.n).expand(*x.shape[:-1], -1) for rows in (self._query_rows, self._key_rows)]
        of_queries, of_keys = (x.gather(-1, slots) for slots in where)
        return of_queries.view(*x.shape[:-1], self.chunks, self.sight.chunk), of_keys.unfold(-1, self.width, self.sight.chunk)


def _buckets(given: Sequence[Tensor | None]) -> Tensor:
    (buckets,) = given
    assert buckets is not None
    return buckets


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
