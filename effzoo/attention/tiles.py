"""Tiles of the attention of a sequence to itself: views where their positions follow each other, else gathered."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from effzoo.attention.part import DisjointTiling, Tile, bias_of, join_heads
from effzoo.attention.triton_launch import Hashed, OnePass
from effzoo.devices import chosen, sent

if TYPE_CHECKING:
    from effzoo.attention.band import Window


@dataclass(frozen=True, eq=False)
class TilePositions:
    """The positions of `count` tiles of `length`: the first tile starts at `first`, each next one `step` later.

    index int[count, length]: the positions, where they do not follow each other; [batch, count, length] where the
        examples differ.
    """

    count: int
    length: int
    step: int = 0
    first: int = 0
    index: Tensor | None = None

    @classmethod
    def of(cls, index: Tensor) -> TilePositions:
        """Positions int[count, length]."""
        count, length = index.shape[-2:]
        first = int(index.flatten()[0])
        ordered = torch.equal(index.flatten(), torch.arange(first, first + index.numel(), device="cpu"))
        return cls(count, length, length, first) if ordered else cls(count, length, index=index)

    def flatten(self) -> Tensor:
        """The positions of all tiles, one after the other, where tiles do not overlap."""
        if self.index is not None:
            return self.index.flatten()
        return torch.arange(self.first, self.first + self.count * self.length, device="cpu")

    def places(self, device: torch.device) -> Tensor:
        """The positions of each tile, int[count, length], or [batch, count, length] where the examples differ."""
        if self.index is not None:
            return self.index.to(device)
        start = torch.arange(self.count, device=device) * self.step + self.first
        return start[:, None] + torch.arange(self.length, device=device)

    @property
    def end(self) -> int:
        """The end of the last tile, rounded up to whole steps."""
        return self.first + (self.count + -(-self.length // self.step) - 1) * self.step if self.index is None else 0

    def to(self, device: torch.device) -> TilePositions:
        return self if self.index is None else replace(self, index=sent(self.index, device))

    def take(self, x: Tensor) -> Tensor:
        """x at these positions, [batch, heads, n, d] -> [batch count, heads, length, d]; a view for batch 1 without
        index."""
        batch, heads, _, d = x.shape
        if self.index is not None:
            taken = select(x.transpose(1, 2), self.index.flatten(-2))
            return taken.reshape(batch * self.count, self.length, heads, d).transpose(1, 2)
        until = self.first + (self.count - 1) * self.step + self.length
        windows = x[:, :, self.first : until].unfold(2, self.length, self.step)
        return windows.permute(0, 2, 1, 4, 3).reshape(batch * self.count, heads, self.length, d)

    def add(self, total: Tensor, grad: Tensor) -> None:
        """The adjoint of `take`: add its gradient to total [batch, `end` or more, heads, d]."""
        batch, n, heads, d = total.shape
        by_tile = grad.transpose(1, 2).reshape(batch, self.count, self.length, heads, d)
        if self.index is None:
            # slices of one step do not overlap from tile to tile
            for start in range(0, self.length, self.step):
                width, first = min(self.step, self.length - start), self.first + start
                steps = total[:, first : first + self.count * self.step].view(batch, self.count, self.step, heads, d)
                steps[:, :, :width] += by_tile[:, :, start : start + width]
        elif self.index.ndim == 2:
            total.index_add_(1, self.index.flatten(), by_tile.flatten(1, 2).to(total.dtype))
        else:
            flat = _flat(self.index.flatten(1), n)
            total.view(-1, heads, d).index_add_(0, flat, by_tile.flatten(0, 2).to(total.dtype))


@dataclass(frozen=True, eq=False)
class TileRun:
    """Tiles of one shape, which are computed as one batch.

    allowed bool[tiles or 1, queries or 1, keys]: which pairs are seen, or how often each counts; None for all, once.
    causal: those of a triangle.
    filled bool[batch tiles, 1, queries, 1]: which slots hold a query, where the examples differ.
    """

    queries: TilePositions
    keys: TilePositions
    allowed: Tensor | None = None
    causal: bool = False
    filled: Tensor | None = None

    def added(self, scores: Tensor, tiles: Tiles, count: int) -> Tensor:
        """What is added to the scores of `count` tiles by distance, [count or 1, heads, queries, keys]."""
        centre = scores.shape[1] // 2
        if self.queries.index is None and self.keys.index is None:  # the same in all tiles
            query, key = (
                torch.arange(side.length, device=scores.device) + side.first for side in (self.queries, self.keys)
            )
            place = (key[None, :] - query[:, None]) * tiles.dilation + centre
            return scores[:, place.clamp(0, 2 * centre)][None]
        query, key = (side.places(scores.device) for side in (self.queries, self.keys))
        place = (key[..., None, :] - query[..., :, None]) * tiles.dilation + centre
        place = place.clamp(0, 2 * centre).reshape(-1, *place.shape[-2:])  # slots that hold no position are not seen
        return scores[:, place].transpose(0, 1).repeat(count // len(place), 1, 1, 1)

    def to(self, device: torch.device) -> TileRun:
        allowed, filled = (None if x is None else sent(x, device) for x in (self.allowed, self.filled))
        return TileRun(self.queries.to(device), self.keys.to(device), allowed, self.causal, filled)


@dataclass(frozen=True, eq=False)
class Tiles(DisjointTiling):
    """n positions in runs of tiles. Input of the part: which keys are seen at all, bool[batch, n]; None for all.

    place int[n] or [batch, n]: the index of each query in the queries of all tiles, one after the other; their number
        for a query without keys. None: in order.
    dilation: positions with the same remainder form a sequence of their own, which the runs cut.
    window, causal: what the runs were cut from, if they were.
    """

    n: int
    runs: tuple[TileRun, ...]
    place: Tensor | None = None
    dilation: int = 1
    window: Window | None = None
    causal: bool = False
    _biases: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    def to(self, device: torch.device) -> Tiles:
        if device.type == "cpu":
            return self
        place = None if self.place is None else sent(self.place, device)
        return replace(self, runs=tuple(run.to(device) for run in self.runs), place=place, _biases={})

    @property
    def plain_window(self) -> tuple[int, int] | None:
        """How many keys before and after itself a query sees; None if the tiles are no plain window."""
        if self.window is None or not self.window.plain:
            return None
        left, right = (self.n if most is None else most for most in (self.window.left, self.window.right))
        return left, 0 if self.causal else right

    def one_pass(self) -> list[tuple[list[int], OnePass | Hashed]]:
        return [] if self.window is None else [([], OnePass(self.causal, self.window))]

    def has_no_bias(self, inputs: Sequence[Tensor | None]) -> bool:
        whole = self.n % self.dilation == 0 and all(run.allowed is None for run in self.runs)
        return inputs[0] is None and (whole or self.plain_window is not None)

    def tiles(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor | None]) -> Iterator[Tile]:
        (key_mask,) = inputs
        if key_mask is None and self.n % self.dilation:  # zeros that make the sequences equally long are no keys
            key_mask = torch.ones(q.shape[0], self.n, dtype=torch.bool, device=q.device)
        q, k, v = self._dense(q), self._dense(k), self._dense(v)
        dense_mask = None if key_mask is None else self._dense(key_mask[:, None, :, None])
        for run in self.runs:
            bias = self._bias(run, q)
            if dense_mask is not None:
                seen = run.keys.take(dense_mask).mT
                bias = bias_of(seen, q.dtype) if bias is None else bias.masked_fill(~seen, -math.inf)
            yield Tile(run.queries.take(q), run.keys.take(k), run.keys.take(v), bias, run.causal)

    def _bias(self, run: TileRun, q: Tensor) -> Tensor | None:
        """The bias of a run, [batch tiles or 1, 1, queries or 1, keys]; those of a window are few, and made once."""
        allowed, key = run.allowed, (id(run.allowed), q.dtype)
        if allowed is None or key in self._biases:
            return self._biases.get(key)
        same_in_batch = all(side.index is None or side.index.ndim == 2 for side in (run.queries, run.keys))
        repeats = len(q) if len(allowed) > 1 and same_in_batch else 1
        bias = bias_of(allowed[:, None].repeat(repeats, 1, 1, 1), q.dtype)
        if self.window is not None and not isinstance(bias, FakeTensor):
            self._biases[key] = bias
        return bias

    def split(self, x: Tensor) -> Iterator[Tensor]:
        x = self._dense(x)
        for run in self.runs:
            taken = run.queries.take(x)
            yield taken if run.filled is None else taken * run.filled

    def join(self, tiles: Sequence[Tensor], fill: float = 0.0) -> Tensor:
        heads, d = tiles[0].shape[1], tiles[0].shape[3]
        batch = len(tiles[0]) // self.runs[0].queries.count
        flat = [tile.transpose(1, 2).reshape(batch, -1, heads, d) for tile in tiles]
        if self.place is not None:
            filled = torch.cat([*flat, flat[0].new_full((batch, 1, heads, d), fill)], dim=1)
            return select(filled, self.place).transpose(1, 2)
        return self._back((flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)).transpose(1, 2))

    def key_gradients(self, k: Tensor, v: Tensor, grads: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        n = -(-self.n // self.dilation)
        room, batch = max(n, *(run.keys.end for run in self.runs)), k.shape[0] * self.dilation
        total_k, total_v = (
            x.new_zeros(batch, room, x.shape[1], x.shape[3], dtype=torch.promote_types(x.dtype, torch.float32))
            for x in (k, v)
        )
        for run, (grad_k, grad_v) in zip(self.runs, grads, strict=True):
            run.keys.add(total_k, grad_k)
            run.keys.add(total_v, grad_v)
        grad_k, grad_v = (self._back(total[:, :n].transpose(1, 2)) for total in (total_k, total_v))
        return grad_k.to(k.dtype), grad_v.to(v.dtype)

    def _dense(self, x: Tensor) -> Tensor:
        """The sequences of equal remainders: [batch, heads, n, d] -> [batch dilation, heads, n / dilation, d]."""
        if self.dilation == 1:
            return x
        return rearrange(F.pad(x, (0, 0, 0, -self.n % self.dilation)), "b h (n r) d -> (b r) h n d", r=self.dilation)

    def _back(self, x: Tensor) -> Tensor:
        """The inverse of `_dense`."""
        return x if self.dilation == 1 else rearrange(x, "(b r) h n d -> b h (n r) d", r=self.dilation)[:, :, : self.n]


@dataclass(frozen=True, eq=False)
class ByHead(DisjointTiling):
    """Heads that see different keys: the tiles of one group of heads after those of another."""

    groups: Sequence[tuple[list[int], Tiles]]

    def has_no_bias(self, inputs: Sequence[Tensor | None]) -> bool:
        return all(tiles.has_no_bias(inputs) for _, tiles in self.groups)

    def one_pass(self) -> list[tuple[list[int], OnePass | Hashed]]:
        kernels = [(heads, kernel) for heads, tiles in self.groups for _, kernel in tiles.one_pass()]
        return kernels if len(kernels) == len(self.groups) else []

    def tiles(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor | None]) -> Iterator[Tile]:
        for heads, tiles in self.groups:
            yield from tiles.tiles(chosen(q, heads, 1), chosen(k, heads, 1), chosen(v, heads, 1), inputs)

    def split(self, x: Tensor) -> Iterator[Tensor]:
        for heads, tiles in self.groups:
            yield from tiles.split(chosen(x, heads, 1))

    def join(self, tiles: Sequence[Tensor], fill: float = 0.0) -> Tensor:
        rest = iter(tiles)
        return self._join_heads([group.join([next(rest) for _ in group.runs], fill) for _, group in self.groups])

    def key_gradients(self, k: Tensor, v: Tensor, grads: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        by_group = [
            tiles.key_gradients(chosen(k, heads, 1), chosen(v, heads, 1), itertools.islice(grads, len(tiles.runs)))
            for heads, tiles in self.groups
        ]
        grads_k, grads_v = zip(*by_group, strict=True)
        return self._join_heads(grads_k), self._join_heads(grads_v)

    def _join_heads(self, tensors: Sequence[Tensor]) -> Tensor:
        return join_heads([heads for heads, _ in self.groups], tensors)


@dataclass(frozen=True, eq=False)
class Scored(DisjointTiling):
    """The tiles of another tiling with what is added to the scores by distance. Inputs of the part: which keys are seen
    at all, and what is added at the distance j - i of a key j from a query i, [heads, 2 n - 1] at j - i + n - 1."""

    tiling: Tiles | ByHead

    def groups(self, heads: int) -> Sequence[tuple[list[int], Tiles]]:
        return self.tiling.groups if isinstance(self.tiling, ByHead) else [(list(range(heads)), self.tiling)]

    def tiles(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor | None]) -> Iterator[Tile]:
        key_mask, scores = inputs
        assert scores is not None
        plain = self.tiling.tiles(q, k, v, [key_mask])
        for heads, tiles in self.groups(q.shape[1]):
            of_heads = chosen(scores, heads, 0)
            for run, tile in zip(tiles.runs, plain, strict=False):
                added = run.added(of_heads, tiles, len(tile.q))
                bias = added if tile.bias is None else added + tile.bias
                if tile.causal:
                    later = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).triu(1)
                    bias = bias.masked_fill(later, -math.inf)
                yield Tile(tile.q, tile.k, tile.v, bias, False)

    def split(self, x: Tensor) -> Iterable[Tensor]:
        return self.tiling.split(x)

    def join(self, tiles: Sequence[Tensor], fill: float = 0.0) -> Tensor:
        return self.tiling.join(tiles, fill)

    def key_gradients(self, k: Tensor, v: Tensor, grads: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return self.tiling.key_gradients(k, v, grads)


def by_head(groups: Sequence[tuple[list[int], Tiles | None]], n: int, causal: bool) -> Tiles | ByHead | None:
    """One tiling of all groups of heads; None: every key (before the query, when causal)."""
    if len(groups) == 1:
        return groups[0][1]
    whole = TilePositions(1, n, n)
    every = Tiles(n, (TileRun(whole, whole, causal=causal),), causal=causal)
    return ByHead([(heads, tiles or every) for heads, tiles in groups])


def laid_out(n: int, runs: Sequence[TileRun]) -> Tiles:
    """The runs as tiles of n queries."""
    if not runs:  # no query sees a key
        none = TilePositions(1, 1, 1)
        runs = [TileRun(none, none, torch.zeros(1, 1, 1, dtype=torch.bool, device="cpu"))]
    order = torch.cat([run.queries.flatten() for run in runs])
    if torch.equal(order, torch.arange(n, device="cpu")):
        return Tiles(n, tuple(runs))
    place = torch.full((n,), len(order), dtype=torch.int64, device="cpu")
    place[order] = torch.arange(len(order), device="cpu")
    return Tiles(n, tuple(runs), place)


def select(x: Tensor, index: Tensor) -> Tensor:
    """x [batch, n, heads, d] at positions [m] or [batch, m]."""
    if index.ndim == 1:
        return x.index_select(1, index)
    return x.reshape(-1, *x.shape[2:]).index_select(0, _flat(index, x.shape[1])).view(len(index), -1, *x.shape[2:])


def _flat(index: Tensor, n: int) -> Tensor:
    """Positions [batch, m] in sequences of n -> in all sequences one after the other."""
    return (index + n * torch.arange(len(index), device=index.device)[:, None]).flatten()
