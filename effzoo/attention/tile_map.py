"""Tiles for a predicate that declares nothing: found once for a kind, its options and a length.

Positions are put into an order in which what is seen lies together, cut into tiles, and tiles in which no query sees a key are left out. Two orders
are tried beside that of the positions, and the one with the fewest pairs is taken: by the remainder of the position, where all distances
that are seen have a common divisor (strides, dilation), and by equal rows and columns of the predicate (buckets, documents). Queries of tiles
that take the same keys become one group.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from effzoo.attention.band import Sees
from effzoo.attention.part import Layout, Tile, Tiled, bias_of
from effzoo.devices import sent

if TYPE_CHECKING:
    from effzoo.attention.predicate import PredicateAttention

TILE = 64  # positions of a tile
ROWS = 512  # rows of the predicate that are looked at together
TOGETHER = 1024  # queries of a group whose mask is written out, and of groups that are computed together
REMEMBERED = 64  # maps
_found: OrderedDict[Any, list[tuple[list[int], Groups]]] = OrderedDict()


@dataclass(frozen=True, eq=False)
class Group:
    """Queries that take the same keys, as many such groups as there are rows: queries [groups, m] and keys [groups, s], positions.

    allowed: bool[groups or 1, m, s], None where all pairs are seen. causal: a triangle says it. Where each row of a batch has groups of its own,
    there is an axis of the batch in front, and allowed is bool[batch groups, m or 1, s]. held: bool[batch groups, 1, m, 1], which slots hold a query.
    """

    queries: Tensor
    keys: Tensor
    allowed: Tensor | None
    causal: bool
    held: Tensor | None = None
    first: tuple[int | None, int | None] = (None, None)  # the first query and the first key, where they stand in order: a slice is then enough

    def to(self, device: torch.device) -> Group:
        allowed, held = (None if x is None else sent(x, device) for x in (self.allowed, self.held))
        return Group(sent(self.queries, device), sent(self.keys, device), allowed, self.causal, held, self.first)


@dataclass(frozen=True, eq=False)
class Groups(Tiled):
    """Gathered tiles: [batch, heads, n, x] -> [batch groups, heads, m or s, x] for every entry of `groups`.

    place [n] or [batch, n]: where each query stands when the queries of all tiles follow each other; one behind the last for a query without keys;
    None: in order, as they are.
    """

    n: int
    groups: tuple[Group, ...]
    place: Tensor | None

    def to(self, device: torch.device) -> Groups:
        if self.groups[0].queries.device == device:
            return self
        return Groups(self.n, tuple(group.to(device) for group in self.groups), None if self.place is None else sent(self.place, device))

    def bare(self, given: Sequence[Tensor | None]) -> bool:
        return given[0] is None and all(group.allowed is None for group in self.groups)

    def tiles(self, q: Tensor, k: Tensor, v: Tensor, given: Sequence[Tensor | None]) -> Iterator[Tile]:
        """given: which keys are held, bool[batch, n], or None for all."""
        (held,) = given
        for group in self.groups:
            seen = None if group.allowed is None else group.allowed[:, None]
            if seen is not None and len(seen) > 1 and group.queries.ndim == 2:
                seen = seen.repeat(q.shape[0], 1, 1, 1)
            if held is not None:
                of_keys = _take(held[:, None, :, None], group.keys, group.first[1]).mT
                seen = of_keys if seen is None else of_keys & seen
            of_q, of_k, of_v = _take(q, group.queries, group.first[0]), *(_take(x, group.keys, group.first[1]) for x in (k, v))
            yield Tile(of_q, of_k, of_v, None if seen is None else bias_of(seen, q.dtype), group.causal)

    def rows(self, x: Tensor) -> Iterator[Tensor]:
        taken = ((_take(x, group.queries, group.first[0]), group.held) for group in self.groups)
        return (rows if held is None else rows * held for rows, held in taken)

    def join(self, tiles: Sequence[Tensor], fill: float = 0.0) -> Tensor:
        heads, d = tiles[0].shape[1], tiles[0].shape[3]
        batch = len(tiles[0]) // self.groups[0].queries.shape[-2]
        flat = [tile.transpose(1, 2).reshape(batch, -1, heads, d) for tile in tiles]
        if self.place is None:
            return (flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)).transpose(1, 2)
        behind = flat[0].new_full((batch, 1, heads, d), fill)
        return _select(torch.cat([*flat, behind], dim=1), self.place).transpose(1, 2)

    def no_keys(self, k: Tensor) -> Tensor:
        return k.new_zeros(k.shape[0], k.shape[2], k.shape[1], k.shape[3], dtype=torch.promote_types(k.dtype, torch.float32))

    def add_keys(self, total: Tensor, index: int, grad: Tensor) -> None:
        batch, _, heads, d = total.shape
        group, of_rows = self.groups[index], grad.transpose(1, 2).reshape(batch, -1, heads, d).to(total.dtype)
        keys, first = group.keys, group.first[1]
        if first is not None:
            total[:, first : first + of_rows.shape[1]] += of_rows
        elif keys.ndim == 2:
            total.index_add_(1, keys.flatten(), of_rows)
        else:
            total.view(-1, heads, d).index_add_(0, _flat(keys.flatten(1), total.shape[1]), of_rows.flatten(0, 1))

    def of_keys(self, total: Tensor, k: Tensor) -> Tensor:
        return total.transpose(1, 2).to(k.dtype)


def _take(x: Tensor, where: Tensor, first: int | None) -> Tensor:
    """Rows `where` [groups, m] of x [batch, heads, n, d] -> [batch groups, heads, m, d]; first: the first of them if they stand in order."""
    batch, heads, _, d = x.shape
    rows = x.transpose(1, 2)
    taken = _select(rows, where.flatten(-2)) if first is None else rows[:, first : first + where.numel()]
    return taken.reshape(batch * where.shape[-2], where.shape[-1], heads, d).transpose(1, 2)


def _select(x: Tensor, where: Tensor) -> Tensor:
    """Rows `where` [m] or [batch, m] of x [batch, n, heads, d]."""
    if where.ndim == 1:
        return x.index_select(1, where)
    return x.reshape(-1, *x.shape[2:]).index_select(0, _flat(where, x.shape[1])).view(len(where), -1, *x.shape[2:])


def _flat(where: Tensor, n: int) -> Tensor:
    """Rows [batch, m] of sequences of n as rows of all sequences one after the other."""
    return (where + n * torch.arange(len(where), device=where.device)[:, None]).flatten()


def layouts(core: PredicateAttention, n: int, device: torch.device) -> list[tuple[list[int], Layout | None]]:
    """Heads that see alike, and their tiles, for n positions without padding."""
    return remembered((core.key, n), lambda: [(heads, _groups(core, heads[0], n)) for heads in _alike(core, n)], device)


@torch.inference_mode(False)  # what is remembered serves training too
def remembered(key: Any, make: Callable[[], list[tuple[list[int], Groups]]], device: torch.device) -> list[tuple[list[int], Layout | None]]:
    """Tiles, made once on the CPU, and once copied to each CUDA device."""
    if key not in _found:
        with _disable_current_modes():  # the tiles of a shape are no part of what is traced
            _found[key] = make()
    found = _found[key]
    if device.type == "cuda":
        key = (key, str(device))
        if key not in _found:
            _found[key] = [(heads, tiles.to(device)) for heads, tiles in found]
        found = _found[key]
    _found.move_to_end(key)
    while len(_found) > REMEMBERED:
        _found.popitem(last=False)
    return [(heads, tiles.to(device)) for heads, tiles in found]


def _alike(core: PredicateAttention, n: int) -> list[list[int]]:
    """Heads for which the predicate is the same."""
    heads = range(core.context.heads)
    if "head" not in core.reads:
        return [list(heads)]
    alike: dict[tuple[int, ...], list[int]] = {}
    for head in heads:
        alike.setdefault(tuple(_signatures(core.sees(head, n), n)[0].tolist()), []).append(head)
    return list(alike.values())


def _signatures(sees: Sees, n: int) -> tuple[Tensor, Tensor]:
    """A number for the row of every query and one for the column of every key: equal for equal ones (others meet with a chance of 2^-64)."""
    weights = torch.randint(-(2**62), 2**62, (n,), generator=torch.Generator("cpu").manual_seed(n), device="cpu")
    of_rows, of_columns = torch.zeros(n, dtype=torch.int64, device="cpu"), torch.zeros(n, dtype=torch.int64, device="cpu")
    for rows, seen in _chunks(sees, torch.arange(n, device="cpu"), torch.arange(n, device="cpu")):
        of_rows[rows] = (seen * weights).sum(dim=1)
        of_columns += (seen * weights[rows, None]).sum(dim=0)
    return of_rows, of_columns


def _chunks(sees: Sees, queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(queries), ROWS):
        rows = slice(start, min(len(queries), start + ROWS))
        query = queries[rows, None]
        yield rows, sees(query, keys[None]).expand(len(query), len(keys))


def _groups(core: PredicateAttention, head: int, n: int) -> Groups:
    sees = core.sees(head, n)
    return laid_out(n, min((_cut(sees, *order) for order in _orders(core, head, n)), key=_pairs))


def laid_out(n: int, groups: list[Group]) -> Groups:
    """The groups, and where each of n queries stands in them."""
    if not groups:  # nobody sees anything
        none = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
        groups = [Group(none, none, torch.zeros(1, 1, 1, dtype=torch.bool, device="cpu"), False)]
    groups = [replace(group, first=(_first(group.queries), _first(group.keys))) for group in groups]
    order = torch.cat([group.queries.flatten() for group in groups])
    if len(order) == n and _first(order) == 0:
        return Groups(n, tuple(groups), None)
    place = torch.full((n,), len(order), dtype=torch.int64, device="cpu")
    place[order] = torch.arange(len(order), device="cpu")
    return Groups(n, tuple(groups), place)


def _first(where: Tensor) -> int | None:
    """The first of some positions, if they follow each other."""
    first = int(where.flatten()[0])
    return first if torch.equal(where.flatten(), torch.arange(first, first + where.numel(), device="cpu")) else None


def _pairs(groups: list[Group]) -> int:
    """Pairs that are computed, with an allowance for small tiles."""
    return sum(len(group.queries) * max(16, group.queries.shape[1]) * max(16, group.keys.shape[1]) for group in groups)


def _orders(core: PredicateAttention, head: int, n: int) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Queries and keys in stretches that tiles do not cross: positions as they are, by their remainder, and by equal rows and columns."""
    positions = torch.arange(n, device="cpu")
    yield [positions], [positions]
    sees = core.sees(head, n, causal=False)
    sample = torch.tensor(sorted({0, n // 3, n // 2, n - 1}), device="cpu")
    gaps = (sample[:, None] - positions)[sees(sample[:, None], positions[None]).expand(len(sample), n)]
    divisor = math.gcd(*gaps.tolist())
    if 1 < divisor < n:
        yield ([positions[first::divisor] for first in range(divisor)],) * 2
    of_rows, of_columns = (_stretches(signature) for signature in _signatures(sees, n))
    if 1 < len(of_rows) <= max(2, n // 8) and len(of_columns) <= max(2, n // 8):
        yield of_rows, of_columns


def _stretches(signature: Tensor) -> list[Tensor]:
    """Positions with equal signatures."""
    _, which, counts = torch.unique(signature, return_inverse=True, return_counts=True)
    return list(torch.split(which.argsort(stable=True), counts.tolist()))


def _cut(sees: Sees, queries: list[Tensor], keys: list[Tensor]) -> list[Group]:
    """The tiles in which a query sees a key, queries with the same keys together."""
    of_queries = [tile for stretch in queries for tile in torch.split(stretch, TILE)]
    of_keys = [tile for stretch in keys for tile in torch.split(stretch, TILE)]
    row = torch.repeat_interleave(torch.arange(len(of_queries), device="cpu"), torch.tensor([len(tile) for tile in of_queries], device="cpu"))
    column = torch.repeat_interleave(torch.arange(len(of_keys), device="cpu"), torch.tensor([len(tile) for tile in of_keys], device="cpu"))
    seen = torch.zeros(len(of_queries), len(of_keys), dtype=torch.int32, device="cpu")
    in_order = torch.cat(of_keys)
    for rows, pairs in _chunks(sees, torch.cat(of_queries), in_order):
        by_column = torch.zeros(len(pairs), len(of_keys), dtype=torch.int32, device="cpu").index_add_(1, column, pairs.int())
        seen.index_add_(0, row[rows], by_column)
    together: dict[tuple[int, ...], list[Tensor]] = {}
    for tile, occupied in zip(of_queries, (seen > 0).tolist(), strict=True):
        columns = tuple(index for index, some in enumerate(occupied) if some)
        if columns:
            together.setdefault(columns, []).append(tile)
    groups: dict[tuple[int, int, bool, bool], list[Group]] = {}
    for columns, tiles in together.items():
        for group in _masked(sees, torch.cat(tiles), torch.cat([of_keys[index] for index in columns])):
            looks = (group.queries.shape[1], group.keys.shape[1], group.allowed is None, group.causal)
            groups.setdefault(looks, []).append(group)
    return [group for alike in groups.values() for group in _stacked(alike)]


def _masked(sees: Sees, queries: Tensor, keys: Tensor) -> Iterator[Group]:
    """Groups of one row; queries that do not see all of the keys are taken a few at a time, as their mask is written out."""
    queries = queries.sort().values
    keys = keys.sort().values
    every, triangle = True, torch.equal(queries, keys)
    for rows, pairs in _chunks(sees, queries, keys):
        every = every and bool(pairs.all())
        triangle = triangle and torch.equal(pairs, keys[None] <= queries[rows, None])
        if not (every or triangle):
            break
    if every or triangle:
        yield Group(queries[None], keys[None], None, not every)
        return
    for few in torch.split(queries, TOGETHER):
        yield Group(few[None], keys[None], sees(few[:, None], keys[None]).expand(len(few), len(keys))[None].clone(), False)


def _stacked(alike: list[Group]) -> Iterator[Group]:
    """Groups of one size as the rows of few groups."""
    together = max(1, TOGETHER // alike[0].queries.shape[1])
    for start in range(0, len(alike), together):
        few = alike[start : start + together]
        allowed = None
        if few[0].allowed is not None:
            masks = [group.allowed for group in few if group.allowed is not None]
            allowed = masks[0] if all(torch.equal(masks[0], one) for one in masks) else torch.cat(masks)
        yield Group(torch.cat([group.queries for group in few]), torch.cat([group.keys for group in few]), allowed, few[0].causal)
