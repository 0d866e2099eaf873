"""Several tilings of the same keys under one softmax: a key counts in each of them that holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from effzoo.attention.kernel import merge
from effzoo.attention.part import DisjointTiling, Gradients, Kernel, Part, Tile, Tiling

NUMBERS = 2**20  # of tiles that each tiling may have: a tile draws its dropout from its number


@dataclass(frozen=True, eq=False)
class Union(Tiling):
    """tilings: each with the index of the part's input that it takes (which keys are seen)."""

    tilings: Sequence[tuple[DisjointTiling, int]]

    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        return merge(
            *(
                tiling.forward(_Numbered(kernel, number * NUMBERS), q, k, v, inputs[index])
                for number, (tiling, index) in enumerate(self.tilings)
            )
        )

    def backward(
        self, kernel: Kernel, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        *inputs: Tensor | None,
    ) -> Gradients:  # fmt: skip
        found = [
            tiling.backward(_Numbered(kernel, number * NUMBERS), grad, q, k, v, out, lse, inputs[index])
            for number, (tiling, index) in enumerate(self.tilings)
        ]
        exact = torch.promote_types(q.dtype, torch.float32)
        sums = (
            sum((x.to(exact) for x in of_one[1:]), start=of_one[0].to(exact)) for of_one in zip(*found, strict=True)
        )
        grad_q, grad_k, grad_v = (total.to(x.dtype) for total, x in zip(sums, (q, k, v), strict=True))
        return grad_q, grad_k, grad_v

    def disjoint(self, part: Part) -> list[Part]:
        return [replace(part, tiling=tiling, inputs=[part.inputs[index]]) for tiling, index in self.tilings]

    def has_no_bias(self, inputs: Sequence[Tensor | None]) -> bool:
        return all(tiling.has_no_bias([inputs[index]]) for tiling, index in self.tilings)


@dataclass(frozen=True)
class _Numbered:
    """A kernel whose tiles are counted from `first`."""

    kernel: Kernel
    first: int

    def forward(self, tile: Tile, index: int) -> tuple[Tensor, Tensor]:
        return self.kernel.forward(tile, self.first + index)

    def backward(self, tile: Tile, index: int, grad: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        return self.kernel.backward(tile, self.first + index, grad, out, lse)
