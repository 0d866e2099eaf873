from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from scripts.pictures import BLUE, GREEN, GREY, INK, ORANGE, PALE, bare

SIZE, KEPT = 6, 9


def draw() -> Figure:
    """The largest magnitudes of a matrix; a step and the gradient passed through it; two sparse differences."""
    figure = Figure(figsize=(7.6, 2.7), dpi=110)
    left, middle = figure.add_axes((0.02, 0.14, 0.27, 0.68)), figure.add_axes((0.37, 0.22, 0.22, 0.6))
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    scale = float(weight.abs().max())
    left.imshow(weight.numpy(), cmap="PuOr", vmin=-1.3 * scale, vmax=1.3 * scale)
    for place in weight.abs().flatten().argsort(descending=True)[:KEPT].tolist():
        row, column = divmod(place, SIZE)
        left.add_patch(Rectangle((column - 0.42, row - 0.42), 0.84, 0.84, fill=False, edgecolor=INK, linewidth=1.8))
    titled(left, "magnitude mask", f"the {KEPT} largest |W| of {SIZE * SIZE} stay")
    step(middle)
    sum_of_two(figure)
    return figure


def titled(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xlabel(below, fontsize=9, color=GREY)
    bare(axes)


def step(axes: Axes) -> None:
    """1[S >= t], and the line whose slope is used backward."""
    axes.plot([-1, 0], [0, 0], color=BLUE, linewidth=2.2)
    axes.plot([0, 1], [1, 1], color=BLUE, linewidth=2.2, label="forward: the step")
    axes.plot([-1, 1], [-0.5, 1.5], color=ORANGE, linewidth=1.6, linestyle="--", label="backward: slope 1")
    axes.set(xticks=[0], xticklabels=["t"], yticks=[0, 1], xlim=(-1, 1), ylim=(-0.6, 1.6))
    axes.tick_params(colors=GREY, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.set_title("straight through", fontsize=10, color=INK)
    axes.text(0.95, 0.62, "forward", fontsize=9, color=BLUE, ha="right")
    axes.text(-0.02, -0.3, "backward:\nslope 1", fontsize=9, color="#b07900", ha="left", va="center")
    axes.set_xlabel("score S", fontsize=9, color=GREY)


def sum_of_two(figure: Figure) -> None:
    """phi_A, phi_B and their sum as grids."""
    draw = np.random.default_rng(1)
    one, two = (draw.permutation(25).reshape(5, 5) < 7 for _ in range(2))
    colours = ListedColormap([PALE, BLUE, ORANGE, GREEN])
    for x, cells, label in (
        (0.645, 1 * one, "$\\phi_A$"),
        (0.765, 2 * two, "$\\phi_B$"),
        (0.885, one + 2 * two, "$\\phi_A + \\phi_B$"),
    ):
        axes = figure.add_axes((x, 0.34, 0.095, 0.27))
        axes.imshow(cells, cmap=colours, vmin=0, vmax=3)
        axes.set_xticks(np.arange(-0.5, 5), minor=True)
        axes.set_yticks(np.arange(-0.5, 5), minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2)
        axes.tick_params(which="both", length=0)
        titled(axes, "", label)
        axes.xaxis.label.set_color(INK)
    figure.text(0.752, 0.475, "+", fontsize=13, ha="center", va="center", color=INK)
    figure.text(0.872, 0.475, "=", fontsize=13, ha="center", va="center", color=INK)
    figure.text(0.812, 0.85, "sparse differences", fontsize=10, ha="center", color=INK)
    figure.text(0.812, 0.7, "both change the green entries", fontsize=9, ha="center", color=GREY)
