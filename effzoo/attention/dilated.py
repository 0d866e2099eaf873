"""Dilated attention: segments of several lengths, each thinned out as it is long (Ding et al. 2023, LongNet,
arXiv:2307.02486, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effzoo.annotations import Count
from effzoo.attention import tile_map
from effzoo.attention.core import Context, Mask
from effzoo.attention.part import Part
from effzoo.attention.predicate import PredicateAttention
from effzoo.attention.tiles import TilePositions, TileRun, Tiles, by_head, laid_out
from effzoo.attention.union import Union
from effzoo.errors import OptionError
from effzoo.registry import attention


@attention.register("dilated", "longnet")
class Dilated(PredicateAttention):
    """Every r-th token of a segment of w tokens sees every r-th token of it; pairs (w, r) are mixed in one softmax.

    O_p = softmax(q k^T / sqrt(d)) v over the tokens that pair p keeps of a segment (equations 6 to 9)

    out_i = sum_p alpha_p O_p,i,    alpha_p = z_p / sum_p' z_p',  z_p the denominator of the softmax of O_p,i (equation
        10)

    Of pair p = (w, r) head h keeps the tokens whose place in the segment is h mod r, r + h mod r, ... (section 3.2,
    multi-head). As alpha weights by the denominators, out_i is one softmax over the keys of all pairs, in which a key
    counts once for each pair by which token i sees it, and is dropped out for each by itself. Cost O(n sum of w / r^2).

    segments: w of each pair.
    dilations: r of each pair, at most its w. Where none is 1, a head gives 0 at tokens that no pair keeps.

    A decoder caches the last keys of the longest segment.
    """

    paper = "Ding et al. 2023, LongNet: Scaling transformers to 1,000,000,000 tokens, arXiv:2307.02486, section 3"
    cost = "n * segment"
    counts_keys = True

    def __init__(
        self,
        context: Context,
        *,
        segments: Sequence[Count] = (2048, 4096, 8192, 16384, 32768),
        dilations: Sequence[Count] = (1, 2, 4, 6, 12),
    ):
        super().__init__(context)
        if len(segments) != len(dilations) or not segments:
            raise OptionError(
                f"dilated: segments and dilations are pairs, as many of one as of the other, got {len(segments)} and "
                f"{len(dilations)}; try segments=(64, 128), dilations=(1, 2)"
            )
        self.pairs = tuple(zip(segments, dilations, strict=True))
        if wide := [pair for pair in self.pairs if pair[1] > pair[0]]:
            raise OptionError(
                f"dilated: a dilation is at most its segment, got {wide[0][1]} for a segment of {wide[0][0]}; try "
                f"{wide[0][0]}"
            )

    def visible(self, query: Tensor, key: Tensor, *, head: Tensor) -> Tensor:
        count = torch.zeros_like(query + key)
        for segment, dilation in self.pairs:
            kept = [(place % segment - head) % dilation == 0 for place in (query, key)]
            count = count + ((query // segment == key // segment) & kept[0] & kept[1])
        return count

    @property
    def past_reach(self) -> int | None:
        return max(segment for segment, _ in self.pairs) - 1

    def part(self, q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor | None, mask: Mask | None = None) -> Part:
        n = q.shape[2]
        tilings = [by_head(self._tiles(*pair, n, q.device), n, self.context.causal) for pair in self.pairs]
        return Part(q, k, v, tiling=Union([(tiling, 0) for tiling in tilings if tiling is not None]), inputs=inputs)

    def _tiles(self, segment: int, dilation: int, n: int, device: torch.device) -> tile_map.Tilings:
        """The tiles of one pair: those of heads that keep the same tokens."""
        causal, heads = self.context.causal, range(self.context.heads)

        def make() -> list[tuple[list[int], Tiles]]:
            return [
                ([head for head in heads if head % dilation == first], _thinned(segment, dilation, first, n, causal))
                for first in range(min(dilation, len(heads)))
            ]

        key = ("dilated", segment, dilation, len(heads), causal, n)
        return tile_map.cached_tilings(key, make, device)


def _thinned(segment: int, dilation: int, first: int, n: int, causal: bool) -> Tiles:
    """A tile for each segment, of its tokens first, first + dilation, ...; a run for the tiles of one length."""
    places, whole = torch.arange(n, device="cpu"), n - n % segment
    runs = []
    for index in (places[:whole].view(-1, segment)[:, first::dilation], places[None, whole:][:, first::dilation]):
        if index.numel():
            positions = TilePositions.of(index)
            runs.append(TileRun(positions, positions, causal=causal))
    return laid_out(n, runs)
