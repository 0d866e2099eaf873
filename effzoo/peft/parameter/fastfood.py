"""Fastfood: a random projection in D log D time and D memory (Le et al. 2013, arXiv:1408.3060).

Li et al. 2018, arXiv:1804.08838, section S7, use it for random subspaces.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FACTOR = 32  # the widest dense Hadamard matrix that is multiplied at once; the fastest on a CPU of 16, 32, 64, 128


def dense_hadamard(size: int, like: Tensor) -> Tensor:
    """Sylvester's Hadamard matrix [size, size], size a power of 2: H_1 = 1, H_2n = [[H_n, H_n], [H_n, -H_n]]."""
    H = like.new_ones(1, 1)
    while len(H) < size:
        H = torch.cat([torch.cat([H, H], dim=1), torch.cat([H, -H], dim=1)])
    return H


def hadamard(x: Tensor) -> Tensor:
    """H x along the last axis, whose size is a power of 2, without normalisation: H H = size * I.

    H is the Kronecker product of small Hadamard matrices, which are applied one after the other along axes of their
    own: n log n multiplications, in products of matrices. H is symmetric, so the gradient of H x is H applied to the
    gradient.
    """
    y, left = x, x.shape[-1]
    while left > 1:
        factor, right = min(left, FACTOR), x.shape[-1] // left
        H = dense_hadamard(factor, x)
        y = y.reshape(-1, factor) @ H if right == 1 else torch.einsum("ij,ajr->air", H, y.reshape(-1, factor, right))
        left //= factor
    return y.reshape(x.shape)


class Fastfood(nn.Module):
    """P theta for one tensor of `size` numbers: the first `size` entries of scale / sqrt(padded sum(G^2)) H G Pi H S
    theta.

    theta: [dim], padded with zeros to the power of 2 that holds both `size` and `dim`, so that no entry is cut off.
    scale: the length of each column of P over all padded entries, exactly.
    seed: of everything random, from a CPU generator, so that no file holds it; None makes shapes alone, on the meta
        device.

    S are random signs, Pi a random permutation, G normal numbers on the diagonal, H `hadamard`. The inner H meets only
    the first `dim` entries, which fill one block of the next power of 2, `inner`; the product repeats itself every
    `inner` entries, so it is computed once at that size, and Pi reads it modulo `inner`.
    """

    signs: Tensor
    source: Tensor
    gauss: Tensor

    def __init__(self, size: int, dim: int, scale: float, seed: int | None):
        super().__init__()
        self.size, self.inner = size, power_of_two(dim)
        padded = max(power_of_two(size), self.inner)
        if seed is None:
            signs, source, gauss = (torch.empty(n, device="meta") for n in (dim, padded, padded))
        else:
            draw = torch.Generator().manual_seed(seed)
            signs = torch.randint(2, (dim,), generator=draw, device="cpu").float() * 2 - 1
            source = torch.randperm(padded, generator=draw, device="cpu") % self.inner
            gauss = torch.randn(padded, generator=draw, device="cpu").double()
            gauss *= scale / (padded**0.5 * float(gauss.norm()))
        self.register_buffer("signs", signs.float(), persistent=False)
        self.register_buffer("source", source.to(torch.int32), persistent=False)
        self.register_buffer("gauss", gauss.float(), persistent=False)

    def forward(self, theta: Tensor) -> Tensor:
        """theta [dim] -> [size]."""
        padded = nn.functional.pad(self.signs.to(theta) * theta, (0, self.inner - len(theta)))
        mixed = hadamard(padded).index_select(0, self.source)
        return hadamard(self.gauss.to(theta) * mixed)[: self.size]


def power_of_two(size: int) -> int:
    """The smallest power of 2 that is at least the size."""
    return 1 << (size - 1).bit_length()
