"""Filters of a convolutional network, taken out whole (Li et al. 2017, Pruning filters for efficient ConvNets,
arXiv:1608.08710, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effzoo.errors import OptionError
from effzoo.lab.analyses.small_nets import Convolutional
from effzoo.lab.fit import Examples, accuracy


def sizes(weight: Tensor) -> Tensor:
    """s_o = sum_i,h,w |W_oihw| of each output channel, for W [out, in, height, width]."""
    return weight.detach().abs().sum(dim=(1, 2, 3))


def order(weight: Tensor, name: str, seed: int = 0) -> list[int]:
    """The filters of a convolution in the order in which they are taken out.

    name: "smallest first" or "largest first", by `sizes`; or "random", drawn with the seed.

    Raises OptionError for another name.
    """
    if name == "random":
        return torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed)).tolist()
    if name not in ("smallest first", "largest first"):
        raise OptionError(f"the order is 'smallest first', 'largest first' or 'random', got {name!r}")
    return sizes(weight).argsort(descending=name == "largest first").tolist()


@torch.no_grad()
def accuracy_without(net: Convolutional, taken: Sequence[Sequence[int]], examples: Examples) -> float:
    """The accuracy when some filters, listed for each convolution, give 0; the network is as before afterwards."""
    kept = [(conv.weight.clone(), None if conv.bias is None else conv.bias.clone()) for conv in net.filters()]
    try:
        for conv, numbers in zip(net.filters(), taken, strict=True):
            conv.weight[list(numbers)] = 0
            if conv.bias is not None:
                conv.bias[list(numbers)] = 0
        return accuracy(net, examples, size=512)
    finally:
        for conv, (weight, bias) in zip(net.filters(), kept, strict=True):
            conv.weight.copy_(weight)
            if conv.bias is not None and bias is not None:
                conv.bias.copy_(bias)
