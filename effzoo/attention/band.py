"""Windows without copies: which keys every chunk of queries sees, and the masks of the chunks at the ends alone.

A band lets query i see key j where -right <= i - j <= left. Queries are cut into chunks; a chunk sees `left` keys before its first query and
`right` after its last, as far as the sequence goes. Chunks that look alike form a run, which attention takes as one batch: in the middle of a
sequence their keys are overlapping views of one tensor, and they share one small mask.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

SMALLEST, LARGEST = 32, 256  # chunks: smaller tiles are slow, larger ones compute more masked pairs
TOGETHER = 1024  # queries of a run: the gradients of its keys, before they are added up, are then memory that is soon used again


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
class Band:
    """n positions; with a dilation r, those with the same remainder by r form sequences of their own, in which the band is dense.

    Everything here takes and gives [batch, heads, n, x], or lists with one tensor [batch of the run, heads, queries or keys, x] for every run.
    """

    n: int
    left: int
    right: int
    dilation: int
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, n: int, left: int, right: int, dilation: int = 1) -> Band:
        rows = -(-n // dilation)
        size = min(rows, max(SMALLEST, min((left + right) // 2, LARGEST)))
        runs: list[Run] = []
        for query in range(0, rows, size):
            queries, key = min(size, rows - query), max(0, query - left)
            keys = min(rows, query + queries + right) - key
            before = runs[-1] if runs else None
            run = Run(1, query, queries, key, keys)
            if before is not None and before.looks == run.looks and (before.chunks + 1) * size <= TOGETHER:
                runs[-1] = Run(before.chunks + 1, *before[1:])
            else:
                runs.append(run)
        return cls(n, left, right, dilation, tuple(runs))

    def tiles(self, q: Tensor, k: Tensor, v: Tensor, given: Sequence[Tensor | None]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """Queries, keys, values and bias of every run; given: what `given` made."""
        held, *biases = given
        keys = itertools.repeat(None) if held is None else self._keys(held[:, None, :, None])
        for of_q, of_k, of_v, bias, seen in zip(self.rows(q), self._keys(k), self._keys(v), biases, keys, strict=False):
            if seen is None:
                yield of_q, of_k, of_v, bias
            else:
                band = q.new_zeros(1, 1, of_q.shape[2], of_k.shape[2]) if bias is None else bias
                yield of_q, of_k, of_v, band.masked_fill(~seen.transpose(2, 3), -math.inf)

    def given(self, held: Tensor | None, q: Tensor) -> list[Tensor | None]:
        """What attention over the band needs besides q, k and v: which keys are held, bool[batch, n] (tokens, say; None for all), and the bias of
        every run, 0 in the band and -inf outside; None where all pairs are in it."""
        if held is None and self.n % self.dilation:  # what fills up the sequences is not
            held = torch.ones(q.shape[0], self.n, dtype=torch.bool, device=q.device)
        made: dict[tuple[int, int, int], Tensor | None] = {}
        for run in self.runs:
            if run.looks in made:
                continue
            made[run.looks] = None
            if run.query + run.queries - 1 - run.key > self.left or run.key + run.keys - 1 - run.query > self.right:
                gap = torch.arange(run.query, run.query + run.queries)[:, None] - torch.arange(run.key, run.key + run.keys)
                outside = (gap > self.left) | (gap < -self.right)
                made[run.looks] = torch.zeros(1, 1, *gap.shape, dtype=q.dtype).masked_fill_(outside, -math.inf).to(q.device)
        return [held, *(made[run.looks] for run in self.runs)]

    def rows(self, x: Tensor) -> list[Tensor]:
        """Queries, or what belongs to them, by run."""
        x = self._dense(x)
        return [
            rearrange(x[:, :, run.query : run.query + run.chunks * run.queries], "b h (chunks c) d -> (b chunks) h c d", c=run.queries)
            for run in self.runs
        ]

    def join(self, tiles: Sequence[Tensor]) -> Tensor:
        """The way back."""
        found = [rearrange(tile, "(b chunks) h c d -> b (chunks c) h d", chunks=run.chunks) for tile, run in zip(tiles, self.runs, strict=True)]
        return self._back((found[0] if len(found) == 1 else torch.cat(found, dim=1)).transpose(1, 2))

    of_queries = join

    def of_keys(self, tiles: Sequence[Tensor]) -> Tensor:
        """Gradients of the keys that every run has seen, added up."""
        batch, heads, d = tiles[0].shape[0] // self.runs[0].chunks, tiles[0].shape[1], tiles[0].shape[3]
        n = -(-self.n // self.dilation)
        # room behind the last key, so that each slice is a plain view: traced by torch 2.13, writing into one of `unfold` clears what lies between
        total = tiles[0].new_zeros(batch, n + max(run.queries for run in self.runs), heads, d).transpose(1, 2)
        for tile, run in zip(tiles, self.runs, strict=True):
            of_chunks = rearrange(tile, "(b chunks) h s d -> b h chunks s d", chunks=run.chunks)
            for start in range(0, run.keys, run.queries):  # slices as long as the step from chunk to chunk do not overlap
                width, first = min(run.queries, run.keys - start), run.key + start
                rows = total[:, :, first : first + run.chunks * run.queries].view(batch, heads, run.chunks, run.queries, d)
                rows[..., :width, :] += of_chunks[..., start : start + width, :]
        return self._back(total[:, :, :n])

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
