"""Tiles of a predicate that declares no window, searched once per kind, options and length.

Positions are ordered so that pairs that are seen lie close together, and cut into tiles; tiles without such a pair are
left out. Three orders are tried, and the one with the fewest computed pairs is taken: by position; by the remainder of
the position, where all distances seen have a common divisor (strides, dilation); by equal rows and columns of the
predicate (buckets, documents). Queries whose tiles take the same keys form one group.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from effzoo.attention.band import Predicate
from effzoo.attention.tiles import TilePositions, TileRun, Tiles, laid_out

if TYPE_CHECKING:
    from effzoo.attention.predicate import PredicateAttention

TILE = 64  # positions of a tile
QUERIES = 512  # for which the predicate is evaluated at a time
TOGETHER = 1024  # queries of a group whose mask is written out, and of groups that are computed together
CACHED = 64  # tilings, and block masks of torch
# heads with equal predicates, and their tiles; None: every key (before the query, when causal)
Tilings = Sequence[tuple[list[int], Tiles | None]]
_cache: OrderedDict[Any, Any] = OrderedDict()


class Pairs(NamedTuple):
    """Queries [groups, m] with keys [groups, s], and which pairs are seen: bool[groups or 1, m, s], or how often, None
    for all, once; causal: those of a triangle."""

    queries: Tensor
    keys: Tensor
    allowed: Tensor | None
    causal: bool


def tilings(core: PredicateAttention, n: int, device: torch.device) -> Tilings:
    """Groups of heads and their tiles, for n positions without padding."""
    return cached_tilings(
        (core.key, n), lambda: [(heads, _tiles(core, heads[0], n)) for heads in _equal_heads(core, n)], device
    )


def cached(key: Any, make: Callable[[], Any]) -> Any:
    """`make()`, computed once per key while the key is among the latest."""
    if key not in _cache:
        _cache[key] = make()
    _cache.move_to_end(key)
    while len(_cache) > CACHED:
        _cache.popitem(last=False)
    return _cache[key]


@torch.inference_mode(False)  # the cache serves training too
def cached_tilings(key: Any, make: Callable[[], Tilings], device: torch.device) -> Tilings:
    """Tiles made once on the CPU, and copied once to each other device."""
    with _disable_current_modes():  # the tiles of a shape are no part of what is traced
        on_cpu: Tilings = cached(key, make)
    if device.type == "cpu":
        return on_cpu
    copied: Tilings = cached(
        (key, str(device)), lambda: [(heads, None if tiles is None else tiles.to(device)) for heads, tiles in on_cpu]
    )
    return copied


def _equal_heads(core: PredicateAttention, n: int) -> list[list[int]]:
    """Groups of heads with the same predicate."""
    heads = range(core.context.heads)
    if "head" not in core.reads:
        return [list(heads)]
    groups: dict[tuple[int, ...], list[int]] = {}
    for head in heads:
        signature, _ = _signatures(core.predicate(head, n), n)
        groups.setdefault(tuple(signature.tolist()), []).append(head)
    return list(groups.values())


def _signatures(predicate: Predicate, n: int) -> tuple[Tensor, Tensor]:
    """A number for the predicate's row of each query, and one for its column of each key: equal for equal ones
    (different ones are equal with a chance of 2^-64)."""
    weights = torch.randint(-(2**62), 2**62, (n,), generator=torch.Generator("cpu").manual_seed(n), device="cpu")
    of_queries = torch.zeros(n, dtype=torch.int64, device="cpu")
    of_keys = torch.zeros(n, dtype=torch.int64, device="cpu")
    positions = torch.arange(n, device="cpu")
    for chunk, seen in _evaluated(predicate, positions, positions):
        of_queries[chunk] = (seen * weights).sum(dim=1)
        of_keys += (seen * weights[chunk, None]).sum(dim=0)
    return of_queries, of_keys


def _evaluated(predicate: Predicate, queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The predicate, bool[queries, keys], for a chunk of queries at a time."""
    for start in range(0, len(queries), QUERIES):
        chunk = slice(start, min(len(queries), start + QUERIES))
        query = queries[chunk, None]
        yield chunk, predicate(query, keys[None]).expand(len(query), len(keys))


def _tiles(core: PredicateAttention, head: int, n: int) -> Tiles:
    predicate = core.predicate(head, n)
    fewest = min((_cut(predicate, *order) for order in _orders(core, head, n)), key=_cost)
    return laid_out(
        n,
        [
            TileRun(TilePositions.of(pairs.queries), TilePositions.of(pairs.keys), pairs.allowed, pairs.causal)
            for pairs in fewest
        ],
    )


