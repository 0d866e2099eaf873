"""Tiles for a predicate that declares nothing: found once for a kind, its options and a length.

Positions are put into an order in which what is seen lies together, cut into tiles, and tiles in which no query sees a
key are left out. Two orders are tried beside that of the positions, and the one with the fewest pairs is taken: by the
remainder of the position, where all distances that are seen have a common divisor (strides, dilation), and by equal
rows and columns of the predicate (buckets, documents). Queries of tiles that take the same keys become one group.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from effzoo.attention.band import Sees
from effzoo.attention.tiles import Run, Slots, Tiles, laid_out

if TYPE_CHECKING:
    from effzoo.attention.predicate import PredicateAttention

TILE = 64  # positions of a tile
ROWS = 512  # rows of the predicate that are looked at together
TOGETHER = 1024  # queries of a group whose mask is written out, and of groups that are computed together
REMEMBERED = 64  # maps, and block masks of torch
# heads that see alike, and their tiles; None: every key (before the query, when causal)
Groups = Sequence[tuple[list[int], Tiles | None]]
_found: OrderedDict[Any, Any] = OrderedDict()


class Pairs(NamedTuple):
    """Queries [groups, m] that take keys [groups, s]. allowed: bool[groups or 1, m, s], None where all are seen;
    causal: a triangle says it."""

    queries: Tensor
    keys: Tensor
    allowed: Tensor | None
    causal: bool


def tilings(core: PredicateAttention, n: int, device: torch.device) -> Groups:
    """Heads that see alike, and their tiles, for n positions without padding."""
    return remembered((core.key, n), lambda: [(heads, _tiles(core, heads[0], n)) for heads in _alike(core, n)], device)


def kept(key: Any, make: Callable[[], Any]) -> Any:
    """`make()` at the first call with this key, then the same again, as long as it is among the latest."""
    if key not in _found:
        _found[key] = make()
    _found.move_to_end(key)
    while len(_found) > REMEMBERED:
        _found.popitem(last=False)
    return _found[key]


@torch.inference_mode(False)  # what is remembered serves training too
def remembered(key: Any, make: Callable[[], Groups], device: torch.device) -> Groups:
    """Tiles, made once on the CPU, and once copied to each other device."""
    with _disable_current_modes():  # the tiles of a shape are no part of what is traced
        found: Groups = kept(key, make)
    if device.type != "cpu":
        there: Groups = kept(
            (key, str(device)), lambda: [(heads, None if tiles is None else tiles.to(device)) for heads, tiles in found]
        )
        return there
    return found


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
    """A number for the row of every query and one for the column of every key: equal for equal ones (others meet with a
    chance of 2^-64)."""
    weights = torch.randint(-(2**62), 2**62, (n,), generator=torch.Generator("cpu").manual_seed(n), device="cpu")
    of_rows = torch.zeros(n, dtype=torch.int64, device="cpu")
    of_columns = torch.zeros(n, dtype=torch.int64, device="cpu")
    for rows, seen in _chunks(sees, torch.arange(n, device="cpu"), torch.arange(n, device="cpu")):
        of_rows[rows] = (seen * weights).sum(dim=1)
        of_columns += (seen * weights[rows, None]).sum(dim=0)
    return of_rows, of_columns


def _chunks(sees: Sees, queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(queries), ROWS):
        rows = slice(start, min(len(queries), start + ROWS))
        query = queries[rows, None]
        yield rows, sees(query, keys[None]).expand(len(query), len(keys))


def _tiles(core: PredicateAttention, head: int, n: int) -> Tiles:
    sees = core.sees(head, n)
    found = min((_cut(sees, *order) for order in _orders(core, head, n)), key=_pairs)
    return laid_out(
        n, [Run(Slots.of(pairs.queries), Slots.of(pairs.keys), pairs.allowed, pairs.causal) for pairs in found]
    )


def _pairs(groups: list[Pairs]) -> int:
    """Pairs that are computed, with an allowance for small tiles."""
    return sum(len(group.queries) * max(16, group.queries.shape[1]) * max(16, group.keys.shape[1]) for group in groups)


def _orders(core: PredicateAttention, head: int, n: int) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Queries and keys in stretches that tiles do not cross: positions as they are, by their remainder, and by equal
    rows and columns."""
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


def _cut(sees: Sees, queries: list[Tensor], keys: list[Tensor]) -> list[Pairs]:
    """The tiles in which a query sees a key, queries with the same keys together."""
    of_queries = [tile for stretch in queries for tile in torch.split(stretch, TILE)]
    of_keys = [tile for stretch in keys for tile in torch.split(stretch, TILE)]
    row = torch.repeat_interleave(
        torch.arange(len(of_queries), device="cpu"), torch.tensor([len(tile) for tile in of_queries], device="cpu")
    )
    column = torch.repeat_interleave(
        torch.arange(len(of_keys), device="cpu"), torch.tensor([len(tile) for tile in of_keys], device="cpu")
    )
    seen = torch.zeros(len(of_queries), len(of_keys), dtype=torch.int32, device="cpu")
    in_order = torch.cat(of_keys)
    for rows, pairs in _chunks(sees, torch.cat(of_queries), in_order):
        by_column = torch.zeros(len(pairs), len(of_keys), dtype=torch.int32, device="cpu").index_add_(
            1, column, pairs.int()
        )
        seen.index_add_(0, row[rows], by_column)
    together: dict[tuple[int, ...], list[Tensor]] = {}
    for tile, occupied in zip(of_queries, (seen > 0).tolist(), strict=True):
        columns = tuple(index for index, some in enumerate(occupied) if some)
        if columns:
            together.setdefault(columns, []).append(tile)
    groups: dict[tuple[int, int, bool, bool], list[Pairs]] = {}
    for columns, tiles in together.items():
        for group in _masked(sees, torch.cat(tiles), torch.cat([of_keys[index] for index in columns])):
            looks = (group.queries.shape[1], group.keys.shape[1], group.allowed is None, group.causal)
            groups.setdefault(looks, []).append(group)
    return [group for alike in groups.values() for group in _stacked(alike)]


def _masked(sees: Sees, queries: Tensor, keys: Tensor) -> Iterator[Pairs]:
    """Groups of one row; queries that do not see all of the keys are taken a few at a time, as their mask is written
    out."""
    queries = queries.sort().values
    keys = keys.sort().values
    every, triangle = True, torch.equal(queries, keys)
    for rows, pairs in _chunks(sees, queries, keys):
        every = every and bool(pairs.all())
        triangle = triangle and torch.equal(pairs, keys[None] <= queries[rows, None])
        if not (every or triangle):
            break
    if every or triangle:
        yield Pairs(queries[None], keys[None], None, not every)
        return
    for few in torch.split(queries, TOGETHER):
        yield Pairs(
            few[None], keys[None], sees(few[:, None], keys[None]).expand(len(few), len(keys))[None].clone(), False
        )


def _stacked(alike: list[Pairs]) -> Iterator[Pairs]:
    """Groups of one size as the rows of few groups."""
    together = max(1, TOGETHER // alike[0].queries.shape[1])
    for start in range(0, len(alike), together):
        few = alike[start : start + together]
        allowed = None
        if few[0].allowed is not None:
            masks = [group.allowed for group in few if group.allowed is not None]
            allowed = masks[0] if all(torch.equal(masks[0], one) for one in masks) else torch.cat(masks)
        yield Pairs(
            torch.cat([group.queries for group in few]),
            torch.cat([group.keys for group in few]),
            allowed,
            few[0].causal,
        )
