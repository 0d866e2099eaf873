"""A part of the one softmax: some keys for some queries, how they lie in tiles, and what computes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from effzoo.attention.band import Band
from effzoo.errors import InputError


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Part:
    """Some keys for some queries.

    q [g, h, m, d], k [g, h, s, d], v [g, h, s, e]; bias is additive, broadcastable to [g, h, m, s], -inf where a query may not
    attend, without gradient. scale multiplies q k^T, 1 / sqrt(d) when None. All parts of one softmax have the same e.
    A core may fold the sequence into the group axis g; `fold` takes a tensor from [batch, heads, n, x] to the layout of
    q and `unfold` takes it back, so that parts with different layouts can be merged.
    band: q, k and v [batch, heads, n, x] are not folded yet, and `bias` is what the band gave: it cuts tiles, and nothing of them is kept.
    rounds: nor are they here; keys are chosen several times over, and `bias` holds what the choice was made from.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | Sequence[Tensor | None] | None = None
    causal: bool = False
    scale: float | None = None
    fold: Callable[[Tensor], Tensor] = _same
    unfold: Callable[[Tensor], Tensor] = _same
    band: Band | None = None
    rounds: Rounds | None = None

    @property
    def given(self) -> list[Tensor | None]:
        """The bias, or what stands in its place."""
        return list(self.bias) if self.bias is not None and not isinstance(self.bias, Tensor) else [self.bias]

    @property
    def layout(self) -> Layout:
        return _Folded(self.fold, self.unfold) if self.band is None else self.band

    def operator(self, tile: Tile) -> Operator:
        return Tiled(self.layout, tile) if self.rounds is None else self.rounds.operator(tile)


class Operator(Protocol):
    """Attention of one part, [batch, heads, n, x], forward and backward. given: biases, or what else the part brings."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp [batch, heads, n, 1], with the part's own softmax; -inf for a row without keys."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *given: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, given that of the output, and the output and log-sum-exp of all parts together."""


class Tile(Protocol):
    """Attention of one tile, [g, heads, rows, keys]; the log-sum-exp is [g, heads, rows]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """As an operator's."""

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """As an operator's."""

    def of_tile(self, index: int) -> Tile:
        """What computes the tile with this number."""


class Rounds(Protocol):
    """Keys that are chosen several times over, each time in tiles of another order (hashing)."""

    def operator(self, tile: Tile) -> Operator:
        """All rounds of a few heads at a time."""

    def parts(self, part: Part) -> list[Part]:
        """The plain twin: a part for every round."""


class Layout(Protocol):
    """How the rows and keys of a part lie in tiles, each of which is one attention [g, heads, rows, keys]."""

    def tiles(self, q: Tensor, k: Tensor, v: Tensor, given: Sequence[Tensor | None]) -> Iterable[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """Queries, keys, values and bias of every tile; given: what the part has in place of a bias."""

    def rows(self, x: Tensor) -> list[Tensor]:
        """What belongs to the queries, [batch, heads, n, x], by tile."""

    def join(self, tiles: Sequence[Tensor]) -> Tensor:
        """The way back."""

    def of_queries(self, tiles: Sequence[Tensor]) -> Tensor:
        """Gradients of the queries of every tile -> that of the part's q."""

    def of_keys(self, tiles: Sequence[Tensor]) -> Tensor:
        """Gradients of the keys of every tile -> that of the part's k."""


@dataclass(frozen=True)
class _Folded:
    """One tile, folded by its core."""

    fold: Callable[[Tensor], Tensor]
    unfold: Callable[[Tensor], Tensor]

    def tiles(self, q: Tensor, k: Tensor, v: Tensor, given: Sequence[Tensor | None]) -> Iterable[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        return [(q, k, v, given[0])]

    def rows(self, x: Tensor) -> list[Tensor]:
        return [self.fold(x)]

    def join(self, tiles: Sequence[Tensor]) -> Tensor:
        return self.unfold(tiles[0])

    def of_queries(self, tiles: Sequence[Tensor]) -> Tensor:
        return tiles[0]

    of_keys = of_queries


@dataclass(frozen=True)
class Tiled:
    """One tile after the other."""

    layout: Layout
    tile: Tile

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        found = [self.tile.of_tile(index).forward(*tensors) for index, tensors in enumerate(self.layout.tiles(q, k, v, given))]
        return self.layout.join([out for out, _ in found]), self.layout.join([lse.unsqueeze(-1) for _, lse in found])

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *given: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = zip(self.layout.rows(grad), self.layout.rows(out), self.layout.rows(lse), self.layout.tiles(q, k, v, given), strict=True)
        found = [
            self.tile.of_tile(index).backward(of_rows, *tensors[:3], out_rows, lse_rows.squeeze(-1), tensors[3])
            for index, (of_rows, out_rows, lse_rows, tensors) in enumerate(rows)
        ]
        of_q, of_k, of_v = zip(*found, strict=True)
        return self.layout.of_queries(of_q), self.layout.of_keys(of_k), self.layout.of_keys(of_v)


def bias_of(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True = may attend) as an additive bias: 0 where allowed, -inf elsewhere."""
    if allowed.dtype != torch.bool:
        raise InputError(f"what is allowed is a boolean tensor (True = may attend), got {allowed.dtype}")
    yes, no = (torch.full((), value, dtype=dtype, device=allowed.device) for value in (0.0, -math.inf))
    return torch.where(allowed, yes, no)
