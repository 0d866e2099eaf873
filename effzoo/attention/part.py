"""A part of the one softmax: some keys for some queries, and how they lie in tiles that a kernel computes."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from effzoo.devices import chosen
from effzoo.errors import InputError

if TYPE_CHECKING:
    from effzoo.attention.triton_launch import Hashed, OnePass


class Tile(NamedTuple):
    """One attention [g, heads, rows, keys]: queries, keys, values, an additive bias, and whether the causal triangle
    cuts it."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    causal: bool


class Kernel(Protocol):
    """What computes one tile. The log-sum-exp is [g, heads, rows], and -inf for a row without keys."""

    def forward(self, tile: Tile, index: int) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp, with the tile's own softmax; index: the number of the tile, from which dropout
        draws."""

    def backward(self, tile: Tile, index: int, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, given that of the output, and the output and log-sum-exp of all parts together."""


class Layout(abc.ABC):
    """How the queries and keys of a part lie in tiles. `given` are the tensors that the part brings beside q, k and
    v."""

    @abc.abstractmethod
    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp [batch, heads, n, 1], with the part's own softmax; -inf for a query without keys."""

    @abc.abstractmethod
    def backward(
        self,
        kernel: Kernel,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *given: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, given that of the output, and the output and log-sum-exp of all parts together."""

    def bare(self, given: Sequence[Tensor | None]) -> bool:
        """Whether no tile has a bias, as far as is known before they are cut."""
        return False

    def one_pass(self) -> list[tuple[list[int], OnePass | Hashed]]:
        """Heads, and what computes them in one pass of our Triton kernels; none where these cannot."""
        return []

    def plain(self, part: Part) -> list[Part]:
        """The part as parts that are `Cut`, which autograd can follow by itself."""
        return [part]


class Cut(Layout):
    """Tiles that hold every query at most once, one after the other: what is gathered for one is gone before the
    next."""

    first: int = 0  # the number of the first

    @abc.abstractmethod
    def tiles(self, q: Tensor, k: Tensor, v: Tensor, given: Sequence[Tensor | None]) -> Iterable[Tile]:
        """The tiles; the keys of different ones may be the same."""

    @abc.abstractmethod
    def rows(self, x: Tensor) -> Iterable[Tensor]:
        """What belongs to the queries, [batch, heads, n, x], by tile."""

    @abc.abstractmethod
    def join(self, tiles: Sequence[Tensor], fill: float = 0.0) -> Tensor:
        """The way back; `fill` where no tile has the query."""

    def keys_back(self, k: Tensor, v: Tensor, grads: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The gradients of the part's k and v, given those of the tiles' keys and values one after the other."""
        return next(grads)

    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        found = [kernel.forward(tile, index) for index, tile in enumerate(self.tiles(q, k, v, given), self.first)]
        return self.join([out for out, _ in found]), self.join([lse.unsqueeze(-1) for _, lse in found], -math.inf)

    def backward(
        self,
        kernel: Kernel,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *given: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_q: list[Tensor] = []

        def of_tiles() -> Iterator[tuple[Tensor, Tensor]]:
            rows = zip(self.rows(grad), self.rows(out), self.rows(lse), self.tiles(q, k, v, given), strict=True)
            for index, (of_grad, of_out, of_lse, tile) in enumerate(rows, self.first):
                one_q, one_k, one_v = kernel.backward(tile, index, of_grad, of_out, of_lse.squeeze(-1))
                of_q.append(one_q)
                yield one_k, one_v

        of_k, of_v = self.keys_back(k, v, of_tiles())
        return self.join(of_q), of_k, of_v


@dataclass(frozen=True)
class Uncut(Cut):
    """One tile, which holds the part as it is; the part is given its bias."""

    causal: bool = False

    def bare(self, given: Sequence[Tensor | None]) -> bool:
        return given[0] is None

    def tiles(self, q: Tensor, k: Tensor, v: Tensor, given: Sequence[Tensor | None]) -> list[Tile]:
        return [Tile(q, k, v, given[0], self.causal)]

    def rows(self, x: Tensor) -> list[Tensor]:
        return [x]

    def join(self, tiles: Sequence[Tensor], fill: float = 0.0) -> Tensor:
        return tiles[0]


@dataclass(frozen=True)
class Part:
    """Some keys for some queries.

    q [g, h, m, d], k [g, h, s, d], v [g, h, s, e]; bias is additive, broadcastable to [g, h, m, s], -inf where a query
    may not attend, without gradient. scale multiplies q k^T, 1 / sqrt(d) when None. All parts of one softmax have the
    same e.
    layout: how they lie in tiles; None for one tile, cut by the causal triangle if `causal`.
    given: what the layout needs beside them.
    where: int[g, s], where these keys stand among those of the part in front, for what reads them there; its number
        of keys where there is none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    layout: Layout | None = None
    given: Sequence[Tensor | None] = field(default=())
    where: Tensor | None = None

    @property
    def way(self) -> Layout:
        """The layout, that of one tile if none is given."""
        return Uncut(self.causal) if self.layout is None else self.layout

    @property
    def brought(self) -> list[Tensor | None]:
        """The tensors of the part beside q, k and v."""
        return list(self.given) or [self.bias]


def together(groups: Sequence[list[int]], found: Sequence[Tensor]) -> Tensor:
    """Tensors [batch, heads of a group, n, x] as one of all heads in their order."""
    if len(found) == 1:
        return found[0]
    order = [head for heads in groups for head in heads]
    return chosen(torch.cat(list(found), dim=1), sorted(range(len(order)), key=order.__getitem__), 1)


def factor(scale: float | None, q: Tensor) -> float:
    """What multiplies q k^T: 1 / sqrt(d) if no scale is given."""
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


def lse_of(tile: Tile, lse: Tensor) -> Tensor:
    """The log-sum-exp of a tile, given that of an operator of torch, which reports 0 for a row without keys."""
    if tile.bias is None:
        return lse
    # a key bias [g, 1, 1, s] under the causal triangle: nothing allowed at or before the row
    most = tile.bias.cummax(dim=-1).values.squeeze(-2) if tile.causal else tile.bias.amax(dim=-1)
    return lse.masked_fill(most == -math.inf, -math.inf)


def bias_of(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True = may attend) as an additive bias: 0 where allowed, -inf elsewhere."""
    if allowed.dtype != torch.bool:
        raise InputError(f"what is allowed is a boolean tensor (True = may attend), got {allowed.dtype}")
    yes, no = (torch.full((), value, dtype=dtype, device=allowed.device) for value in (0.0, -math.inf))
    return torch.where(allowed, yes, no)
