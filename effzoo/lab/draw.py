"""Figures of the lab in one style: panels side by side, quiet axes, colours that colour-blind readers tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from effzoo.plots import LINES, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LINES", "MARKERS", "band", "depth", "heat", "panels"]


def panels(
    count: int = 1, *, rows: int = 1, width: float = 4.6, height: float = 3.6, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `rows` times `count` panels, and the panels row by row.

    options: of `Figure.subplots` (sharey=True, ...).
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(
        figsize=(width * count, height * rows), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    )
    flat = list(figure.subplots(rows, count, squeeze=False, **options).flat)
    for axes in flat:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, flat


def depth(share: float) -> tuple[float, float, float, float]:
    """A colour for what has an order, such as layers: dark at 0, the lowest, light at 1."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * share)


def band(
    axes: Axes, x: Sequence[float], runs: Sequence[Sequence[float]], label: str, number: int, **style: Any
) -> None:
    """The mean of several runs (one per seed) over x with a marker, and their range as a shade."""
    means = [sum(values) / len(values) for values in zip(*runs, strict=True)]
    colour, marker = LINES[number % len(LINES)], MARKERS[number % len(MARKERS)]
    axes.plot(x, means, label=label, color=colour, marker=marker, markersize=4.5, linewidth=1.6, **style)
    if len(runs) > 1:
        axes.fill_between(
            x,
            [min(v) for v in zip(*runs, strict=True)],
            [max(v) for v in zip(*runs, strict=True)],
            color=colour,
            alpha=0.15,
            linewidth=0,
        )


def heat(
    axes: Axes,
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    form: str = "{:.0f}",
    **options: Any,
) -> None:
    """A heat map with its numbers in the cells; None is an empty cell.

    options: of `imshow` (vmin, vmax, cmap).
    """
    numbers = [[float("nan") if value is None else value for value in row] for row in values]
    image = axes.imshow(numbers, aspect="auto", **{"cmap": "viridis", **options})
    axes.grid(False)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.spines[:].set_visible(False)
    low, high = image.get_clim()
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value is not None:
                dark = (value - low) / ((high - low) or 1.0) < 0.6
                axes.text(
                    x, y, form.format(value), ha="center", va="center", fontsize=8, color="white" if dark else "black"
                )
