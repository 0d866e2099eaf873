"""A small network, trained in subspaces with what was handed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effzoo.checks.runner import Failed

WIDTH, HIDDEN, CLASSES, STEPS = 6, 20, 3, 60
SIZE = HIDDEN * (WIDTH + 1) + CLASSES * (HIDDEN + 1)


def scores(network: Tensor, x: Tensor) -> Tensor:
    """Two layers with a tanh between them, all of their numbers in one vector [SIZE]; x [examples, WIDTH]."""
    first, second = network[: HIDDEN * (WIDTH + 1)], network[HIDDEN * (WIDTH + 1) :]
    hidden = (F.pad(x, (0, 1), value=1.0) @ first.view(HIDDEN, WIDTH + 1).T).tanh()
    return F.pad(hidden, (0, 1), value=1.0) @ second.view(CLASSES, HIDDEN + 1).T


def accuracy(network: Tensor, x: Tensor, labels: Tensor) -> float:
    return float((scores(network, x).argmax(dim=-1) == labels).double().mean())


def trained(network: Callable[[Tensor], Tensor], theta: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """theta after steps of Adam on the cross-entropy of the network that it makes."""
    theta = theta.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.1)
    for _ in range(STEPS):
        loss = F.cross_entropy(scores(network(theta), x), labels)
        if not loss.requires_grad:
            raise Failed("theta has no gradient; search for .detach(), .data and torch.tensor(...) on the way")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return theta.detach()


def measure(
    names: dict[str, Any],
    x: Tensor,
    labels: Tensor,
    start: Tensor,
    signs: Tensor,
    order: Tensor,
    gauss: Tensor,
    sizes: list[int],
    baseline: float,
    share: float,
) -> dict[str, Any]:
    """theta of each size d, and d90 of the accuracies, both by the functions of the file."""
    for name in ("subspace", "d90"):
        if not callable(names.get(name)):
            raise Failed(f"the file has no function {name}; keep the names of the starter")

    def network(theta: Tensor) -> Tensor:
        moved: Tensor = names["subspace"](start, theta, signs, order, gauss)
        return moved

    found = {d: trained(network, start.new_zeros(d), x, labels) for d in sizes}
    curve = {d: accuracy(network(theta), x, labels) for d, theta in found.items()}
    return {"thetas": found, "d90": names["d90"](curve, baseline, share)}
