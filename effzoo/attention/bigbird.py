"""BigBird: a window of blocks, random blocks, and global tokens (Zaheer et al. 2020, arXiv:2007.14062)."""

from __future__ import annotations

import functools
from typing import Any

import numpy
import torch
from torch import Tensor

from effzoo.annotations import Count, Whole
from effzoo.attention import tile_map
from effzoo.attention.band import Window
from effzoo.attention.core import Context, Mask
from effzoo.attention.part import Part
from effzoo.attention.predicate import PredicateAttention, known_size, lengths
from effzoo.attention.tiles import TilePositions, TileRun, Tiles, by_head, laid_out
from effzoo.attention.union import Union
from effzoo.errors import InputError, OptionError
from effzoo.registry import attention

PRETRAINING = (1024, 3072, 4096)  # tokens of an input for which random blocks are drawn in another way
NEAR = 1024  # tokens at the front from which these are drawn
MOST_DRAWN = 2**25  # numbers in the permutations of a layer, some seconds


@attention.register("bigbird", "big_bird")
class BigBird(PredicateAttention):
    """Token i sees its block and the two beside it, `random` random blocks, and the global tokens, which see all.

    out_i = sum over j in S_i of p_ij v_j,    p_i = softmax over S_i of q_i . k_j / sqrt(d)

    S_i = {j : |block(i) - block(j)| <= 1} and {j : block(j) in R(block(i))} and {j : j global}   for a token i
    S_i = {every j}                                                                             for a global token i

    block(i) = i // block; R is drawn for each head and layer, and is the same in training and evaluation. Global are
    the tokens that `global_attention_mask` marks, and with `ends` the first and the last block of the example. All
    tokens of an example of at most (5 + 2 random) blocks are. Cost O(n block).

    block: tokens of a block (the paper: 64).
    random: random blocks of a block of queries (the paper: 3).
    ends: whether the first and the last block are global, ITC in the paper. Without them only marked tokens are, ETC;
        global tokens share the projections of the others.
    max_globals: room for the marked tokens of an example under torch.compile and on an accelerator, as in `longformer`.
    like_transformers: the function of transformers' BigBird, for equality with it alone. The last block, and the length
        that decides whether an example is short, are those of the padded batch, so padding matters. In evaluation each
        random block is the first block: its keys count 1 + random times for every token that is not global. In
        training they are drawn, and one that is the last block, or lies in the window, counts twice.

    Random blocks are those that transformers draws in training: by numpy's RandomState of the layer's number, from the
    first 5 + 2 random blocks; in inputs of 1,024, 3,072 and 4,096 tokens, as BigBird was trained on, from the blocks of
    the first 1,024 tokens.
    """

    paper = (
        "Zaheer et al. 2020, Big Bird: Transformers for longer sequences, arXiv:2007.14062, section 2 and appendix D"
    )
    cost = "n * block"
    not_causal = "which block is the last, global one depends on the length, which grows with each token"
    drawn: Tensor

    def __init__(
        self,
        context: Context,
        *,
        block: Count = 64,
        random: Whole = 3,
        ends: bool = True,
        max_globals: Count = 16,
        like_transformers: bool = False,
    ):
        super().__init__(context)
        if like_transformers and not ends:
            raise OptionError("bigbird: like_transformers has global blocks at both ends; leave ends=false out")
        blocks = -(-context.max_length // block)
        self.block, self.random, self.ends, self.max_globals = block, min(random, blocks), ends, max_globals
        self.like_transformers = self.counts_keys = like_transformers
        draws = random if blocks > 5 + 2 * random else 0  # else every input is short
        among = max(5 + 2 * draws, NEAR // block if 2 * block < NEAR else blocks)
        if (numbers := context.heads * blocks * among) > MOST_DRAWN:
            raise OptionError(
                f"bigbird draws random blocks for max_length when it is made, and for max_length={context.max_length} "
                f"and block={block} would draw from {numbers:,} in a layer, above {MOST_DRAWN:,}; give a larger block"
            )
        tables = [
            random_blocks(context.layer, context.heads, blocks, draws),
            random_blocks_of_pretraining(context.layer, context.heads, blocks, draws, block),
        ]
        # [2, heads, blocks, random]; -1 for none
        self.register_buffer("drawn", torch.stack([torch.tensor(x, device="cpu") for x in tables]), persistent=False)

    def visible(
        self, query: Tensor, key: Tensor, *, head: Tensor, length: Tensor, places: Tensor, query_global: Tensor,
        key_global: Tensor,
    ) -> Tensor:  # fmt: skip
        of, to = query // self.block, key // self.block
        seen = ((of - to).abs() <= 1) | query_global | key_global
        if self._draws == 0:
            return seen
        if self._first_block_instead:
            return seen + self._draws * ((to == 0) & ~query_global)
        blocks = self.drawn.to(query.device)
        which = self._of_pretraining(places if self.like_transformers else length)
        chosen = blocks[which, head, of.clamp(max=blocks.shape[2] - 1)]
        times = torch.stack([chosen[..., index] == to for index in range(self._draws)]).sum(dim=0)
        return seen + times * ~query_global if self.like_transformers else seen | (times > 0)

    @property
    def _draws(self) -> int:
        """Random blocks of a block of queries; 0 where every input up to max_length is short."""
        return self.drawn.shape[-1]

    @property
    def _first_block_instead(self) -> bool:
        return self.like_transformers and not self.training

    @property
    def key(self) -> tuple[Any, ...]:
        return (*super().key, self._first_block_instead)

    @property
    def by_length(self) -> bool:
        return not self.like_transformers

    def _of_pretraining(self, tokens: Tensor) -> Tensor:
        """1 for inputs with the random blocks of pretraining, else 0."""
        filled = (tokens + self.block - 1) // self.block * self.block
        return torch.stack([filled == most for most in PRETRAINING]).any(dim=0).long()

    def globals_of(self, mask: Mask, n: int) -> Tensor:
        def make() -> Tensor:
            marked = mask.is_global if mask.valid is None else mask.valid
            device = self.drawn.device if marked is None else marked.device
            place = torch.arange(n, device=device)[None]
            length = torch.full((1,), n, device=device)
            if mask.valid is not None and not self.like_transformers:
                length = lengths(mask.valid)
            block, blocks = place // self.block, ((length + self.block - 1) // self.block)[:, None]
            is_global = blocks <= 5 + 2 * self.random
            if self.ends:
                is_global = is_global | (block == 0) | (block == blocks - 1)
            if mask.is_global is not None:
                is_global = is_global | mask.is_global
            is_global = is_global.expand(-1, n)
            return is_global if mask.valid is None else is_global & mask.valid

        made: Tensor = mask.memo((*self.globals_key, known_size(n)), make)
        return made

    @property
    def globals_key(self) -> tuple[Any, ...]:
        return ("bigbird", self.block, self.random, self.ends, self.like_transformers)

    def room_for_globals(self, mask: Mask) -> int:
        marked = 0 if mask.is_global is None else super().room_for_globals(mask)
        most = max((5 + 2 * self.random) * self.block, 2 * self.block * self.ends + marked)
        return min(most, self.context.max_length)

    def tilings(self, n: int, mask: Mask, device: torch.device) -> tile_map.Tilings:
        """Those of the window."""
        heads, window = list(range(self.context.heads)), Window(1, 1, chunk=self.block)
        key = ("bigbird window", len(heads), self.block, n)
        return tile_map.cached_tilings(key, lambda: [(heads, window.cut(n, False, window.predicate(False)))], device)

    def tile_inputs(self, mask: Mask, batch: int, n: int) -> list[Tensor | None]:
        return [*super().tile_inputs(mask, batch, n), mask.valid]

    def part(self, q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor | None, mask: Mask | None = None) -> Part:
        n, valid = q.shape[2], inputs[1]
        if n > self.context.max_length:
            raise InputError(
                f"bigbird has drawn random blocks for max_length, {self.context.max_length} tokens, got {n}; build the "
                f"model with max_length={n}"
            )
        window = by_head(self.tilings(n, Mask(), q.device), n, False)
        whole = TilePositions(1, n, n)
        tilings = [(Tiles(n, (TileRun(whole, whole),)) if window is None else window, 0)]
        if self._draws and n > self.block:
            # each key once: those that are global come beside the tiles
            tilings.append((self._random_tiles(n, valid, q.device), int(self.like_transformers)))
        return Part(q, k, v, tiling=Union(tilings), inputs=inputs)

    def _random_tiles(self, n: int, valid: Tensor | None, device: torch.device) -> Any:
        """The tiles of random blocks, head by head: of every block of queries but the first."""
        blocks, heads = -(-n // self.block), self.context.heads
        longest = self.drawn.shape[2] * self.block
        differ = valid is not None and not self.like_transformers and longest >= min(PRETRAINING)
        if differ:
            assert valid is not None
            which = self._of_pretraining(lengths(valid))
            drawn = self.drawn.to(device)[which][:, :, :blocks]  # [batch, heads, blocks, random]
            return by_head([([h], self._tiles_of(drawn[:, h], n).to(device)) for h in range(heads)], n, False)

        def make() -> list[tuple[list[int], Tiles]]:
            if self._first_block_instead:
                return [(list(range(heads)), self._tiles_of(torch.zeros(blocks, self._draws, dtype=torch.long), n))]
            drawn = self.drawn.cpu()[int(self._of_pretraining(torch.tensor(n))), :, :blocks]
            return [([head], self._tiles_of(drawn[head], n)) for head in range(heads)]

        key = ("bigbird random", self.context.layer, self.context.heads, self.drawn.shape[2], *self.globals_key)
        return by_head(tile_map.cached_tilings((*key, self._first_block_instead, n), make, device), n, False)

    def _tiles_of(self, drawn: Tensor, n: int) -> Tiles:
        """Tiles in which the blocks of queries from the second on see these blocks of keys, [.., blocks, random]."""
        size, full = self.block, n // self.block
        places = drawn[..., None] * size + torch.arange(size, device=drawn.device)
        seen = (drawn[..., None] >= 0) & (places < n)
        if not self.like_transformers:
            own = torch.arange(drawn.shape[-2], device=drawn.device)[:, None, None]
            seen = seen & ((drawn[..., None] - own).abs() > 1)  # the others are in the window
        index, allowed = places.clamp(0, n - 1).flatten(-2), seen.flatten(-2)
        runs = []
        for first, last, length in ((1, full, size), (full, drawn.shape[-2], n % size)):
            if last > first:
                queries = TilePositions(last - first, length, length, first * size)
                keys = TilePositions(last - first, index.shape[-1], index=index[..., first:last, :])
                runs.append(TileRun(queries, keys, allowed[..., first:last, :].flatten(0, -2)[:, None]))
        return laid_out(n, runs)


@functools.lru_cache(maxsize=256)
def random_blocks(layer: int, heads: int, blocks: int, random: int) -> Any:
    """The random blocks int[heads, blocks, random] of each block of queries, -1 for none: of the first 5 + 2 random
    blocks, those that are neither the first, nor the last of them, nor in the window, in the order of a permutation.

    The second block of queries leaves out the last but one too, and the last but one the second.
    """
    generator, among = numpy.random.RandomState(layer), 5 + 2 * random
    table = numpy.full((heads, blocks, random), -1)
    for query in range(1, blocks if random else 0):
        barred = {0, among - 1, query - 1, query, query + 1}
        barred |= {among - 2} if query == 1 else {1} if query == among - 2 else set()
        for head in range(heads):
            order = generator.permutation(numpy.arange(among))
            table[head, query] = [block for block in order if block not in barred][:random]
    return table


@functools.lru_cache(maxsize=256)
def random_blocks_of_pretraining(layer: int, heads: int, blocks: int, random: int, size: int) -> Any:
    """The same for inputs of `PRETRAINING` tokens: drawn for the longest input, of the blocks before token `NEAR`, with
    fewer bars. Fewer than `random` where there are not as many."""
    table = numpy.full((heads, blocks, random), -1)
    if not random or blocks * size < min(PRETRAINING):
        return table
    generator, inner = numpy.random.RandomState(layer), numpy.arange(1, blocks - 1)
    last = NEAR // size - 1 if 2 * size < NEAR else blocks - 1
    for head in range(heads):
        for query in range(1, blocks - 1):
            if query <= 2:
                among = inner[query + 1 : last]
            elif query >= blocks - 3 or query - 2 > last:
                among = inner[:last]
            elif query + 1 == last:
                among = inner[: query - 2]
            else:
                among = numpy.concatenate([inner[: query - 2], inner[query + 1 : last]])
            chosen = generator.permutation(among)[:random]
            table[head, query, : len(chosen)] = chosen
    return table
