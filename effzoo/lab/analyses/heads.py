"""Attention heads by importance, and the model without some of them (Michel et al. 2019, arXiv:1905.10650, section
4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from effzoo import peft
from effzoo.errors import AdapterError, OptionError
from effzoo.lab.analyses.tuning import fast_accuracy
from effzoo.lab.fit import Examples
from effzoo.peft.parameter.head_pruning import HeadGates, importance
from effzoo.sites import sites

SPEC = "head_pruning[mode=importance,share=0]"
NAME = "gates"


def head_importance(model: nn.Module, examples: Examples, batch: int = 16) -> Tensor:
    """I_h = mean over examples of |dL_i / dxi_h|, divided by its L2 norm over the layer, [layers, heads].

    The zoo's `head_pruning` computes it; the model is left as it was.
    """
    peft.attach(model, SPEC, name=NAME)
    mode = model.training
    try:
        scores = importance(model.eval(), gates(model), list(examples.batches(batch)))
    finally:
        model.train(mode)
        peft.detach(model, NAME)
    return torch.stack(scores)


def without_heads(model: nn.Module, order: Tensor, counts: Sequence[int], examples: Examples) -> list[float]:
    """The accuracy after the gates of the first 0, 1, ... heads of an order are closed; the model is left as it was.

    order: int[layers * heads], numbers of heads, layer after layer.
    counts: how many heads are closed, one accuracy for each.

    Raises OptionError for an order that does not name each head once, or a count beyond them.
    """
    peft.attach(model, SPEC, name=NAME)
    try:
        modules = gates(model)
        heads = [module.heads for module in modules.values()]
        if sorted(order.tolist()) != list(range(sum(heads))) or any(not 0 <= count <= sum(heads) for count in counts):
            raise OptionError(
                f"an order names each of the {sum(heads)} heads once, and counts are between 0 and that, got "
                f"{len(order)} and {list(counts)}"
            )
        accuracies = []
        for count in counts:
            open_ = torch.ones(sum(heads))
            open_[order[:count]] = 0
            for module, gate in zip(modules.values(), torch.split(open_, heads), strict=True):
                assert module.gate is not None
                module.gate.copy_(gate)
            accuracies.append(fast_accuracy(model, examples))
        return accuracies
    finally:
        peft.detach(model, NAME)


def gain_of_chosen(lost: Tensor) -> float:
    """What is won without the head that one half of the texts calls worst, counted on the other; the mean of both ways.

    lost: what is lost without each head on each half, [2, ...heads].
    """
    first, second = lost.flatten(1)
    return -float(second[first.argmin()] + first[second.argmin()]) / 2


def agreement(lost: Tensor) -> float:
    """Pearson's correlation of what heads are worth on two halves of the texts; 0 where all are worth the same.

    lost: what is lost without each head on each half, [2, ...heads].
    """
    return float(torch.corrcoef(lost.flatten(1).double())[0, 1].nan_to_num())


def gates(model: nn.Module) -> Mapping[str, HeadGates]:
    """The gates of the active adapters, by the path of their site. Raises AdapterError where there are none."""
    modules = {path: module for path, site in sites(model) for module in site.hung() if isinstance(module, HeadGates)}
    if not modules:
        raise AdapterError("no active adapter has gates on heads; attach 'head_pruning'")
    return modules
