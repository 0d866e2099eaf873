"""Hard-concrete gates: random numbers in [0, 1], often exactly 0 or 1 (Louizos et al. 2018, arXiv:1712.01312)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def drawn_gate(alpha: Tensor, low: float, high: float, temperature: float) -> Tensor:
    """z = clip(s (high - low) + low, 0, 1) with s = sigma((logit u + alpha) / temperature), u ~ U(0, 1) (eq. 10-11).

    u is drawn between 1e-4 and 1 - 1e-4, so that its logit is finite.
    """
    u = torch.rand_like(alpha) * (1 - 2e-4) + 1e-4
    return _stretched(torch.sigmoid((u.logit() + alpha) / temperature), low, high)


def still_gate(alpha: Tensor, low: float, high: float) -> Tensor:
    """The gate in evaluation, z = clip(sigma(alpha) (high - low) + low, 0, 1) (eq. 13)."""
    return _stretched(torch.sigmoid(alpha), low, high)


def open_probability(alpha: Tensor, low: float, high: float, temperature: float) -> Tensor:
    """P(z != 0) = sigma(alpha - temperature log(-low / high)) (eq. 12)."""
    return torch.sigmoid(alpha - temperature * math.log(-low / high))


def _stretched(s: Tensor, low: float, high: float) -> Tensor:
    return (s * (high - low) + low).clamp(0, 1)
