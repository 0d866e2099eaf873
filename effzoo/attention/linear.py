"""Linear attention (Katharopoulos et al. 2020, Transformers are RNNs, arXiv:2006.16236, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from effzoo.attention.features import FeatureAttention
from effzoo.registry import attention


@attention.register("linear")
class Linear(FeatureAttention):
    """The weight of key j for query i is phi(q_i) . phi(k_j) with phi(x) = elu(x) + 1, divided by the sum over the keys
    that query i sees.

    out_i = phi(q_i) S_i / phi(q_i) z_i,    S_i = sum_j phi(k_j) v_j^T,    z_i = sum_j phi(k_j)

    j runs over all tokens, or over j <= i when causal: then S_i = S_(i-1) + phi(k_i) v_i^T, and decoding keeps S and z,
    d x d and d numbers for each head at any length. Cost O(n d) for heads of width d, in place of O(n^2). The scores
    are not scaled by 1 / sqrt(d). Padding adds nothing to the sums; an input without tokens gives 0. The sums are in
    float32 or better. Dropout draws once for a key and its weights for all queries.
    """

    paper = "Katharopoulos et al. 2020, Transformers are RNNs, arXiv:2006.16236, equations 4 to 12"
    cost = "n * d"
    scaled = False

    def log_phi(self, x: Tensor) -> Tensor:
        """log(elu(x) + 1): x below 0, log(1 + x) above (equation 7)."""
        return torch.where(x < 0, x, x.clamp(min=0.0).log1p())
