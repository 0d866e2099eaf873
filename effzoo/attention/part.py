"""A part of the one softmax: some keys for some queries, and the tiles in which a kernel computes it."""

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

Gradients = tuple[Tensor, Tensor, Tensor]  # of q, k and v


class Tile(NamedTuple):
    """One attention of q [g, heads, m, d] to k [g, heads, s, d] and v; an additive bias broadcastable to [g, heads, m,
    s]; causal: query i sees keys j <= i."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    causal: bool


class Kernel(Protocol):
    """Computes one tile. The log-sum-exp is [g, heads, m], -inf for a query without keys."""

    def forward(self, tile: Tile, index: int) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of the softmax over the tile's keys; index: number of the tile, the seed of
        dropout."""

    def backward(self, tile: Tile, index: int, grad: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """Gradients of q, k and v. grad: of the output; out, lse: of all parts merged."""


class Tiling(abc.ABC):
    """How a part is cut into tiles. inputs: the tensors of the part besides q, k and v."""

    @abc.abstractmethod
    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp [batch, heads, n, 1] of the softmax over the part's keys; -inf for a query without
        keys."""

    @abc.abstractmethod
    def backward(
        self, kernel: Kernel, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        *inputs: Tensor | None,
    ) -> Gradients:  # fmt: skip
        """Gradients of q, k and v. grad: of the output; out, lse: of all parts merged."""

    def has_no_bias(self, inputs: Sequence[Tensor | None]) -> bool:
        """Whether it is known, before the tiles are cut, that none has a bias."""
        return False

    def one_pass(self) -> list[tuple[list[int], OnePass | Hashed]]:
        """Groups of heads, each with the Triton kernel that computes it in one pass; [] where none can."""
        return []

    def disjoint(self, part: Part) -> list[Part]:
        """The part as parts with a `DisjointTiling`, which autograd differentiates by itself."""
        return [part]


class DisjointTiling(Tiling):
    """Tiles that hold every query at most once. They are gathered and computed one after the other."""

    first: int = 0  # number of the first tile

    @abc.abstractmethod
    def tiles(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor | None]) -> Iterable[Tile]:
        """The tiles; several may hold the same key."""

    @abc.abstractmethod
    def split(self, x: Tensor) -> Iterable[Tensor]:
        """A tensor [batch, heads, n, x] with a value for each query, tile by tile."""

    @abc.abstractmethod
    def join(self, tiles: Sequence[Tensor], fill: float = 0.0) -> Tensor:
        """The inverse of `split`; fill: for queries that no tile holds."""

    def key_gradients(self, k: Tensor, v: Tensor, grads: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The gradients of k and v, summed over the tiles' gradients."""
        return next(grads)

    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        results = [kernel.forward(tile, index) for index, tile in enumerate(self.tiles(q, k, v, inputs), self.first)]
        return self.join([out for out, _ in results]), self.join([lse.unsqueeze(-1) for _, lse in results], -math.inf)

    def backward(
        self, kernel: Kernel, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        *inputs: Tensor | None,
    ) -> Gradients:  # fmt: skip
        grads_q: list[Tensor] = []

        def key_grads() -> Iterator[tuple[Tensor, Tensor]]:
            tiles = zip(self.tiles(q, k, v, inputs), self.split(grad), self.split(out), self.split(lse), strict=True)
            for index, (tile, tile_grad, tile_out, tile_lse) in enumerate(tiles, self.first):
                grad_q, grad_k, grad_v = kernel.backward(tile, index, tile_grad, tile_out, tile_lse.squeeze(-1))
                grads_q.append(grad_q)
                yield grad_k, grad_v

        grad_k, grad_v = self.key_gradients(k, v, key_grads())
        return self.join(grads_q), grad_k, grad_v


@dataclass(frozen=True)
class OneTile(DisjointTiling):
    """The whole part as one tile; inputs: its bias."""

    causal: bool = False

    def has_no_bias(self, inputs: Sequence[Tensor | None]) -> bool:
        return inputs[0] is None

    def tiles(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor | None]) -> list[Tile]:
        return [Tile(q, k, v, inputs[0], self.causal)]

    def split(self, x: Tensor) -> list[Tensor]:
        return [x]

    def join(self, tiles: Sequence[Tensor], fill: float = 0.0) -> Tensor:
        return tiles[0]


