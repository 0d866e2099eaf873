"""What a pruned adapter keeps: its masks, and which of the weights that it started from, by their size (Sanh et al.
2020, figure 3)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from effzoo.errors import AdapterError, OptionError
from effzoo.peft.parameter.magnitude import PrunedWeight
from effzoo.sites import Linear, sites


def pruned_weights(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The base's weights under the active pruned adapter (`magnitude` or `movement`), and its masks, bool.

    Raises AdapterError where there is none.
    """
    pruned = [
        (site.weight, module.mask)
        for _, site in sites(model)
        if isinstance(site, Linear)
        for module in site.hung()
        if isinstance(module, PrunedWeight)
    ]
    if not pruned:
        raise AdapterError("no active adapter prunes; attach 'magnitude[keep=0.1]' or 'movement[keep=0.1]'")
    return [weight.detach() for weight, _ in pruned], [mask.clone() for _, mask in pruned]


def kept_by_size(weights: Sequence[Tensor], masks: Sequence[Tensor], parts: int = 10) -> list[float]:
    """The share of the weights that is kept, by their size: in equal parts of each matrix, the smallest |w| first.

    With n entries of a matrix, part i holds the ranks from round(i n / parts) to round((i + 1) n / parts). Magnitude
    pruning before training keeps all of the upper parts and nothing of the lower ones; a mask that does not look at
    size keeps the same share of each.

    Raises OptionError for more parts than a matrix has entries.
    """
    kept, sizes = torch.zeros(parts, dtype=torch.float64), torch.zeros(parts, dtype=torch.float64)
    for weight, mask in zip(weights, masks, strict=True):
        if not 1 <= parts <= weight.numel():
            raise OptionError(
                f"parts is from 1 to the number of entries of the smallest matrix ({weight.numel()}), got {parts}"
            )
        order = mask.flatten()[weight.abs().flatten().argsort(stable=True)].double()
        bounds = [round(i * len(order) / parts) for i in range(parts + 1)]
        for i, (low, high) in enumerate(pairwise(bounds)):
            kept[i] += order[low:high].sum()
            sizes[i] += high - low
    shares: list[float] = (kept / sizes).tolist()
    return shares
