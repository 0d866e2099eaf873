"""Tiles of a sequence with itself: which queries and which keys each takes, as views where they stand in order, else
gathered."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from effzoo.attention.part import Cut, Tile, bias_of, together
from effzoo.attention.triton_launch import Hashed, OnePass
from effzoo.devices import chosen, sent

if TYPE_CHECKING:
    from effzoo.attention.band import Window


@dataclass(frozen=True, eq=False)
class Slots:
    """Positions by tile: `count` times `length` of them, each first one `step` after the one before; or those in
    `where`, int[count, length], or [batch, count, length] where the rows of a batch differ."""

    count: int
    length: int
    step: int = 0
    first: int = 0
    where: Tensor | None = None

    @classmethod
    def of(cls, where: Tensor) -> Slots:
        """Positions [count, length]."""
        count, length = where.shape[-2:]
        first = int(where.flatten()[0])
        ordered = torch.equal(where.flatten(), torch.arange(first, first + where.numel(), device="cpu"))
        return cls(count, length, length, first) if ordered else cls(count, length, where=where)

    @property
    def positions(self) -> Tensor:
        """All of them, one tile after the other, where no two tiles have the same."""
        return (
            torch.arange(self.first, self.first + self.count * self.length, device="cpu")
            if self.where is None
            else self.where.flatten()
        )

    @property
    def reach(self) -> int:
        """The place behind the last, in whole steps."""
        return self.first + (self.count + -(-self.length // self.step) - 1) * self.step if self.where is None else 0

    def to(self, device: torch.device) -> Slots:
        return self if self.where is None else replace(self, where=sent(self.where, device))

    def take(self, x: Tensor) -> Tensor:
        """[batch, heads, n, d] -> [batch count, heads, length, d], without a copy where the batch allows it."""
        batch, heads, _, d = x.shape
        if self.where is not None:
            rows = select(x.transpose(1, 2), self.where.flatten(-2))
            return rows.reshape(batch * self.count, self.length, heads, d).transpose(1, 2)
        until = self.first + (self.count - 1) * self.step + self.length
        windows = x[:, :, self.first : until].unfold(2, self.length, self.step)
        return windows.permute(0, 2, 1, 4, 3).reshape(batch * self.count, heads, self.length, d)

    def add(self, total: Tensor, grad: Tensor) -> None:
        """The gradient of what `take` gave, added to that of the sequence, total [batch, n and room for a step, heads,
        d]."""
        batch, n, heads, d = total.shape
        rows = grad.transpose(1, 2).reshape(batch, self.count, self.length, heads, d)
        if self.where is None:
            # slices as long as the step from tile to tile do not overlap
            for start in range(0, self.length, self.step):
                width, first = min(self.step, self.length - start), self.first + start
                steps = total[:, first : first + self.count * self.step].view(batch, self.count, self.step, heads, d)
                steps[:, :, :width] += rows[:, :, start : start + width]
        elif self.where.ndim == 2:
            total.index_add_(1, self.where.flatten(), rows.flatten(1, 2).to(total.dtype))
        else:
            total.view(-1, heads, d).index_add_(0, _flat(self.where.flatten(1), n), rows.flatten(0, 2).to(total.dtype))


@dataclass(frozen=True, eq=False)
class Run:
    """Tiles that are computed as one batch: queries with keys.

    allowed: bool[tiles or 1, queries or 1, keys], None where all pairs are seen; causal: a triangle says it.
    held: bool[batch tiles, 1, queries, 1], which slots hold a query, where the rows of a batch differ.
    """

    queries: Slots
    keys: Slots
    allowed: Tensor | None = None
    causal: bool = False
    held: Tensor | None = None

    def to(self, device: torch.device) -> Run:
        allowed, held = (None if x is None else sent(x, device) for x in (self.allowed, self.held))
        return Run(self.queries.to(device), self.keys.to(device), allowed, self.causal, held)


@dataclass(frozen=True, eq=False)
class Tiles(Cut):
    """n positions in runs of tiles; the part is given which keys are held, bool[batch, n], such as tokens, or None for
    all.

    place [n] or [batch, n]: where each query stands when the queries of all tiles follow each other; one behind the
    last for a query without keys;
    None: in order, as they are. dilation: positions with the same remainder by it form sequences of their own, in which
        the runs count.
    sight, causal: what the runs were cut from, where that says all.
    """

    n: int
    runs: tuple[Run, ...]
    place: Tensor | None = None
    dilation: int = 1
    sight: Window | None = None
    causal: bool = False
    _biases: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    def to(self, device: torch.device) -> Tiles:
        if device.type == "cpu":
            return self
        place = None if self.place is None else sent(self.place, device)
        return replace(self, runs=tuple(run.to(device) for run in self.runs), place=place, _biases={})

    @property
    def window(self) -> tuple[int, int] | None:
        """How many keys before a query it sees, and how many after it, where that says it all."""
        if self.sight is None or not self.sight.plain:
            return None
        left, right = (self.n if most is None else most for most in (self.sight.left, self.sight.right))
        return left, 0 if self.causal else right

    def one_pass(self) -> list[tuple[list[int], OnePass | Hashed]]:
        return [] if self.sight is None else [([], OnePass(self.causal, self.sight))]

    def bare(self, given: Sequence[Tensor | None]) -> bool:
        seen = self.window is not None or (
            self.n % self.dilation == 0 and all(run.allowed is None for run in self.runs)
        )
        return given[0] is None and seen

    def tiles(self, q: Tensor, k: Tensor, v: Tensor, given: Sequence[Tensor | None]) -> Iterator[Tile]:
        (held,) = given
        if held is None and self.n % self.dilation:  # what fills up the sequences is not
            held = torch.ones(q.shape[0], self.n, dtype=torch.bool, device=q.device)
        q, k, v = self._dense(q), self._dense(k), self._dense(v)
        of_keys = None if held is None else self._dense(held[:, None, :, None])
        for run in self.runs:
            bias = self._bias(run, q)
            if of_keys is not None:
                seen = run.keys.take(of_keys).mT
                bias = bias_of(seen, q.dtype) if bias is None else bias.masked_fill(~seen, -math.inf)
            yield Tile(run.queries.take(q), run.keys.take(k), run.keys.take(v), bias, run.causal)

    def _bias(self, run: Run, q: Tensor) -> Tensor | None:
        """[batch tiles or 1, 1, queries or 1, keys]; those of a declared sight are few, and made once."""
        allowed, key = run.allowed, (id(run.allowed), q.dtype)
        if allowed is None or key in self._biases:
            return self._biases.get(key)
        # else of those of each row
        of_tiles = len(allowed) > 1 and (run.queries.where is None or run.queries.where.ndim == 2)
        bias = bias_of(allowed[:, None].repeat(len(q) if of_tiles else 1, 1, 1, 1), q.dtype)
        if self.sight is not None and not isinstance(bias, FakeTensor):
            self._biases[key] = bias
        return bias

    def rows(self, x: Tensor) -> Iterator[Tensor]:
        x = self._dense(x)
        taken = ((run.queries.take(x), run.held) for run in self.runs)
        return (rows if held is None else rows * held for rows, held in taken)

    def join(self, tiles: Sequence[Tensor], fill: float = 0.0) -> Tensor:
        heads, d = tiles[0].shape[1], tiles[0].shape[3]
        batch = len(tiles[0]) // self.runs[0].queries.count
        flat = [tile.transpose(1, 2).reshape(batch, -1, heads, d) for tile in tiles]
        if self.place is not None:
            return select(
                torch.cat([*flat, flat[0].new_full((batch, 1, heads, d), fill)], dim=1), self.place
            ).transpose(1, 2)
        return self._back((flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)).transpose(1, 2))

    def keys_back(self, k: Tensor, v: Tensor, grads: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        n = -(-self.n // self.dilation)
        room, batch = max(n, *(run.keys.reach for run in self.runs)), k.shape[0] * self.dilation
        of_k, of_v = (
            x.new_zeros(batch, room, x.shape[1], x.shape[3], dtype=torch.promote_types(x.dtype, torch.float32))
            for x in (k, v)
        )
        for run, (one_k, one_v) in zip(self.runs, grads, strict=True):
            run.keys.add(of_k, one_k)
            run.keys.add(of_v, one_v)
        return self._back(of_k[:, :n].transpose(1, 2)).to(k.dtype), self._back(of_v[:, :n].transpose(1, 2)).to(v.dtype)

    def _dense(self, x: Tensor) -> Tensor:
        """[batch, heads, n, d] -> [batch dilation, heads, n / dilation, d]."""
        if self.dilation == 1:
            return x
        return rearrange(F.pad(x, (0, 0, 0, -self.n % self.dilation)), "b h (n r) d -> (b r) h n d", r=self.dilation)

    def _back(self, x: Tensor) -> Tensor:
        return x if self.dilation == 1 else rearrange(x, "(b r) h n d -> b h (n r) d", r=self.dilation)[:, :, : self.n]


@dataclass(frozen=True, eq=False)
class ByHead(Cut):
    """Heads that see different keys: tiles of some heads, and then of others."""

    groups: Sequence[tuple[list[int], Tiles]]

    def bare(self, given: Sequence[Tensor | None]) -> bool:
        return all(own.bare(given) for _, own in self.groups)

    def one_pass(self) -> list[tuple[list[int], OnePass | Hashed]]:
        ones = [(heads, one) for heads, own in self.groups for _, one in own.one_pass()]
        return ones if len(ones) == len(self.groups) else []

    def tiles(self, q: Tensor, k: Tensor, v: Tensor, given: Sequence[Tensor | None]) -> Iterator[Tile]:
        for heads, own in self.groups:
            yield from own.tiles(chosen(q, heads, 1), chosen(k, heads, 1), chosen(v, heads, 1), given)

    def rows(self, x: Tensor) -> Iterator[Tensor]:
        for heads, own in self.groups:
            yield from own.rows(chosen(x, heads, 1))

    def join(self, tiles: Sequence[Tensor], fill: float = 0.0) -> Tensor:
        left = iter(tiles)
        return self._together([own.join([next(left) for _ in own.runs], fill) for _, own in self.groups])

    def keys_back(self, k: Tensor, v: Tensor, grads: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        found = [
            own.keys_back(chosen(k, heads, 1), chosen(v, heads, 1), itertools.islice(grads, len(own.runs)))
            for heads, own in self.groups
        ]
        return self._together([of_k for of_k, _ in found]), self._together([of_v for _, of_v in found])

    def _together(self, found: Sequence[Tensor]) -> Tensor:
        return together([heads for heads, _ in self.groups], found)


def by_head(groups: Sequence[tuple[list[int], Tiles | None]], n: int, causal: bool) -> Tiles | ByHead | None:
    """One layout for heads that see alike, group by group; None: every key (before the query, when causal)."""
    if len(groups) == 1:
        return groups[0][1]
    whole = Slots(1, n, n)
    every = Tiles(n, (Run(whole, whole, causal=causal),), causal=causal)
    return ByHead([(heads, own or every) for heads, own in groups])


def laid_out(n: int, runs: Sequence[Run]) -> Tiles:
    """The runs, and where each of n queries stands in them."""
    if not runs:  # nobody sees anything
        none = Slots(1, 1, 1)
        runs = [Run(none, none, torch.zeros(1, 1, 1, dtype=torch.bool, device="cpu"))]
    order = torch.cat([run.queries.positions for run in runs])
    if torch.equal(order, torch.arange(n, device="cpu")):
        return Tiles(n, tuple(runs))
    place = torch.full((n,), len(order), dtype=torch.int64, device="cpu")
    place[order] = torch.arange(len(order), device="cpu")
    return Tiles(n, tuple(runs), place)


def select(x: Tensor, where: Tensor) -> Tensor:
    """Rows `where` [m] or [batch, m] of x [batch, n, heads, d]."""
    if where.ndim == 1:
        return x.index_select(1, where)
    return x.reshape(-1, *x.shape[2:]).index_select(0, _flat(where, x.shape[1])).view(len(where), -1, *x.shape[2:])


def _flat(where: Tensor, n: int) -> Tensor:
    """Rows [batch, m] of sequences of n as rows of all sequences one after the other."""
    return (where + n * torch.arange(len(where), device=where.device)[:, None]).flatten()
