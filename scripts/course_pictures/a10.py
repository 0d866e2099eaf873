from __future__ import annotations

from matplotlib.figure import Figure

from scripts.pictures import BLUE, GREY, INK, ORANGE, PALE, box, canvas


def draw() -> Figure:
    """W, the change of W as a product of two thin factors, and phi as an overlap of spaces."""
    figure = Figure(figsize=(7.6, 2.7), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    canvas(axes, 76, 27)
    box(axes, 3, 7, 14, 14, PALE, "$W$")
    axes.text(20.5, 14, "+", fontsize=18, ha="center", va="center", color=INK)
    axes.text(27, 14, r"$\frac{\alpha}{r}$", fontsize=18, ha="center", va="center", color=INK)
    box(axes, 31, 7, 3.5, 14, BLUE, "$B$", "white")
    box(axes, 36.5, 17.5, 14, 3.5, ORANGE, "$A$", "white")
    for x, text in ((10, "out x in, frozen"), (32.7, "out x r\nstarts at 0"), (43.5, "r x in, drawn")):
        axes.text(x, 5.4 if x != 43.5 else 15.6, text, fontsize=9, ha="center", va="top", color=GREY)
    axes.text(64, 22.5, r"$\phi = \|U_A^{i\top} U_B^j\|_F^2 / \min(i, j)$", fontsize=11, ha="center", color=INK)
    axes.text(64, 13, "1: the smaller space\nlies in the larger", fontsize=9, ha="center", va="center", color=GREY)
    axes.text(64, 7, "0: they are orthogonal", fontsize=9, ha="center", va="center", color=GREY)
    return figure
