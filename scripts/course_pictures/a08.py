from __future__ import annotations

from matplotlib.figure import Figure

from scripts.pictures import BLUE, GREY, INK, ORANGE, PALE, arrow, box, canvas


def draw() -> Figure:
    """A block whose feed-forward is followed by an adapter, and the shape of the adapter."""
    figure = Figure(figsize=(7.6, 3.4), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    canvas(axes, 76, 34)
    box(axes, 4, 4, 18, 5, PALE, "attention, frozen")
    box(axes, 4, 14, 18, 5, PALE, "feed-forward, frozen")
    box(axes, 8, 23, 10, 4, BLUE, "adapter", "white")
    for low, high in ((9.2, 13.8), (19.2, 22.8), (27.2, 31)):
        arrow(axes, (13, low), (13, high))
    axes.plot([13, 26, 26, 13.6], [11.5, 11.5, 29.5, 29.5], color=GREY, linewidth=1.2)
    axes.text(27, 20, "residual", fontsize=9, color=GREY, va="center")
    box(axes, 44, 5, 22, 3.4, PALE, "y, d numbers")
    box(axes, 49.5, 12, 11, 3.4, BLUE, "m numbers", "white")
    box(axes, 44, 19, 22, 3.4, ORANGE, "change of y, starts at 0", "white")
    arrow(axes, (55, 8.6), (55, 11.8))
    arrow(axes, (55, 15.6), (55, 18.8))
    axes.text(56, 10.2, r"$W_{down}$, then relu", fontsize=9, color=INK, va="center")
    axes.text(56, 17.2, r"$W_{up}$", fontsize=9, color=INK, va="center")
    axes.plot([44, 40, 40, 54.4], [6.7, 6.7, 27, 27], color=GREY, linewidth=1.2)
    arrow(axes, (55, 22.6), (55, 26.4))
    axes.text(55, 27, "+", fontsize=13, color=INK, ha="center", va="center")
    axes.text(58, 27, "y'", fontsize=10, color=INK, va="center")
    axes.text(13, 32.3, "to the next block", fontsize=9, color=GREY, ha="center")
    return figure
