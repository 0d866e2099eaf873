"""Relative positions as a bias of the scores (Raffel et al. 2020, T5, arXiv:1910.10683, section 2.1)."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from effzoo.sites import Embedding


class RelativePositions(nn.Module):
    """softmax(q_i . k_j + b(j - i)), with b(d) of each head a number for each bucket of distances; one table, whose
    role is `embed.relative`, for all layers of a stack.

    buckets: how many; in an encoder half of them for keys behind the query. Half of those of a side are single
        distances 0, 1, 2, ..., the others grow by a constant factor up to `distance`, from where on all are one.
    causal: keys behind the query are never seen, and have no buckets.
    """

    def __init__(self, heads: int, buckets: int, distance: int, *, causal: bool):
        super().__init__()
        self.table = Embedding(buckets, heads, role="embed.relative")
        self.buckets, self.distance, self.causal = buckets, distance, causal

    def forward(self, n: int) -> Tensor:
        """b at the distances -(n - 1), ..., n - 1: [heads, 2 n - 1]."""
        distances = torch.arange(1 - n, n, device=self.table.weight.device)
        return cast(Tensor, self.table(self.bucket(distances))).T

    def bucket(self, distances: Tensor) -> Tensor:
        """The bucket of each distance j - i."""
        side = self.buckets if self.causal else self.buckets // 2
        first = torch.zeros_like(distances) if self.causal else (distances > 0) * side
        d = (-distances).clamp(min=0) if self.causal else distances.abs()
        single = side // 2
        # in float32, as the published tables were trained
        share = (d.clamp(min=1).float() / single).log() / math.log(self.distance / single)
        wide = (single + (share * (side - single)).long()).clamp(max=side - 1)
        return first + torch.where(d < single, d, wide)
