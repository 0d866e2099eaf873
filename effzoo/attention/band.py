"""Windows without copies: which keys every chunk of queries sees, and the masks of the chunks at the ends alone.

A kind declares how far its queries look: by a `Window` (query i sees key j where -right <= i - j <= left) or by `Chunks`.

Queries are cut into chunks; a chunk takes the keys that its queries may see, as far as the sequence goes. Chunks that look alike form a run, which
attention takes as one batch: in the middle of a sequence their keys are overlapping views of one tensor, and they share one small mask.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from effzoo.attention.part import Tile, Tiled, bias_of
from effzoo.devices import sent

SMALLEST, LARGEST = 32, 256  # chunks: smaller tiles are slow, larger ones compute more masked pairs
TOGETHER = 1024  # queries of a run: the gradients of its keys, before they are added up, are then memory that is soon used again


Sees = Callable[[Tensor, Tensor], Tensor]  # which keys a query sees: indices of queries [m, 1] and of keys [1, s] -> bool[m, s]


class Run(NamedTuple):
    """Chunks that look alike: how many, the first query and the queries of a chunk, the first key and the keys of a chunk."""

    chunks: int
    query: int
    queries: int
    key: int
    keys: int

    @property
    def looks(self) -> tuple[int, int, int]:
        """What its chunks have in common."""
        return self.queries, self.query - self.key, self.keys


@dataclass(frozen=True)
class Window:
    """A declared sight: a query sees keys at most `left` places before it and `right` after it, and of these every `dilation`-th; None: no bound."""

    left: int | None
    right: int | None
    dilation: int = 1

    def cut(self, n: int, causal: bool) -> Band | None:
        """The tiles for n positions; None where a query sees all of them, or all before it."""
        rows = -(-n // self.dilation)
        left, right = (rows if most is None else most for most in (self.left, self.right))
        if self.dilation == 1 and left >= n - 1 and (causal or right >= n - 1):
            return None
        right = 0 if causal else right
        size = min(rows, max(SMALLEST, min((left + right) // 2, LARGEST)))
        runs = _runs(rows, size, lambda query, queries: (query - left, query + queries + right))
        return Band(n, self.dilation, runs, (left, right) if self.dilation == 1 else None)

    @property
    def kept(self) -> int | None:
        """How many keys before a later query it can see."""
        return None if self.left is None else self.left * self.dilation


@dataclass(frozen=True)
class Chunks:
    """A declared sight: a query sees its own chunk of `size` places, `before` chunks before it and `after` chunks after it."""

    size: int
    before: int
    after: int

    def cut(self, n: int, causal: bool) -> Band:
        size = min(self.size, n)
        before, after = self.before * size, 0 if causal else self.after * size
        return Band(n, 1, _runs(n, size, lambda query, queries: (query - before, query + size + after)))

    @property
    def kept(self) -> int:
        """How many keys before a later query it can see."""
        return (self.before + 1) * self.size


def _runs(rows: int, size: int, sight: Callable[[int, int], tuple[int, int]]) -> tuple[Run, ...]:
    """Chunks of `size` queries, alike ones together. sight: first query of a chunk and its queries -> the first key and the one after the last."""
    runs: list[Run] = []
    for query in range(0, rows, size):
        queries = min(size, rows - query)
        first, last = sight(query, queries)
        key = max(0, first)
        run = Run(1, query, queries, key, min(rows, last) - key)
        before = runs[-1] if runs else None
        if before is not None and before.looks == run.looks and (before.chunks + 1) * size <= TOGETHER:
            runs[-1] = Run(before.chunks + 1, *before[1:])
        else:
            runs.append(run)
    return tuple(runs)


@dataclass(frozen=True)
class Band(Tiled):
    """n positions; with a dilation r, those with the same remainder by r form sequences of their own, in which the keys of a chunk are dense.

    Everything here takes and gives [batch, heads, n, x], or lists with one tensor [batch of the run, heads, queries or keys, x] for every run.
    """

    n: int
    dilation: int
    runs: tuple[Run, ...]
    window: tuple[int, int] | None = None  # keys before and after a query, where that says it all

    def bare(self, given: Sequence[Tensor | None]) -> bool:
        return given[0] is None and (self.window is not None or all(bias is None for bias in given))

    def tiles(self, q: Tensor, k: Tensor, v: Tensor, given: Sequence[Tensor | None]) -> Iterator[Tile]:
        """The tile of every run; given: what `given` made."""
        held, *biases = given
        keys = itertools.repeat(None) if held is None else self._keys(held[:, None, :, None])
        for of_q, of_k, of_v, bias, seen in zip(self.rows(q), self._keys(k), self._keys(v), biases, keys, strict=False):
            if seen is not None:
                band = q.new_zeros(1, 1, of_q.shape[2], of_k.shape[2]) if bias is None else bias
                bias = band.masked_fill(~seen.transpose(2, 3), -math.inf)
            yield Tile(of_q, of_k, of_v, bias, False)

    def given(self, sees: Sees, held: Tensor | None, q: Tensor) -> list[Tensor | None]:
        """What attention over the band needs besides q, k and v: which keys are held, bool[batch, n] (tokens, say; None for all), and the bias of
        every run, 0 where a query sees a key and -inf elsewhere; None where it sees all. Chunks that look alike see alike."""
        if held is None and self.n % self.dilation:  # what fills up the sequences is not
            held = torch.ones(q.shape[0], self.n, dtype=torch.bool, device=q.device)
        made: dict[tuple[int, int, int], Tensor | None] = {}
        for run in self.runs:
            if run.looks not in made:
                query, key = (torch.arange(first, first + count) * self.dilation for first, count in ((run.query, run.queries), (run.key, run.keys)))
                seen = sees(query[:, None], key[None]).expand(run.queries, run.keys)
                made[run.looks] = None if bool(seen.all()) else sent(bias_of(seen[None, None], q.dtype), q.device)
        return [held, *(made[run.looks] for run in self.runs)]

    def rows(self, x: Tensor) -> list[Tensor]:
        """Queries, or what belongs to them, by run."""
        x = self._dense(x)
        return [
            rearrange(x[:, :, run.query : run.query + run.chunks * run.queries], "b h (chunks c) d -> (b chunks) h c d", c=run.queries)
            for run in self.runs
        ]

    def join(self, tiles: Sequence[Tensor], fill: float = 0.0) -> Tensor:
        """The way back."""
        found = [rearrange(tile, "(b chunks) h c d -> b (chunks c) h d", chunks=run.chunks) for tile, run in zip(tiles, self.runs, strict=True)]
        return self._back((found[0] if len(found) == 1 else torch.cat(found, dim=1)).transpose(1, 2))

    def no_keys(self, k: Tensor) -> Tensor:
        batch, heads, _, d = k.shape
        # room behind the last key, so that each slice is a plain view: traced by torch 2.13, writing into one of `unfold` clears what lies between
        room = -(-self.n // self.dilation) + max(run.queries for run in self.runs)
        return k.new_zeros(batch * self.dilation, room, heads, d).transpose(1, 2)

    def add_keys(self, total: Tensor, index: int, grad: Tensor) -> None:
        run = self.runs[index]
        batch, heads, _, d = total.shape
        of_chunks = rearrange(grad, "(b chunks) h s d -> b h chunks s d", chunks=run.chunks)
        for start in range(0, run.keys, run.queries):  # slices as long as the step from chunk to chunk do not overlap
            width, first = min(run.queries, run.keys - start), run.key + start
            rows = total[:, :, first : first + run.chunks * run.queries].view(batch, heads, run.chunks, run.queries, d)
            rows[..., :width, :] += of_chunks[..., start : start + width, :]

    def of_keys(self, total: Tensor, k: Tensor) -> Tensor:
        return self._back(total[:, :, : -(-self.n // self.dilation)])

    def _keys(self, x: Tensor) -> list[Tensor]:
        """Keys, or what belongs to them, by run: views where the batch allows it."""
        x = self._dense(x)
        return [rearrange(self._windows(x, run), "b h chunks s d -> (b chunks) h s d") for run in self.runs]

    @staticmethod
    def _windows(x: Tensor, run: Run) -> Tensor:
        """[batch, heads, n, d] -> the keys of each chunk of a run, a view [batch, heads, chunks, keys, d]."""
        until = run.key + (run.chunks - 1) * run.queries + run.keys
        return x[:, :, run.key : until].unfold(2, run.keys, run.queries).transpose(3, 4)

    def _dense(self, x: Tensor) -> Tensor:
        """[batch, heads, n, d] -> [batch dilation, heads, n / dilation, d]."""
        if self.dilation == 1:
            return x
        return rearrange(F.pad(x, (0, 0, 0, -self.n % self.dilation)), "b h (n r) d -> (b r) h n d", r=self.dilation)

    def _back(self, x: Tensor) -> Tensor:
        return x if self.dilation == 1 else rearrange(x, "(b r) h n d -> b h (n r) d", r=self.dilation)[:, :, : self.n]
