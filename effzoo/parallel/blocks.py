"""Blockwise attention over ranks: each rank fetches the key blocks that its query blocks name, head by head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effzoo.attention.blockwise import Blockwise, Permutation
from effzoo.attention.core import Mask, memory_part
from effzoo.attention.part import Part, bias_of, join_heads
from effzoo.attention.predicate import lengths
from effzoo.parallel.kinds import attention, of_all
from effzoo.parallel.ranks import Range, Route, Split, gathered, overlap
from effzoo.sites import KeysValues


class Segment(NamedTuple):
    """Queries of one block at one rank, the keys that they see, and whether a query sees those up to its own alone."""

    queries: Range
    keys: Range
    diagonal: bool

    def tiles(self) -> list[tuple[Range, bool]]:
        """Ranges of keys, and whether they are under the triangle of the queries; none where there is no key."""
        (start, stop), low = self.keys, self.queries[0]
        ranges = [((start, low), False), ((low, stop), True)] if self.diagonal else [((start, stop), False)]
        return [(keys, causal) for keys, causal in ranges if keys[0] < keys[1]]


def segments(
    core: Blockwise, permutation: Permutation, block: int, length: int, split: Split, rank: int
) -> list[Segment]:
    """The segments of a rank, in an example of so many tokens; keys are an empty range where a query sees none."""
    first, end = split.range(rank)
    found = []
    for number, key in enumerate(permutation):
        queries = overlap((first, end), (number * block, (number + 1) * block))
        if queries is None:
            continue
        diagonal = core.context.causal and key == number
        last = queries[1] if diagonal else min((key + 1) * block, length)
        hidden = (core.context.causal and key > number) or last <= key * block
        found.append(Segment(queries, (0, 0) if hidden else (key * block, last), diagonal))
    if (beyond := max(first, len(permutation) * block)) < end:
        found.append(Segment((beyond, end), (0, 0), False))
    return found


@dataclass(frozen=True)
class Wanted:
    """The positions of keys and values that a rank wants, [example][head of keys]: ranges that do not touch."""

    ranges: list[list[list[Range]]]

    @classmethod
    def of(cls, core: Blockwise, blocks: list[int], lengths: list[int], group: int, split: Split, rank: int) -> Wanted:
        """blocks, lengths: of each example; group: heads that share a head of keys."""
        by_example = []
        for block, length in zip(blocks, lengths, strict=True):
            of_permutation = {
                permutation: [one.keys for one in segments(core, permutation, block, length, split, rank)]
                for permutation in set(core.permutations)
            }
            heads: list[list[Range]] = []
            for head in range(0, core.context.heads, group):
                permutations = core.permutations[head : head + group]
                heads.append(_joined([keys for one in permutations for keys in of_permutation[one]]))
            by_example.append(heads)
        return cls(by_example)

    def rows(self) -> Iterator[tuple[int, int, Range]]:
        """Example, head and range, in the order in which they are laid out."""
        for example, heads in enumerate(self.ranges):
            for head, ranges in enumerate(heads):
                for one in ranges:
                    yield example, head, one

    def shared(self, held: Range) -> Iterator[tuple[int, int, Range, int]]:
        """Example, head, the range that lies in `held`, and its place in the layout."""
        start = 0
        for example, head, one in self.rows():
            if (both := overlap(one, held)) is not None:
                yield example, head, both, start + both[0] - one[0]
            start += one[1] - one[0]

    @property
    def size(self) -> int:
        return sum(end - first for _, _, (first, end) in self.rows())

    def starts(self) -> dict[tuple[int, int, int], int]:
        """(example, head, first position of a range) -> its place in the layout."""
        places, start = {}, 0
        for example, head, (first, end) in self.rows():
            places[example, head, first] = start
            start += end - first
        return places

    def place(self, places: dict[tuple[int, int, int], int], example: int, head: int, position: int) -> int:
        """Where a wanted position stands in the layout."""
        first = max(low for low, high in self.ranges[example][head] if low <= position < high)
        return places[example, head, first] + position - first


def _joined(ranges: list[Range]) -> list[Range]:
    """The union of ranges, sorted, without empty ones."""
    union: list[Range] = []
    for first, end in sorted(one for one in ranges if one[0] < one[1]):
        if union and first <= union[-1][1]:
            union[-1] = union[-1][0], max(end, union[-1][1])
        else:
            union.append((first, end))
    return union


def _route(wanted: list[Wanted], heads: int, split: Split) -> Route:
    """Which rows of [batch, heads, m] each rank sends to this one, and where they are put."""
    (first, end), mine = split.range(), wanted[split.rank]
    send, put = [], []
    for rank in range(split.ranks):
        given = [
            torch.arange(low, high) - first + (example * heads + head) * (end - first)
            for example, head, (low, high), _ in wanted[rank].shared((first, end))
        ]
        got = [torch.arange(place, place + high - low) for _, _, (low, high), place in mine.shared(split.range(rank))]
        send.append(torch.cat([torch.arange(0), *given]))
        put.append(torch.cat([torch.arange(0), *got]))
    return Route(send, put, mine.size)


@attention.register
def _(
    core: Blockwise, split: Split, *projected: Any, mask: Mask, memory: KeysValues | None = None, group: int = 1
) -> Tensor:
    q, k, v = projected
    batch, heads, _, d = q.shape
    (first, _), valid = split.range(), of_all(mask, split, "valid")
    ends = [split.n] * batch if valid is None else lengths(valid).tolist()
    size = core.block_size(split.n)
    blocks = [max(1, -(-end // core.blocks)) if core.by_length else size for end in ends]
    keys_values = torch.cat([k[:, ::group], v[:, ::group]], dim=-1)

    def make() -> tuple[Wanted, Route]:
        wanted = [Wanted.of(core, blocks, ends, group, split, rank) for rank in range(split.ranks)]
        route = _route(wanted, heads // group, split)
        return wanted[split.rank], route.to(q.device)

    wanted, route = mask.memo(("key blocks", core.permutations, core.block, group), make)
    rows, places = gathered(keys_values.flatten(0, 2), route, split, "blocks"), wanted.starts()

    def near(examples: list[int], of_group: list[int], keys: Range) -> Tensor:
        """Keys and values of a range that is wanted, [examples, heads, keys, 2 d]."""
        index = [[wanted.place(places, example, head // group, keys[0]) for head in of_group] for example in examples]
        first_row = torch.tensor(index, device=q.device)
        return rows[first_row[..., None] + torch.arange(keys[1] - keys[0], device=q.device)]

    def attended(examples: list[int], of_group: list[int], one: Segment) -> Tensor:
        some = q[examples][:, of_group, one.queries[0] - first : one.queries[1] - first]
        parts = [None if memory is None else memory_part(some, _chosen(memory, examples, of_group))]
        for keys, causal in one.tiles():
            found = near(examples, of_group, keys)
            bias = None if valid is None else bias_of(valid[examples, None, None, keys[0] : keys[1]], q.dtype)
            parts.append(Part(some, found[..., :d], found[..., d:], bias, causal=causal))
        return core.attend(*parts) if any(part is not None for part in parts) else torch.zeros_like(some)

    alike: dict[tuple[int, int], list[int]] = {}  # block and length -> examples
    for example, sizes in enumerate(zip(blocks, ends, strict=True)):
        alike.setdefault(sizes, []).append(example)
    by_heads, outs = core.heads_by_permutation(), []
    for (block, end), examples in alike.items():
        of_heads = []
        for permutation, of_group in by_heads.items():
            found = segments(core, permutation, block, end, split, split.rank)
            of_heads.append(torch.cat([attended(examples, of_group, one) for one in found], dim=2))
        outs.append(join_heads(list(by_heads.values()), of_heads))
    out, order = torch.cat(outs), [example for examples in alike.values() for example in examples]
    out = out[sorted(range(batch), key=order.__getitem__)] if len(alike) > 1 else out
    return out + rows[:0].sum()  # a rank that saw no key has to take part in the exchange of gradients


def _chosen(memory: KeysValues, examples: list[int], heads: list[int]) -> KeysValues:
    """The memory of some examples and heads."""
    keys, values = (x[heads] if x.ndim == 3 else x[examples][:, heads] for x in memory)
    return keys, values
