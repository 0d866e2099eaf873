"""Blockwise attention: each head attends between blocks that a permutation pairs (Qiu et al. 2020, BlockBERT,
arXiv:1911.02972, section 3)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from effzoo.annotations import Count, Few
from effzoo.attention import tile_map
from effzoo.attention.core import Context, Mask
from effzoo.attention.predicate import PredicateAttention, lengths
from effzoo.attention.tiles import TilePositions, TileRun, Tiles, laid_out
from effzoo.devices import table
from effzoo.errors import InputError, OptionError
from effzoo.registry import attention

Permutation = tuple[int, ...]


@attention.register("blockwise", "blockbert")
class Blockwise(PredicateAttention):
    """Query block i of a head with permutation p sees exactly key block p(i): softmax over {j : block(j) = p(block(i))}
    of q_i . k_j / sqrt(d).

    The identity makes a head local, a cyclic shift makes it look far. Cost O(n^2 / blocks), without any mask unless
    there is padding.

    blocks: how many; a row of n tokens has blocks of ceil(n / blocks), whatever stands beside it in the batch.
    block: the length of a block instead. Blocks are then places: position i is in block i // block however long the
        input is, and inputs end at blocks * block positions. Causal models always take places, ceil(max_length /
        blocks) when None, so that an output does not change as the sequence grows.
    permutations: of the blocks, counted from 1 as in the lecture: ((1, 2, 3), (2, 3, 1)). By default the identity and
        cyclic shifts.
    groups: heads per permutation, in order, such as (10, 2). By default a sixth of the heads, at least one, for each
        permutation but the first, which has the rest: 10:2 and 8:2:2 of 12 heads.

    A row whose key block holds no key gives 0, as every row without keys: key blocks after the end of a short sequence,
    and, when causal (j <= i), key blocks after the query's own. Heads that see nothing of a whole input are named in a
    warning.
    """

    paper = (
        "Qiu et al. 2020, Blockwise self-attention for long document understanding (BlockBERT), "
        "arXiv:1911.02972, section 3"
    )
    cost = "n^2 / blocks"

    def __init__(
        self,
        context: Context,
        *,
        blocks: Few = 2,
        permutations: Sequence[Sequence[int]] | None = None,
        groups: Sequence[int] | None = None,
        block: Count | None = None,
    ):
        super().__init__(context)
        chosen = _shifts(blocks, context.heads) if permutations is None else _checked(permutations, blocks)
        sizes = _emphasis(len(chosen), context.heads) if groups is None else tuple(groups)
        if len(sizes) != len(chosen) or min(sizes) < 1 or sum(sizes) != context.heads:
            fitting = (
                f"at most {context.heads} permutations"
                if len(chosen) > context.heads
                else _emphasis(len(chosen), context.heads)
            )
            raise OptionError(
                f"blockwise: groups are heads per permutation, {len(chosen)} numbers of at least 1 that sum to the "
                f"{context.heads} heads, "
                f"got {sizes}; try {fitting}"
            )
        self.blocks, self.block = blocks, block or (-(-context.max_length // blocks) if context.causal else None)
        self._said = False
        # one per head, from 0
        self.permutations = tuple(p for p, size in zip(chosen, sizes, strict=True) for _ in range(size))

    def visible(self, query: Tensor, key: Tensor, *, head: Tensor, length: Tensor) -> Tensor:
        block = self._block(length)
        seen = table(self.permutations, query.device)[head, (query // block).clamp(max=self.blocks - 1)]
        return (seen == key // block) & (query < self.blocks * block)

    @property
    def by_length(self) -> bool:
        return self.block is None

    def _block(self, length: Tensor) -> Tensor:
        """Positions of a block in rows of these lengths."""
        return (
            ((length + self.blocks - 1) // self.blocks).clamp(min=1)
            if self.block is None
            else torch.full_like(length, self.block)
        )

    def tilings(self, n: int, mask: Mask, device: torch.device) -> Sequence[tuple[list[int], Tiles | None]]:
        if self.block is not None and n > self.blocks * self.block:
            raise InputError(
                f"blockwise has {self.blocks} blocks of {self.block} positions, {self.blocks * self.block} in all, "
                f"got {n}; "
                f"build the model with max_length={n}, or with block={-(-n // self.blocks)}"
            )
        size = -(-n // self.blocks) if self.block is None else min(self.block, n)
        self._say_blind(-(-n // size))
        if self.by_length and mask.valid is not None:
            valid = mask.valid
            return mask.memo(("blockwise", self.permutations, n), lambda: self._of_rows(lengths(valid), n, size))
        make = lambda: [(heads, self._of_places(permutation, n, size)) for permutation, heads in self._alike().items()]  # noqa: E731
        return tile_map.cached_tilings(("blockwise", self.permutations, self.context.causal, size, n), make, device)

    def _alike(self) -> dict[Permutation, list[int]]:
        """Heads by permutation."""
        return {one: [head for head, own in enumerate(self.permutations) if own == one] for one in self.permutations}

    def _of_places(self, permutation: Permutation, n: int, size: int) -> Tiles:
        """Blocks of `size` places, those that look alike together."""
        blocks = [torch.arange(start, min(start + size, n), device="cpu") for start in range(0, n, size)]
        alike: dict[tuple[int, int, bool], list[tuple[Tensor, Tensor]]] = {}
        for query, key in enumerate(permutation[: len(blocks)]):
            if key < len(blocks) and not (self.context.causal and key > query):
                looks = (len(blocks[query]), len(blocks[key]), self.context.causal and key == query)
                alike.setdefault(looks, []).append((blocks[query], blocks[key]))
        runs = []
        for (_, _, diagonal), pairs in alike.items():
            queries, keys = (TilePositions.of(torch.stack(side)) for side in zip(*pairs, strict=True))
            runs.append(TileRun(queries, keys, causal=diagonal))
        return laid_out(n, runs)

    def _of_rows(self, lengths: Tensor, n: int, size: int) -> list[tuple[list[int], Tiles]]:
        """Blocks of a share of the length of each row, filled up to `size`: every query block and its key block."""
        own = self._block(lengths)[:, None, None]
        slot = torch.arange(size, device=lengths.device)
        place = torch.arange(self.blocks, device=lengths.device)[:, None] * own + slot  # [batch, blocks, size]
        there = ((slot < own) & (place < n)).expand_as(place)
        place = place.clamp(max=n - 1)
        position = torch.arange(n, device=lengths.device)
        share = own[..., 0]
        back = torch.where(
            position < self.blocks * share, position // share * size + position % share, self.blocks * size
        )
        found = []
        for permutation, heads in self._alike().items():
            keys, allowed = (torch.stack([x[:, block] for block in permutation], dim=1) for x in (place, there))
            of_queries, of_keys = (TilePositions(self.blocks, size, index=index) for index in (place, keys))
            filled = there.flatten(0, 1)[:, None, :, None]
            run = TileRun(of_queries, of_keys, allowed.flatten(0, 1)[:, None], filled=filled)
            found.append((heads, Tiles(n, (run,), back)))
        return found

    def _say_blind(self, used: int) -> None:
        """Warn, once, of heads whose queries see no key in an input with so many blocks."""
        if used == self.blocks or self._said:
            return
        blind = [
            head
            for head, p in enumerate(self.permutations)
            if all(p[i] >= used or (self.context.causal and p[i] > i) for i in range(used))
        ]
        if blind:
            self._said = True
            warnings.warn(
                f"blockwise: heads {blind} of layer {self.context.layer} see nothing in an input of {used} of "
                f"{self.blocks} blocks and give 0; "
                "build the model for shorter inputs (max_length=, block=), or with fewer blocks",
                stacklevel=2,
            )


def _shifts(blocks: int, heads: int) -> list[Permutation]:
    """The identity and the cyclic shifts, at most one permutation per head."""
    return [tuple((block + shift) % blocks for block in range(blocks)) for shift in range(min(blocks, heads))]


def _emphasis(permutations: int, heads: int) -> tuple[int, ...]:
    """Heads per permutation: a sixth for each but the first, less when that leaves none for the first."""
    if permutations == 1:
        return (heads,)
    others = max(1, min(heads // 6, (heads - 1) // (permutations - 1)))
    return (heads - others * (permutations - 1), *[others] * (permutations - 1))


def _checked(permutations: Sequence[Sequence[int]], blocks: int) -> list[Permutation]:
    """The permutations, counted from 0."""
    wanted = list(range(1, blocks + 1))
    for permutation in permutations:
        if sorted(permutation) != wanted:
            raise OptionError(
                f"blockwise: a permutation of {blocks} blocks holds each of {tuple(wanted)} once, got "
                f"{tuple(permutation)}; "
                f"try {tuple(wanted[1:] + wanted[:1])}, or blocks={len(permutation)}"
            )
    if not permutations:
        raise OptionError(
            f"blockwise: permutations is empty; give at least one of {blocks} blocks, such as ({tuple(wanted)},)"
        )
    return [tuple(block - 1 for block in permutation) for permutation in permutations]
