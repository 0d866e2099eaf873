"""Which tokens experts see (Lewis et al. 2021, BASE layers, arXiv:2103.16716, section 5.2 and table 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effzoo.errors import IncompatibleError
from effzoo.routing import Router, Routing


@torch.no_grad()
def chosen(model: nn.Module, input_ids: Tensor) -> list[Tensor]:
    """The expert of each token, int[batch, n], of every router of a model, in the order in which they run.

    The one with the largest weight, in evaluation mode.

    input_ids: [batch, n], without padding.

    Raises IncompatibleError for a model without routers.
    """
    found: list[Tensor] = []

    def note(router: nn.Module, given: tuple[Tensor, ...], routing: Routing) -> None:
        found.append(routing.weights.argmax(dim=-1).view(input_ids.shape))

    hooks = [part.register_forward_hook(note) for part in model.modules() if isinstance(part, Router)]
    if not hooks:
        raise IncompatibleError("the model has no experts; build it with effzoo.build(..., experts=8, router='base')")
    mode = model.training
    try:
        model.eval()(input_ids=input_ids)
    finally:
        model.train(mode)
        for hook in hooks:
            hook.remove()
    return found


def counts(experts: Tensor, tokens: Tensor, number: int, vocab: int) -> Tensor:
    """How often each expert sees each token, int[number, vocab]."""
    return torch.bincount((experts * vocab + tokens).flatten(), minlength=number * vocab).view(number, vocab)


def information(table: Tensor) -> float:
    """I(expert; token) = sum_et p(e, t) log2 p(e, t) / (p(e) p(t)), bits, of a table of counts."""
    joint = table.double() / table.sum()
    apart = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0, keepdim=True)
    there = joint > 0
    return float((joint[there] * (joint[there] / apart[there]).log2()).sum())
