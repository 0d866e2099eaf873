"""One sequence over several ranks: each rank holds a slice of its positions, and gets from others what it needs.

Four exchanges, each with its derivative, are enough for every attention kind. With L = sum_r L_r, where
rank r computes the loss L_r of its own positions, they give the gradient of L:

    fetch      positions that other ranks hold              backward: their gradients go back, and are summed there
    gathered   rows that a route names                      backward: the same
    total      y = sum over ranks of x_r, on every rank     backward: the sum over ranks of the gradients of y
    attended   one softmax over keys on all ranks           backward: each rank's keys, with the merged output
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from effzoo.attention import kernel
from effzoo.attention.backends import choose, prepared, tiling_and_kernel
from effzoo.attention.part import Part
from effzoo.errors import IncompatibleError, InputError, UnknownNameError

Range = tuple[int, int]  # positions: the first, and the one after the last
Order = Literal["contiguous", "zigzag"]


@dataclass
class Traffic:
    """Bytes that this rank has sent to others, by the name of the exchange.

    An all-reduce counts 2 (R - 1) / R of its bytes, as a ring of R ranks sends them.
    """

    sent: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, count: float) -> None:
        self.sent[name] = self.sent.get(name, 0.0) + count

    @property
    def total(self) -> float:
        return sum(self.sent.values())


_traffic: list[Traffic] = []


@contextmanager
def counted() -> Iterator[Traffic]:
    """The bytes that this rank sends inside the `with` block."""
    traffic = Traffic()
    _traffic.append(traffic)
    try:
        yield traffic
    finally:
        _traffic.remove(traffic)


def _count(name: str, bytes_sent: float) -> None:
    for traffic in _traffic:
        traffic.add(name, bytes_sent)


@dataclass(frozen=True)
class Planned:
    """A group of which one rank alone is there, for `effzoo.plan`: what it sends is counted, what it receives is 0.

    number: of the rank.
    """

    ranks: int
    number: int

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.number


Group = dist.ProcessGroup | Planned


@dataclass(frozen=True)
class Split:
    """The positions of a sequence over the R ranks of a group.

    bounds: piece i holds the positions from bounds[i] to bounds[i + 1] - 1.
    order: which pieces a rank holds.
        contiguous: rank r holds piece r of R.
        zigzag: rank r holds the pieces r and 2 R - 1 - r of 2 R, so that under a causal triangle all compute as much.
    """

    group: Group
    bounds: tuple[int, ...]
    order: Order = "contiguous"

    @classmethod
    def of(cls, n: int, group: Group, multiple: int = 1, order: Order = "contiguous") -> Split:
        """n positions in pieces that differ by at most `multiple`, of which all but the last are multiples.

        Raises InputError where a piece would have no position, UnknownNameError for another order.
        """
        if order not in get_args(Order):
            raise UnknownNameError("order", order, get_args(Order))
        ranks, units = group.size(), -(-n // multiple)
        pieces = 2 * ranks if order == "zigzag" else ranks
        if units < pieces:
            given = (
                f"{n} positions are" if multiple == 1 else f"{n} positions are {units} chunks of {multiple} positions,"
            )
            more = "" if pieces == ranks else f", two of each of {ranks} ranks"
            what = f"{ranks} ranks" if pieces == ranks else f"{pieces} pieces"
            raise InputError(f"{given} fewer than {what}{more}; use fewer ranks")
        bounds = tuple(min(n, units * piece // pieces * multiple) for piece in range(pieces + 1))
        return cls(group, bounds, order)

    @property
    def n(self) -> int:
        """Positions of the whole sequence."""
        return self.bounds[-1]

    @property
    def ranks(self) -> int:
        pieces = len(self.bounds) - 1
        return pieces // 2 if self.order == "zigzag" else pieces

    @property
    def rank(self) -> int:
        return self.group.rank()

    def pieces(self, rank: int | None = None) -> list[Range]:
        """The positions of a rank, of this one when None, in one range or two."""
        rank = self.rank if rank is None else rank
        numbers = [rank] if self.order == "contiguous" else [rank, 2 * self.ranks - 1 - rank]
        return [(self.bounds[number], self.bounds[number + 1]) for number in numbers]

    def range(self, rank: int | None = None) -> Range:
        """The positions of a rank, of this one when None. Raises IncompatibleError where they are two ranges."""
        if self.order == "zigzag":
            raise IncompatibleError("order 'zigzag' is for full causal attention; others need order='contiguous'")
        return self.pieces(rank)[0]

    def size(self, rank: int | None = None) -> int:
        """How many positions a rank holds, this one when None."""
        return sum(end - first for first, end in self.pieces(rank))

    def positions(self, device: torch.device | None = None) -> Tensor:
        """The positions of this rank, int[m], ascending."""
        return torch.cat([torch.arange(first, end, device=device) for first, end in self.pieces()])

    def own(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's positions of a tensor with all."""
        pieces = [x.narrow(dim, first, end - first) for first, end in self.pieces()]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def overlap(a: Range, b: Range) -> Range | None:
    """The positions in both ranges; None for none."""
    first, end = max(a[0], b[0]), min(a[1], b[1])
    return (first, end) if first < end else None


