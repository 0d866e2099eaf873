import torch


def magnitude_mask(weight, k):
    """bool of the shape of weight [out, in]: True at the k largest magnitudes, of equal ones the first."""
    raise NotImplementedError("write the mask here")


def masked_linear(x, weight, scores, threshold):
    """y = x (W * 1[S >= threshold])^T: x [n, in], weight and scores [out, in] -> [n, out].

    The gradient passes straight through the mask: dL/dS = dL/dW' * W.
    """
    raise NotImplementedError("write the masked layer here")


def sparse_difference(before, after, k):
    """(index int64[k], ascending, value [k]): the k entries of the flattened after - before that are largest."""
    raise NotImplementedError("write the difference here")


def add(before, differences):
    """before plus every (index, value) of the list, as a new tensor of the shape of before."""
    raise NotImplementedError("write the sum here")
