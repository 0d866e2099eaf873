import torch


def magnitude_mask(weight, k):
    """bool of the shape of weight [out, in]: True at the k largest magnitudes, of equal ones the first."""
    order = weight.abs().flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[order[:k]] = True
    return mask.view(weight.shape)


def masked_linear(x, weight, scores, threshold):
    """y = x (W * 1[S >= threshold])^T: x [n, in], weight and scores [out, in] -> [n, out].

    The gradient passes straight through the mask: dL/dS = dL/dW' * W.
    """
    hard = (scores >= threshold).to(scores)
    mask = hard + (scores - scores.detach())
    return x @ (mask * weight).T


def sparse_difference(before, after, k):
    """(index int64[k], ascending, value [k]): the k entries of the flattened after - before that are largest."""
    change = after - before
    index = magnitude_mask(change, k).flatten().nonzero().flatten()
    return index, change.flatten()[index]


def add(before, differences):
    """before plus every (index, value) of the list, as a new tensor of the shape of before."""
    flat = before.flatten().clone()
    for index, value in differences:
        flat[index] += value
    return flat.view(before.shape)