def fetch(x: Tensor, split: Split, wanted: Sequence[Range], dim: int) -> Tensor:
    """The positions that this rank wants of a tensor of which each rank holds its slice along `dim`.

    wanted: for each rank the positions that it wants, within the sequence; the same on every rank.
    """
    return cast(Tensor, cast(Any, _Fetch).apply(x, split, tuple(wanted), dim % x.ndim))


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Split, wanted: tuple[Range, ...], dim: int) -> Tensor:
        ctx.split, ctx.wanted, ctx.dim = split, wanted, dim
        me, first = split.rank, split.range()[0]
        pieces, shapes = [], []
        for rank in range(split.ranks):
            given = overlap(split.range(me), wanted[rank]) or (first, first)
            pieces.append(x.narrow(dim, given[0] - first, given[1] - given[0]))
            got = overlap(split.range(rank), wanted[me]) or (0, 0)
            shapes.append((*x.shape[:dim], got[1] - got[0], *x.shape[dim + 1 :]))
        return torch.cat(exchange(pieces, shapes, split.group, "fetch"), dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        split, wanted, dim, me = ctx.split, ctx.wanted, ctx.dim, ctx.split.rank
        (first, end), start = split.range(), wanted[me][0]
        pieces, shapes, places = [], [], []
        for rank in range(split.ranks):
            got = overlap(split.range(rank), wanted[me]) or (start, start)
            pieces.append(grad.narrow(dim, got[0] - start, got[1] - got[0]))
            given = overlap(split.range(me), wanted[rank]) or (first, first)
            shapes.append((*grad.shape[:dim], given[1] - given[0], *grad.shape[dim + 1 :]))
            places.append(given)
        total = grad.new_zeros((*grad.shape[:dim], end - first, *grad.shape[dim + 1 :]))
        for (low, high), piece in zip(places, exchange(pieces, shapes, split.group, "fetch"), strict=True):
            total.narrow(dim, low - first, high - low).add_(piece)
        return total, None, None, None


@dataclass(frozen=True)
class Route:
    """Rows that travel between ranks.

    send: of each rank, the rows of this rank that it gets, int[...].
    put: of each rank, where the rows that come from it are put, int[...].
    rows: of the result, those that nobody sends are 0.
    """

    send: list[Tensor]
    put: list[Tensor]
    rows: int

    def to(self, device: torch.device) -> Route:
        return Route([x.to(device) for x in self.send], [x.to(device) for x in self.put], self.rows)


def gathered(x: Tensor, route: Route, split: Split, name: str) -> Tensor:
    """Rows [rows, d] from all ranks, of x [own rows, d]; several ranks may want the same row."""
    return cast(Tensor, cast(Any, _Gathered).apply(x, route, split, name))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, route: Route, split: Split, name: str) -> Tensor:
        ctx.route, ctx.split, ctx.name, ctx.own = route, split, name, len(x)
        pieces, shapes = [x[rows] for rows in route.send], [(len(rows), x.shape[1]) for rows in route.put]
        result = x.new_zeros(route.rows, x.shape[1])
        for rows, piece in zip(route.put, exchange(pieces, shapes, split.group, name), strict=True):
            result[rows] = piece
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        route, split = ctx.route, ctx.split
        pieces, shapes = [grad[rows] for rows in route.put], [(len(rows), grad.shape[1]) for rows in route.send]
        total = grad.new_zeros(ctx.own, grad.shape[1])
        for rows, piece in zip(route.send, exchange(pieces, shapes, split.group, ctx.name), strict=True):
            total.index_add_(0, rows, piece)
        return total, None, None, None


