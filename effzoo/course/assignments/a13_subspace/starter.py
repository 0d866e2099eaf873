import torch
from torch.nn import functional as F


def hadamard(x):
    """H x along the last axis of x [.., n], n a power of 2, without a scale."""
    raise NotImplementedError("write the transform here")


def fastfood(theta, signs, order, gauss, size):
    """The first `size` entries of (1 / n) H G Pi H B theta: theta [d]; signs, order and gauss [n]."""
    raise NotImplementedError("write the product here")


def subspace(start, theta, signs, order, gauss):
    """start + P theta, of the shape of start."""
    raise NotImplementedError("move the start here")


def d90(curve, baseline, share):
    """The smallest d of {d: score} whose score is at least share * baseline, or None."""
    raise NotImplementedError("read the curve here")
