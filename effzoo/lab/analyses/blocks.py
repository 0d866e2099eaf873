"""What a blockwise mask catches of attention matrices (Qiu et al. 2020, BlockBERT, arXiv:1911.02972, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effzoo.errors import OptionError


def caught(matrices: Tensor, permutation: Sequence[int]) -> Tensor:
    """The mean over queries of the weights on keys that they see: sum of P_ij over block(j) = p(block(i)), over n.

    matrices: P [..., n, n], rows that add up to 1; blocks are ceil(n / m) positions.
    permutation: p, of the blocks counted from 1.

    Raises OptionError for what is no permutation of 1 to m.
    """
    m, n = len(permutation), matrices.shape[-1]
    if sorted(permutation) != list(range(1, m + 1)):
        raise OptionError(f"permutation is one of 1 to {m}, each once, got {tuple(permutation)}")
    block = torch.arange(n) // -(-n // m)
    seen = torch.tensor([place - 1 for place in permutation])[block][:, None] == block
    return (matrices * seen).sum(dim=(-1, -2)) / n
