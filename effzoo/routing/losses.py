"""Losses that spread tokens over experts; each is a scalar without its weight.

Where ranks hold some of the tokens each (`effzoo.routing.router.over_ranks`), sums are over the tokens of all.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effzoo.annotations import Count
from effzoo.errors import InputError
from effzoo.routing.router import count, summed


def importance_loss(weights: Tensor) -> Tensor:
    """CV(I)^2 of the importance I_i of each expert, the sum over tokens of its weights.

    weights: [tokens, experts].

    Shazeer et al. 2017, arXiv:1701.06538, equations 6 and 7.
    """
    _check_shapes(weights=weights)
    return squared_variation(summed(weights))


def load_loss(clean: Tensor, noisy: Tensor, deviation: Tensor, k: Count) -> Tensor:
    """CV(L)^2 of the smooth load L_i, the expected number of tokens that expert i gets if the noise on it is drawn
    again.

        P(x, i) = Phi((clean_i - kth(noisy without i, k)) / deviation_i),   L_i = sum over tokens of P(x, i)

    clean: scores without noise, [tokens, experts].
    noisy: scores with it.
    deviation: the noise's standard deviation; below the epsilon of its dtype it counts as that, so that gradients stay
        finite.
    k: how many experts are kept, fewer than there are.

    Shazeer et al. 2017, arXiv:1701.06538, appendix A.
    """
    _check_shapes(clean=clean, noisy=noisy, deviation=deviation)
    if k >= noisy.shape[-1]:
        raise InputError(
            f"k is below the number of experts, {noisy.shape[-1]}, got {k}; with all experts kept their load is even"
        )
    top = noisy.topk(k + 1, dim=-1).values
    inside = noisy >= top[:, k - 1 : k]
    threshold = torch.where(inside, top[:, k : k + 1], top[:, k - 1 : k])  # the k-th largest of the others
    scale = deviation.clamp(min=torch.finfo(deviation.dtype).eps) * math.sqrt(2)
    kept = 0.5 * (1 + torch.erf((clean - threshold) / scale))
    return squared_variation(summed(kept))


def _check_shapes(**given: Tensor) -> None:
    """Refuse tensors that are not [tokens, experts] of one shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise InputError(f"{' and '.join(shapes)} are [tokens, experts] of one shape, got {shapes}")
    for name, tensor in given.items():
        if not tensor.is_floating_point() and name != "chosen":
            raise InputError(f"{name} are floats, got {tensor.dtype}; .float() makes them of integers")


def squared_variation(values: Tensor) -> Tensor:
    """The squared coefficient of variation, var / mean^2, of all values; 0 for a single one."""
    return values.var(unbiased=False) / values.mean().square().clamp(min=torch.finfo(values.dtype).tiny)


def switch_loss(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """N sum_i f_i P_i: f_i the share of tokens whose choice is i, P_i the mean probability of i.

    probabilities: [tokens, experts].
    chosen: bool[tokens, experts]; it has no gradient.

    1 where both are uniform, its least value for f = P; up to N where one expert has all. Fedus et al. 2021,
    arXiv:2101.03961, equation 4.
    """
    _check_shapes(probabilities=probabilities, chosen=chosen)
    experts, tokens = probabilities.shape[-1], count(probabilities)
    return experts * (summed(chosen.to(probabilities)) / tokens * summed(probabilities) / tokens).sum()


def z_loss(scores: Tensor) -> Tensor:
    """The mean over tokens of logsumexp(scores)^2, which keeps scores small.

    scores: [tokens, experts].

    Zoph et al. 2022, ST-MoE, arXiv:2202.08906, equation 5.
    """
    return summed(scores.logsumexp(dim=-1).square()) / count(scores)
