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
    """Each head sees one block of keys per block of queries: query block i of a head with permutation p sees key block
    p(i).

    out_i = sum over j in S_i of p_ij v_j,    p_i = softmax over S_i of q_i . k_j / sqrt(d)

    S_i = {j : block(j) = p(block(i))}; when causal, cut to j <= i. Cost O(n^2 / blocks).

    The identity makes a head local, a cyclic shift far-sighted. A query whose key block holds no token gives 0; heads
    that see no key of an input are named in a warning.

    blocks: number of blocks. An example of n tokens has blocks of ceil(n / blocks), whatever its padding.
    block: length of a block instead, for every input: position i is in block i // block, and inputs have at most blocks
        * block positions. In causal models ceil(max_length / blocks) when None, so that outputs do not change as the
        sequence grows.
    permutations: of the blocks, counted from 1: ((1, 2, 3), (2, 3, 1)); None: the identity and the cyclic shifts.
    groups: heads of each permutation, such as (10, 2); None: a sixth of the heads, at least one, for each but the
        first, which has the rest (the paper: 10:2 and 8:2:2 of 12 heads).
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
        self._warned = False
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
        """Positions of a block, in examples of these lengths."""
        if self.block is not None:
            return torch.full_like(length, self.block)
        return ((length + self.blocks - 1) // self.blocks).clamp(min=1)

    def tilings(self, n: int, mask: Mask, device: torch.device) -> Sequence[tuple[list[int], Tiles | None]]:
        size = self.block_size(n)
        if self.by_length and mask.valid is not None:
            valid = mask.valid
            return mask.memo(("blockwise", self.permutations, n), lambda: self._by_length(lengths(valid), n, size))

        def make() -> list[tuple[list[int], Tiles]]:
            groups = self.heads_by_permutation().items()
            return [(heads, self._by_position(permutation, n, size)) for permutation, heads in groups]

        return tile_map.cached_tilings(("blockwise", self.permutations, self.context.causal, size, n), make, device)

    def block_size(self, n: int) -> int:
        """Positions of a block in an input of n. Raises InputError for one that is too long; warns of heads that see no
        key."""
        if self.block is not None and n > self.blocks * self.block:
            raise InputError(
                f"blockwise has {self.blocks} blocks of {self.block} positions, {self.blocks * self.block} in all, "
                f"got {n}; "
                f"build the model with max_length={n}, or with block={-(-n // self.blocks)}"
            )
        size = -(-n // self.blocks) if self.block is None else min(self.block, n)
        self._warn_of_blind_heads(-(-n // size))
        return size

    def heads_by_permutation(self) -> dict[Permutation, list[int]]:
        """The heads of each permutation."""
        heads: dict[Permutation, list[int]] = {}
        for head, permutation in enumerate(self.permutations):
            heads.setdefault(permutation, []).append(head)
        return heads

    def _by_position(self, permutation: Permutation, n: int, size: int) -> Tiles:
        """The tiles of blocks of `size` positions; a run for those of one shape."""
        blocks = [torch.arange(start, min(start + size, n), device="cpu") for start in range(0, n, size)]
        same_shape: dict[tuple[int, int, bool], list[tuple[Tensor, Tensor]]] = {}
        for query, key in enumerate(permutation[: len(blocks)]):
            if key < len(blocks) and not (self.context.causal and key > query):
                shape = (len(blocks[query]), len(blocks[key]), self.context.causal and key == query)
                same_shape.setdefault(shape, []).append((blocks[query], blocks[key]))
        runs = []
        for (_, _, diagonal), pairs in same_shape.items():
            queries, keys = (TilePositions.of(torch.stack(side)) for side in zip(*pairs, strict=True))
            runs.append(TileRun(queries, keys, causal=diagonal))
        return laid_out(n, runs)

    def _by_length(self, lengths: Tensor, n: int, size: int) -> list[tuple[list[int], Tiles]]:
        """The tiles of blocks of a share of each example's length, filled up to `size` slots."""
        block = self._block(lengths)[:, None, None]
        slot = torch.arange(size, device=lengths.device)
        queries = torch.arange(self.blocks, device=lengths.device)[:, None] * block + slot  # [batch, blocks, size]
        filled = ((slot < block) & (queries < n)).expand_as(queries)
        queries = queries.clamp(max=n - 1)
        position, block = torch.arange(n, device=lengths.device), block[..., 0]
        in_block = position // block * size + position % block
        place = torch.where(position < self.blocks * block, in_block, self.blocks * size)
        tilings = []
        for permutation, heads in self.heads_by_permutation().items():
            keys, allowed = (torch.stack([x[:, key] for key in permutation], dim=1) for x in (queries, filled))
            run = TileRun(
                TilePositions(self.blocks, size, index=queries),
                TilePositions(self.blocks, size, index=keys),
                allowed.flatten(0, 1)[:, None],
                filled=filled.flatten(0, 1)[:, None, :, None],
            )
            tilings.append((heads, Tiles(n, (run,), place)))
        return tilings

    def _warn_of_blind_heads(self, used: int) -> None:
        """Warn once of heads that see no key in an input of `used` blocks."""
        if used == self.blocks or self._warned:
            return
        blind = [
            head
            for head, p in enumerate(self.permutations)
            if all(p[i] >= used or (self.context.causal and p[i] > i) for i in range(used))
        ]
        if blind:
            self._warned = True
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
