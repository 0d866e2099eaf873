"""Tiles of a sliding window in closed form, without copies.

Queries are cut into chunks; the keys of a chunk are those that its queries may see. Chunks of the same shape form a
run, which is computed as one batch: their keys are overlapping views of one tensor, and they share one small mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from effzoo.attention.tiles import TilePositions, TileRun, Tiles

SMALLEST, LARGEST = 32, 256  # chunks: smaller tiles are slow, larger ones compute more masked pairs
TOGETHER = 1024  # queries of a run: the gradients of its keys stay in the cache until they are summed

Predicate = Callable[[Tensor, Tensor], Tensor]  # queries [m, 1], keys [1, s] -> bool: which keys a query sees


@dataclass(frozen=True)
class Window:
    """A query sees the keys of at most `left` positions before it and `right` after it; None: no bound.

    dilation: of these, every `dilation`-th key.
    chunk: left and right count chunks of so many positions; a query sees whole chunks, its own in between.
    """

    left: int | None
    right: int | None
    dilation: int = 1
    chunk: int = 1

    def cut(self, n: int, causal: bool, predicate: Predicate) -> Tiles | None:
        """The tiles for n positions; None where a query sees all keys (all before it, when causal)."""
        queries, chunk = -(-n // self.dilation), min(self.chunk, n)
        left, right = (queries if most is None else most * chunk for most in (self.left, self.right))
        if self.dilation == 1 and left >= n - 1 and (causal or right >= n - 1):
            return None
        right = 0 if causal else right
        size = chunk if self.chunk > 1 else min(queries, max(SMALLEST, min((left + right) // 2, LARGEST)))
        runs = cut(queries, size, lambda query, count: (query - left, query + count + right), predicate, self.dilation)
        return Tiles(n, runs, dilation=self.dilation, window=self, causal=causal)

    def predicate(self, causal: bool) -> Predicate:
        """Which keys a query sees."""

        def predicate(query: Tensor, key: Tensor) -> Tensor:
            gap, unit = query // self.chunk - key // self.chunk, self.dilation
            seen = gap % unit == 0
            if self.left is not None:
                seen = seen & (gap <= self.left * unit)
            if self.right is not None:
                seen = seen & (-gap <= self.right * unit)
            return seen & (key <= query) if causal else seen

        return predicate

    @property
    def plain(self) -> bool:
        """Whether it has neither dilation nor chunks."""
        return self.dilation == self.chunk == 1

    @property
    def past(self) -> int | None:
        """The largest number of keys before a query that it sees; None: no bound."""
        return None if self.left is None else self.left * self.dilation * self.chunk + self.chunk - 1


@dataclass
class _Chunks:
    """Chunks of the same shape, one after the other: the first query and key, queries and keys of each chunk."""

    query: int
    key: int
    queries: int
    keys: int
    count: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """Equal for chunks whose masks are equal."""
        return self.queries, self.keys, self.query - self.key


def cut(
    n: int, size: int, keys: Callable[[int, int], tuple[int, int]], predicate: Predicate, dilation: int = 1
) -> tuple[TileRun, ...]:
    """Runs of chunks of `size` queries, for n queries.

    keys: first query of a chunk and its number of queries -> its first key, and the one after its last.
    """
    groups: list[_Chunks] = []
    for query in range(0, n, size):
        queries = min(size, n - query)
        first, last = keys(query, queries)
        key = max(0, first)
        chunk = _Chunks(query, key, queries, min(n, last) - key)
        if groups and groups[-1].shape == chunk.shape and (groups[-1].count + 1) * size <= TOGETHER:
            groups[-1].count += 1
        else:
            groups.append(chunk)
    masks: dict[tuple[int, int, int], Tensor | None] = {}
    runs = []
    for group in groups:
        if group.shape not in masks:
            query_positions = torch.arange(group.query, group.query + group.queries, device="cpu") * dilation
            key_positions = torch.arange(group.key, group.key + group.keys, device="cpu") * dilation
            seen = predicate(query_positions[:, None], key_positions[None])
            masks[group.shape] = None if bool(seen.all()) else seen.expand(1, group.queries, group.keys)
        query_tiles = TilePositions(group.count, group.queries, size, group.query)
        key_tiles = TilePositions(group.count, group.keys, size, group.key)
        runs.append(TileRun(query_tiles, key_tiles, masks[group.shape]))
    return tuple(runs)
