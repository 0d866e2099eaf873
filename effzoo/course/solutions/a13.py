import torch
from torch.nn import functional as F


def hadamard(x):
    """H x along the last axis of x [.., n], n a power of 2, without a scale."""
    step, n = 1, x.shape[-1]
    while step < n:
        a, b = x.unflatten(-1, (-1, 2, step)).unbind(-2)  # entries that lie `step` apart
        x = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        step *= 2
    return x


def fastfood(theta, signs, order, gauss, size):
    """The first `size` entries of (1 / n) H G Pi H B theta: theta [d]; signs, order and gauss [n]."""
    n = len(signs)
    mixed = hadamard(signs * F.pad(theta, (0, n - len(theta))))[order]
    return hadamard(gauss * mixed)[:size] / n


def subspace(start, theta, signs, order, gauss):
    """start + P theta, of the shape of start."""
    return start + fastfood(theta, signs, order, gauss, start.numel()).view(start.shape)


def d90(curve, baseline, share):
    """The smallest d of {d: score} whose score is at least share * baseline, or None."""
    return min((d for d, score in curve.items() if score >= share * baseline), default=None)
