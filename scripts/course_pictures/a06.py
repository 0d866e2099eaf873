from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.pictures import BLUE, GREEN, GREY, INK, ORANGE, PINK, arrow, box, canvas

BUCKETS = [2, 0, 1, 3, 1, 0, 2, 1, 0, 3, 1, 2, 0, 1]  # of 14 positions
COLOURS = (BLUE, ORANGE, GREEN, PINK)
SIZE, WIDTH = 4, 3.6


def draw() -> Figure:
    """Fourteen positions, hashed, sorted and cut into chunks; what a chunk reads, and the way back."""
    figure = Figure(figsize=(7.6, 3.5), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    canvas(axes, 80, 35)
    order = sorted(range(len(BUCKETS)), key=BUCKETS.__getitem__)
    for y, said in ((29, "hash"), (21, "sort"), (13, "chunk"), (3, "unsort")):
        axes.text(1.2, y + 1.4, said, fontsize=10, va="center", color=INK)
    row(axes, 29, range(len(BUCKETS)))
    row(axes, 21, order)
    row(axes, 13, order, SIZE)
    row(axes, 3, range(len(BUCKETS)))
    for at, position in enumerate(order):
        line(axes, middle(position), 28.8, middle(at), 24.2)
        line(axes, middle(at, SIZE), 12.7, middle(position), 6.2)
    for chunk in range(1, 4):
        start, end = middle(SIZE * chunk, SIZE), middle(SIZE * chunk - 1, SIZE)
        arrow(axes, (start + 1, 17.2), (end - 1, 17.2))
    axes.text(
        41, 19.2, "a chunk reads itself and the chunk before it", fontsize=9, va="center", ha="center", color=GREY
    )
    axes.text(66, 30.4, "a colour is a bucket", fontsize=9, va="center", color=GREY)
    return figure


def middle(at: int, size: int = 100) -> float:
    return 10 + WIDTH * at + 1.6 * (at // size) + WIDTH / 2 + (2.4 if size == 100 else 0.0)


def row(axes: Axes, y: float, positions: list[int] | range, size: int = 100) -> None:
    """The positions in their order, each in the colour of its bucket."""
    for at, position in enumerate(positions):
        label = str(position)
        box(axes, middle(at, size) - WIDTH / 2 + 0.15, y, WIDTH - 0.3, 2.8, COLOURS[BUCKETS[position]], label, "white")
    for at in range(len(BUCKETS), -(-len(BUCKETS) // SIZE) * SIZE if size == SIZE else 0):
        box(axes, middle(at, size) - WIDTH / 2 + 0.15, y, WIDTH - 0.3, 2.8, "#eeeeee", "-1", GREY)


def line(axes: Axes, x: float, y: float, to_x: float, to_y: float) -> None:
    axes.plot((x, to_x), (y, to_y), color="#bbbbbb", linewidth=0.8)
