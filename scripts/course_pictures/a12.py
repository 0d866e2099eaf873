from __future__ import annotations

from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from effzoo.course.assignments.a12_routing.tasks import EXPERTS, FAVOURED, K, Training, balance, mixture, shares, top_k
from effzoo.course.task import Draw
from scripts.pictures import BLUE, GREY, INK, ORANGE

STEPS, EVERY = 200, 5


def draw() -> Figure:
    """Weights of tokens by their k experts; the use of the experts in a training without and with the loss."""
    figure = Figure(figsize=(7.6, 2.8), dpi=110)
    left = figure.add_axes((0.055, 0.17, 0.2, 0.68))
    weights = top_k(torch.randn(12, EXPERTS, generator=torch.Generator().manual_seed(2)), K)
    left.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    left.set_title(f"weights, k = {K}", fontsize=10, color=INK)
    left.set_ylabel("tokens", fontsize=9, color=GREY)
    left.set_xlabel(f"{EXPERTS} experts", fontsize=9, color=GREY)
    left.set(xticks=[], yticks=[])
    left.spines[:].set_color("#cccccc")
    for x, weight, title in ((0.345, 0.0, "without the loss"), (0.695, 0.1, "with the loss")):
        used(figure.add_axes((x, 0.17, 0.275, 0.68)), weight, title)
    return figure


def used(axes: Axes, weight: float, title: str) -> None:
    """A line for each expert: its share of the choices, over the steps."""
    curves = 100 * torch.stack(trained(weight))
    for i in range(EXPERTS):
        axes.plot(
            range(0, STEPS + 1, EVERY), curves[:, i].numpy(), linewidth=1.6, color=ORANGE if i < FAVOURED else BLUE
        )
    axes.axhline(100 / EXPERTS, color=GREY, linewidth=0.9, linestyle=":")
    axes.set(
        ylim=(-2, 52), xlim=(0, STEPS), xticks=[0, 100, 200], yticks=[0, 25, 50], yticklabels=["0", "25 %", "50 %"]
    )
    axes.tick_params(colors=GREY, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    unused = int((curves[-1] == 0).sum())
    axes.set_title(f"{title}: {unused} of {EXPERTS} unused", fontsize=10, color=INK)
    axes.set_xlabel("step", fontsize=9, color=GREY)


def trained(weight: float) -> list[Tensor]:
    """The shares of the choices of the experts, every few steps."""
    given: dict[str, Any] = Training()._call(Draw(7)).given
    x, target = given["x"], given["target"]
    router, experts = (given[name].requires_grad_() for name in ("router", "experts"))
    optimizer = torch.optim.Adam([router, experts], lr=0.02)
    found = [shares((x @ router.mT).detach(), K)]
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        error = (mixture(x, router, experts, K) - target).square().mean()
        (error + weight * balance(x @ router.mT, K)).backward()
        optimizer.step()
        if step % EVERY == 0:
            found.append(shares((x @ router.mT).detach(), K))
    return found