def exchange(pieces: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], group: Group, name: str) -> list[Tensor]:
    """Send a tensor to each rank, and receive one of the given shape from each; empty ones are not sent."""
    return started(pieces, shapes, group, name)()


def started(
    pieces: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], group: Group, name: str
) -> Callable[[], list[Tensor]]:
    """`exchange` that goes on while this rank computes; the function that is returned waits for what is received."""
    me = group.rank()
    received = [piece if rank == me else piece.new_zeros(shapes[rank]) for rank, piece in enumerate(pieces)]
    sent = [piece.contiguous() for piece in pieces]
    transfers = []
    for rank in range(group.size()):
        if rank == me:
            continue
        if sent[rank].numel():
            _count(name, sent[rank].numel() * sent[rank].element_size())
        for transfer, x in ((dist.isend, sent[rank]), (dist.irecv, received[rank])):
            if x.numel() and not isinstance(group, Planned):
                transfers.append(dist.P2POp(transfer, x, group=group, group_peer=rank))
    works = dist.batch_isend_irecv(transfers) if transfers else []

    def wait() -> list[Tensor]:
        for work in works:
            work.wait()
        sent.clear()  # which had to live until now
        return received

    return wait


def total(x: Tensor, split: Split) -> Tensor:
    """The sum of x over the ranks, on every rank."""
    return cast(Tensor, cast(Any, _Total).apply(x, split.group))


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_reduced(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_reduced(grad, ctx.group), None


def all_reduced(x: Tensor, group: Group) -> Tensor:
    """The sum of x over the ranks of a group, in a new tensor; without a derivative."""
    summed, ranks = x.contiguous().clone(), group.size()
    if not isinstance(group, Planned):
        dist.all_reduce(summed, group=group)
    _count("total", 2 * (ranks - 1) / ranks * summed.numel() * summed.element_size())
    return summed


def attended(split: Split, *parts: Part, dropout: float = 0.0, backend: str = "auto") -> Tensor:
    """softmax(scale q k^T + bias) v over the keys of the parts of all ranks together, the same on every rank.

    parts: at least one on each rank, with queries that are the same on all.
    """
    name, _ = choose(parts, dropout, backend)
    ready = prepared(parts, name)
    plans = [tiling_and_kernel(part, name, dropout) for part in ready]
    tensors = [(part.q, part.k, part.v, *part.tiling_inputs) for part in ready]
    flat = [x for args in tensors for x in args]
    return cast(Tensor, cast(Any, _Attended).apply(split, plans, [len(args) for args in tensors], *flat))


class _Attended(torch.autograd.Function):
    """Parts forward, merged over parts and ranks; parts backward with the merged output and log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, split: Split, plans: Any, counts: list[int], *tensors: Any) -> Tensor:
        by_part = zip(plans, kernel.tensors_by_part(counts, tensors), strict=True)
        out, lse = kernel.merge(*(tiling.forward(one, *args) for (tiling, one), args in by_part))
        lses = [torch.zeros_like(lse) for _ in range(split.ranks)]
        if not isinstance(split.group, Planned):
            dist.all_gather(lses, lse.contiguous(), group=split.group)
        _count("softmax", (split.ranks - 1) * lse.numel() * lse.element_size())
        merged = torch.stack(lses).logsumexp(dim=0)
        finite = merged.masked_fill(merged == -math.inf, 0.0)
        out = all_reduced(out * (lse - finite).exp().to(out.dtype), split.group)
        ctx.split, ctx.plans, ctx.counts = split, plans, counts
        ctx.save_for_backward(out, finite, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        out, lse, *tensors = ctx.saved_tensors
        grad = all_reduced(grad, ctx.split.group)
        lse = lse.to(torch.promote_types(lse.dtype, torch.float32))
        grads: list[Tensor | None] = []
        for (tiling, one), (q, k, v, *inputs) in zip(
            ctx.plans, kernel.tensors_by_part(ctx.counts, tensors), strict=True
        ):
            grads += [*tiling.backward(one, grad, q, k, v, out, lse, *inputs), *(None for _ in inputs)]
        return None, None, None, *grads