def _cost(groups: list[Pairs]) -> int:
    """Computed pairs; tiles of fewer than 16 queries or keys count as 16."""
    return sum(len(group.queries) * max(16, group.queries.shape[1]) * max(16, group.keys.shape[1]) for group in groups)


def _orders(core: PredicateAttention, head: int, n: int) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Queries and keys in stretches that tiles do not cross: by position, by remainder, by equal rows and columns."""
    positions = torch.arange(n, device="cpu")
    yield [positions], [positions]
    predicate = core.predicate(head, n, causal=False)
    sample = torch.tensor(sorted({0, n // 3, n // 2, n - 1}), device="cpu")
    gaps = (sample[:, None] - positions)[(predicate(sample[:, None], positions[None]) != 0).expand(len(sample), n)]
    divisor = math.gcd(*gaps.tolist())
    if 1 < divisor < n:
        yield ([positions[first::divisor] for first in range(divisor)],) * 2
    queries, keys = (_stretches(signature) for signature in _signatures(predicate, n))
    if 1 < len(queries) <= max(2, n // 8) and len(keys) <= max(2, n // 8):
        yield queries, keys


def _stretches(signature: Tensor) -> list[Tensor]:
    """Positions with equal signatures."""
    _, which, counts = torch.unique(signature, return_inverse=True, return_counts=True)
    return list(torch.split(which.argsort(stable=True), counts.tolist()))


def _cut(predicate: Predicate, queries: list[Tensor], keys: list[Tensor]) -> list[Pairs]:
    """The tiles in which a query sees a key; queries with the same keys form one group."""
    query_tiles = [tile for stretch in queries for tile in torch.split(stretch, TILE)]
    key_tiles = [tile for stretch in keys for tile in torch.split(stretch, TILE)]
    query_tile, key_tile = (
        torch.repeat_interleave(torch.tensor([len(tile) for tile in tiles], device="cpu"))
        for tiles in (query_tiles, key_tiles)
    )
    pairs_seen = torch.zeros(len(query_tiles), len(key_tiles), dtype=torch.int32, device="cpu")
    for chunk, seen in _evaluated(predicate, torch.cat(query_tiles), torch.cat(key_tiles)):
        by_tile = torch.zeros(len(seen), len(key_tiles), dtype=torch.int32, device="cpu")
        pairs_seen.index_add_(0, query_tile[chunk], by_tile.index_add_(1, key_tile, seen.int()))
    same_keys: dict[tuple[int, ...], list[Tensor]] = {}
    for tile, occupied in zip(query_tiles, (pairs_seen > 0).tolist(), strict=True):
        numbers = tuple(number for number, some in enumerate(occupied) if some)
        if numbers:
            same_keys.setdefault(numbers, []).append(tile)
    same_shape: dict[tuple[int, int, bool, bool], list[Pairs]] = {}
    for numbers, tiles in same_keys.items():
        for group in _masked(predicate, torch.cat(tiles), torch.cat([key_tiles[number] for number in numbers])):
            shape = (group.queries.shape[1], group.keys.shape[1], group.allowed is None, group.causal)
            same_shape.setdefault(shape, []).append(group)
    return [stack for groups in same_shape.values() for stack in _stacked(groups)]


def _masked(predicate: Predicate, queries: Tensor, keys: Tensor) -> Iterator[Pairs]:
    """Groups of one: all queries, where they see all keys or a triangle of them; else a few, with their mask."""
    queries, keys = queries.sort().values, keys.sort().values
    every, triangle = True, torch.equal(queries, keys)
    for chunk, seen in _evaluated(predicate, queries, keys):
        every = every and bool((seen == 1).all())
        triangle = triangle and bool((seen == (keys[None] <= queries[chunk, None])).all())
        if not (every or triangle):
            break
    if every or triangle:
        yield Pairs(queries[None], keys[None], None, not every)
        return
    for few in torch.split(queries, TOGETHER):
        allowed = predicate(few[:, None], keys[None]).expand(len(few), len(keys))
        yield Pairs(few[None], keys[None], allowed[None].clone(), False)


def _stacked(groups: list[Pairs]) -> Iterator[Pairs]:
    """Groups of one shape, stacked so that they are computed together."""
    count = max(1, TOGETHER // groups[0].queries.shape[1])
    for start in range(0, len(groups), count):
        few = groups[start : start + count]
        queries, keys = torch.cat([group.queries for group in few]), torch.cat([group.keys for group in few])
        masks = [group.allowed for group in few if group.allowed is not None]
        allowed = None
        if masks:
            allowed = masks[0] if all(torch.equal(masks[0], mask) for mask in masks) else torch.cat(masks)
        yield Pairs(queries, keys, allowed, few[0].causal)
