"""FAVOR+: the softmax kernel estimated by positive orthogonal random features (Choromanski et al. 2021, Performers,
arXiv:2009.14794, section 2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effzoo.annotations import Count, Seed, problem
from effzoo.attention.core import Context
from effzoo.attention.features import FeatureAttention
from effzoo.errors import OptionError
from effzoo.registry import attention

GRID = 2**12  # rows are multiples of 1 / GRID, so that machines that round a factorisation otherwise draw the same


@attention.register("performer")
class Performer(FeatureAttention):
    """The weight of key j for query i is phi(q_i) . phi(k_j), whose mean over the draws of phi is exp(q_i . k_j /
    sqrt(d)), divided by the sum over the keys that query i sees.

    phi(x) = exp(W x' - |x'|^2 / 2) / sqrt(m),    x' = x / d^(1/4)

    The m rows of W are normal, and orthogonal in groups of d (sections 2.3 and 2.4): the same mean with less variance.
    The output tends to that of full attention as m grows; keys and queries of a large norm need more features, about
    exp(|q' + k'|^2) of them. Sums, causality and decoding are those of `linear`: O(n m d), a cache of m (d + 1) numbers
    for each head. Where the authors add an epsilon to phi, it is divided by its largest value instead, which cancels.

    features: m; the paper has 256 for heads of width 64.
    orthogonal: whether rows of a group of d are orthogonal; without, all are independent.
    seed: of W, which has a generator of its own, another for each layer and head. Files keep a W that is another one;
        `resample` draws it.
    """

    paper = "Choromanski et al. 2021, Rethinking attention with Performers, arXiv:2009.14794, section 2"
    cost = "n * features * d"
    W: Tensor

    def __init__(self, context: Context, *, features: Count = 256, orthogonal: bool = True, seed: Seed = 0):
        super().__init__(context)
        self.features, self.orthogonal = features, orthogonal
        self.register_buffer("W", self._draw(seed), persistent=False)

    def resample(self, seed: int) -> None:
        """Draw another W, as the paper does from time to time in training."""
        if wrong := problem(seed, Seed):
            raise OptionError(f"performer: seed {wrong}")
        self.W = self._draw(seed).to(self.W)

    def _draw(self, seed: int) -> Tensor:
        heads, d = self.context.heads, self.context.head_dim
        source = torch.Generator("cpu").manual_seed((seed * 1_000_003 + self.context.layer) % 2**63)
        return random_rows(heads, self.features, d, self.orthogonal, source)

    def log_phi(self, x: Tensor) -> Tensor:
        """log phi(x) (Lemma 1, SM+)."""
        x = x * x.shape[-1] ** -0.25
        return x @ self.W.to(x.dtype).mT - x.square().sum(dim=-1, keepdim=True) / 2 - math.log(self.features) / 2


def random_rows(heads: int, rows: int, d: int, orthogonal: bool, source: torch.Generator) -> Tensor:
    """Rows [heads, rows, d], each normal; orthogonal: in groups of d they are at right angles to each other.

    A group is an orthogonal matrix, uniform among these, whose rows get the norms of independent normal vectors.
    """
    groups = -(-rows // d)

    def normal() -> Tensor:
        return torch.randn(heads, groups, d, d, dtype=torch.float64, device="cpu", generator=source)

    drawn = normal()
    if orthogonal:
        Q, R = torch.linalg.qr(drawn)
        uniform = Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # QR alone prefers some (Mezzadri 2007)
        drawn = normal().norm(dim=-1, keepdim=True) * uniform
    return ((drawn.flatten(1, 2)[:, :rows] * GRID).round() / GRID).float()
