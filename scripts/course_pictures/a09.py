from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.pictures import BLUE, GREY, INK, PINK, arrow, box, canvas

PREFIX, TOKENS = 3, 7


def draw() -> Figure:
    """One softmax over prefix and tokens; the same as two softmaxes that a gate weighs."""
    figure = Figure(figsize=(7.6, 2.5), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    canvas(axes, 80, 30)
    axes.set_ylim(4, 30)
    axes.text(18, 27.6, "one softmax", ha="center", fontsize=11, color=INK)
    cells(axes, 3, 9, PREFIX, PINK, "prefix")
    cells(axes, 12, 9, TOKENS, BLUE, "tokens")
    axes.plot((3, 32.6), (13, 13), color=GREY, linewidth=1.3)
    arrow(axes, (18, 13), (18, 19))
    axes.text(18, 21, "head", ha="center", fontsize=11, color=INK)
    axes.text(38.5, 14, "=", ha="center", va="center", fontsize=20, color=INK)
    axes.text(61, 27.6, "two, and a gate", ha="center", fontsize=11, color=INK)
    cells(axes, 44, 9, PREFIX, PINK, "prefix")
    cells(axes, 57, 9, TOKENS, BLUE, "tokens")
    axes.plot((44, 52.6), (13, 13), color=GREY, linewidth=1.3)
    axes.plot((57, 77.6), (13, 13), color=GREY, linewidth=1.3)
    arrow(axes, (48.3, 13), (58, 19.6))
    arrow(axes, (67.3, 13), (62, 19.6))
    axes.text(50.4, 17, r"$\lambda(x)$", ha="right", fontsize=11, color=PINK)
    axes.text(66.6, 17, r"$1 - \lambda(x)$", ha="left", fontsize=11, color=BLUE)
    axes.text(60, 21, "head", ha="center", fontsize=11, color=INK)
    return figure


def cells(axes: Axes, left: float, y: float, count: int, colour: str, said: str) -> None:
    for at in range(count):
        box(axes, left + 3 * at, y, 2.6, 2.8, colour)
    axes.text(left + 3 * count / 2 - 0.2, y - 2.6, said, ha="center", va="center", fontsize=9, color=GREY)
