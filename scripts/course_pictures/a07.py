from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.pictures import BLUE, GREEN, GREY, INK, ORANGE, arrow, box, canvas

INPUTS, LATENTS = 14, 4


def draw() -> Figure:
    """Latents that read the inputs: in the encoder they stay, in the kind they are read by as many queries."""
    figure = Figure(figsize=(7.6, 3.2), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    canvas(axes, 82, 34)
    for left, title in ((3, "the encoder"), (44, "the attention kind")):
        axes.text(left + 17, 31.6, title, ha="center", fontsize=11, color=INK)
        row(axes, left, 2.4, INPUTS, BLUE)
        lines(axes, left, 4.8, INPUTS, 11.4, LATENTS)
        row(axes, left, 11.6, LATENTS, ORANGE)
    axes.text(20, 0.9, "n inputs", ha="center", va="center", fontsize=9, color=GREY)
    axes.text(61, 0.9, "n keys and values", ha="center", va="center", fontsize=9, color=GREY)
    for y in (17.2, 22.8):
        lines(axes, 3, y - 3.2, LATENTS, y - 0.2, LATENTS)
        row(axes, 3, y, LATENTS, ORANGE)
    arrow(axes, (20, 25.4), (20, 28.8))
    for y, said in ((8.1, "n m"), (15.6, "m²"), (21.2, "m²")):
        axes.text(38.4, y, said, ha="center", va="center", fontsize=9, color=GREY)
    lines(axes, 44, 14.0, LATENTS, 20.6, INPUTS)
    row(axes, 44, 20.8, INPUTS, GREEN)
    axes.text(61, 24.6, "n queries, n outputs", ha="center", fontsize=9, color=GREY)
    for y, said in ((8.1, "n m"), (17.3, "n m")):
        axes.text(78.6, y, said, ha="center", va="center", fontsize=9, color=GREY)
    axes.text(25.8, 12.8, "m latents", va="center", fontsize=9, color=GREY)
    axes.text(66.8, 12.8, "m latents", va="center", fontsize=9, color=GREY)
    return figure


def place(left: float, at: int, count: int) -> float:
    return left + 17 + 2.4 * (at - (count - 1) / 2)


def row(axes: Axes, left: float, y: float, count: int, colour: str) -> None:
    for at in range(count):
        box(axes, place(left, at, count) - 1, y, 2, 2.2, colour)


def lines(axes: Axes, left: float, y: float, count: int, to_y: float, to_count: int) -> None:
    for at in range(count):
        for to in range(to_count):
            points = (place(left, at, count), place(left, to, to_count))
            axes.plot(points, (y, to_y), color="#c4c4c4", linewidth=0.6)
