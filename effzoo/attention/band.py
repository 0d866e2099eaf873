"""Windows without copies: a kind declares how far its queries look, by a `Window`, and the tiles follow in closed form.

Queries are cut into chunks; a chunk takes the keys that its queries may see, as far as the sequence goes. Chunks that
look alike form a run, which attention takes as one batch: in the middle of a sequence their keys are overlapping views
of one tensor, and they share one small mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from effzoo.attention.tiles import Run, Slots, Tiles

SMALLEST, LARGEST = 32, 256  # chunks: smaller tiles are slow, larger ones compute more masked pairs
# queries of a run: the gradients of its keys, before they are added up, are then memory that is soon used again
TOGETHER = 1024


# which keys a query sees: indices of queries [m, 1] and of keys [1, s] -> bool, broadcastable to [m, s]
Sees = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Window:
    """A declared sight: a query sees keys at most `left` places before it and `right` after it, and of these every
    `dilation`-th; None: no bound.

    chunk: the places are chunks of so many positions, of which a query sees whole ones: `left` before its own, its own,
        and `right` after it.
    """

    left: int | None
    right: int | None
    dilation: int = 1
    chunk: int = 1

    def cut(self, n: int, causal: bool, sees: Sees) -> Tiles | None:
        """The tiles for n positions; None where a query sees all of them, or all before it."""
        rows, chunk = -(-n // self.dilation), min(self.chunk, n)
        left, right = (rows if most is None else most * chunk for most in (self.left, self.right))
        if self.dilation == 1 and left >= n - 1 and (causal or right >= n - 1):
            return None
        right = 0 if causal else right
        size = chunk if self.chunk > 1 else min(rows, max(SMALLEST, min((left + right) // 2, LARGEST)))
        runs = cut(rows, size, lambda query, queries: (query - left, query + queries + right), sees, self.dilation)
        return Tiles(n, runs, dilation=self.dilation, sight=self, causal=causal)

    @property
    def plain(self) -> bool:
        """Whether it is a window without holes or chunks."""
        return self.dilation == self.chunk == 1

    @property
    def kept(self) -> int | None:
        """How many keys before a later query it can see."""
        return None if self.left is None else self.left * self.dilation * self.chunk + self.chunk - 1


def cut(
    rows: int, size: int, keys: Callable[[int, int], tuple[int, int]], sees: Sees, dilation: int = 1
) -> tuple[Run, ...]:
    """Chunks of `size` queries, alike ones together. keys: the first query of a chunk and its queries -> the first key
    and the one after the last."""
    # chunks that look alike: the first query and key, queries and keys of each, how many
    found: list[tuple[int, int, int, int, int]] = []
    for query in range(0, rows, size):
        queries = min(size, rows - query)
        first, last = keys(query, queries)
        key = max(0, first)
        if found:
            at, at_key, alike, alike_keys, count = found[-1]
            looks = (queries, query - key, min(rows, last) - key) == (alike, at - at_key, alike_keys)
            if looks and (count + 1) * size <= TOGETHER:
                found[-1] = at, at_key, alike, alike_keys, count + 1
                continue
        found.append((query, key, queries, min(rows, last) - key, 1))
    masks: dict[tuple[int, int, int], Tensor | None] = {}
    runs = []
    for query, key, queries, count_keys, count in found:
        looked = queries, query - key, count_keys
        if looked not in masks:
            at_query, at_keys = (
                torch.arange(at, at + many, device="cpu") * dilation
                for at, many in ((query, queries), (key, count_keys))
            )
            seen = sees(at_query[:, None], at_keys[None])
            masks[looked] = None if bool(seen.all()) else seen.expand(1, queries, count_keys)
        runs.append(Run(Slots(count, queries, size, query), Slots(count, count_keys, size, key), masks[looked]))
    return tuple(runs)
