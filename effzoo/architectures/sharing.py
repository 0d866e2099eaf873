"""Several layers that share one block: each layer is a turn of it, with decisions and a cache of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn

from effzoo.attention.core import Cache, Mask
from effzoo.blocks.block import Block


class Turn:
    """Layer number `layer` of a model, which computes with a block that other layers use as well.

    Lan et al. 2020, ALBERT, arXiv:1909.11942, section 3.1. To the model it is a block. What a block keeps by its own
    number must not be that of another turn: discrete choices that are remembered for the backward pass (hash buckets),
    and keys and values of the past.
    """

    def __init__(self, block: Block, layer: int):
        self.block, self.layer = block, layer

    def __call__(self, x: Tensor, mask: Mask, cache: Cache | None = None, wanted: Tensor | None = None) -> Tensor:
        return self._cached(cache, lambda own: self.block(x, self._own(mask), own, wanted))

    def attend(self, x: Tensor, mask: Mask, cache: Cache | None = None, wanted: Tensor | None = None) -> Tensor:
        return self._cached(cache, lambda own: self.block.attend(x, self._own(mask), own, wanted))

    def feed(self, x: Tensor, mask: Mask, wanted: Tensor | None = None) -> Tensor:
        return self.block.feed(x, self._own(mask), wanted)

    def calling(self, x: Tensor, mask: Mask) -> AbstractContextManager[None]:
        return self.block.calling(x, self._own(mask))

    @property
    def attn_norm(self) -> nn.Module | None:
        return self.block.attn_norm

    @property
    def mlp_norm(self) -> nn.Module:
        return self.block.mlp_norm

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.block.parameters()

    def _own(self, mask: Mask) -> Mask:
        """The mask with the decisions of this turn alone."""
        return (
            mask
            if mask.decisions is None
            else dataclasses.replace(mask, decisions=mask.decisions.setdefault(("turn", self.layer), {}))
        )

    def _cached(self, cache: Cache | None, compute: Callable[[Cache | None], Tensor]) -> Tensor:
        """`compute` with a cache in which the block finds what this turn has seen, under the block's number."""
        if cache is None:
            return compute(None)
        own, number = Cache(), self.block.attn.core.context.layer
        own.length, own.prompt_tokens = cache.length, cache.prompt_tokens
        if self.layer in cache.states:
            own.states[number] = cache.states[self.layer]
        out = compute(own)
        cache.states[self.layer] = own.states[number]
        return out


def turns(blocks: Sequence[Block], layers: int) -> list[Turn]:
    """One turn per layer: `layers / len(blocks)` layers in a row share a block."""
    each = layers // len(blocks)
    return [Turn(blocks[layer // each], layer) for layer in range(layers)]