@dataclass(frozen=True)
class Part:
    """Some keys for some queries: softmax(scale q k^T + bias) v, or softmax(cap tanh(scale q k^T / cap) + bias) v.

    q [g, heads, m, d], k [g, heads, s, d], v [g, heads, s, e]: e is the same in all parts of one softmax.
    bias: additive, broadcastable to [g, heads, m, s], -inf where a query does not see a key; no gradient.
    causal: query i sees keys j <= i.
    scale: 1 / sqrt(d) when None.
    cap: the bound of the scores (Gemma 2: Gemma Team 2024, arXiv:2408.00118, section 2); 0: none.
    tiling: how the part is cut into tiles; None: one tile.
    inputs: the tensors that the tiling takes besides q, k and v.
    positions int[g, s]: where these keys stand among those of the part before, for a kernel that reads them there; the
        number of keys for a slot without a key.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    cap: float = 0.0
    tiling: Tiling | None = None
    inputs: Sequence[Tensor | None] = field(default=())
    positions: Tensor | None = None

    @property
    def tiling_or_one(self) -> Tiling:
        """The tiling; one tile where none is given."""
        return OneTile(self.causal) if self.tiling is None else self.tiling

    @property
    def tiling_inputs(self) -> list[Tensor | None]:
        """The tensors besides q, k and v: those of the tiling, or the bias."""
        return list(self.inputs) or [self.bias]


def join_heads(groups: Sequence[list[int]], tensors: Sequence[Tensor]) -> Tensor:
    """One tensor [batch, heads, n, x] of a tensor for each group of heads, with the heads in their order."""
    if len(tensors) == 1:
        return tensors[0]
    order = [head for heads in groups for head in heads]
    return chosen(torch.cat(list(tensors), dim=1), sorted(range(len(order)), key=order.__getitem__), 1)


def factor(scale: float | None, q: Tensor) -> float:
    """The factor on q k^T: 1 / sqrt(d) where no scale is given."""
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


def capped(scores: Tensor, cap: float) -> Tensor:
    """cap tanh(scores / cap); the scores themselves where cap is 0."""
    return cap * (scores / cap).tanh() if cap else scores


def lse_of(tile: Tile, lse: Tensor) -> Tensor:
    """The log-sum-exp of a tile, -inf for a query without keys, for which operators of torch report 0."""
    if tile.bias is None:
        return lse
    # under the causal triangle the bias is [g, 1, 1, s]: the largest up to each query
    largest = tile.bias.cummax(dim=-1).values.squeeze(-2) if tile.causal else tile.bias.amax(dim=-1)
    return lse.masked_fill(largest == -math.inf, -math.inf)


def both(seen: Tensor, allowed: Tensor) -> Tensor:
    """What is seen, or how often, where it is allowed."""
    return seen & allowed if seen.dtype == torch.bool else seen * allowed


def bias_of(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True = may attend) as an additive bias: 0 where allowed, -inf elsewhere; of whole numbers, how
    often a key counts, the logarithm."""
    if allowed.dtype.is_floating_point or allowed.dtype.is_complex:
        raise InputError(
            f"what is allowed is a boolean tensor (True = may attend) or whole numbers, got {allowed.dtype}"
        )
    if allowed.dtype != torch.bool:
        return allowed.to(torch.promote_types(dtype, torch.float32)).log().to(dtype)
    yes, no = (torch.full((), value, dtype=dtype, device=allowed.device) for value in (0.0, -math.inf))
    return torch.where(allowed, yes, no)
