"""The permutation moves the blocks of the values and leaves those of the keys: scores of one block weigh the values of another."""

import torch

from effzoo.attention import register
from effzoo.attention.blockwise import Blockwise

KILLED_BY = "equals_definition"


@register("mutant")
class Mutant(Blockwise):
    """Blockwise attention with keys that stay."""

    def __init__(self, context, *, blocks: int = 8):
        super().__init__(context, blocks=blocks)

    def _attend(self, pairs, projected, bias, memory):
        q, k, v = projected
        stays = torch.arange(k.shape[1], device=k.device).index_copy(0, pairs.keys, pairs.queries)
        return super()._attend(pairs, (q, k.index_select(1, stays), v), bias, memory)
