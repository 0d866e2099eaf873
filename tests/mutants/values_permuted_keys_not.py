"""The permutation moves the blocks of the values and leaves those of the keys: scores of one block weigh the values of
another."""

import torch

from effzoo.attention import register
from effzoo.attention.blockwise import Blockwise

KILLED_BY = "equals_definition"


@register("mutant")
class Mutant(Blockwise):
    """Blockwise attention with keys that stay."""

    def __init__(self, context, *, blocks: int = 8):
        super().__init__(context, blocks=blocks)

    def forward(self, *projected, mask, memory=None):
        q, k, v = projected
        size = -(-q.shape[2] // self.blocks)
        keys = []
        for head, permutation in enumerate(self.permutations):
            place = torch.arange(q.shape[2], device=q.device)
            moved = [
                one
                for one in range(self.blocks)
                if (one + 1) * size <= q.shape[2] and (permutation[one] + 1) * size <= q.shape[2]
            ]
            for block in moved:
                own, seen = (slice(one * size, (one + 1) * size) for one in (block, permutation[block]))
                place[seen] = torch.arange(q.shape[2], device=q.device)[own]
            keys.append(k[:, head, place])
        return super().forward(q, torch.stack(keys, dim=1), v, mask=mask, memory=memory)
