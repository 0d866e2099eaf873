from __future__ import annotations

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.pictures import INK, ORANGE, bare


def draw() -> Figure:
    """E K = mixtures of all keys, the scores n x k, and the last position in every mixture."""
    n, d, k = 16, 6, 4
    source = torch.Generator().manual_seed(2)
    mix, keys, q = (torch.randn(*size, generator=source) for size in ((k, n), (n, d), (n, d)))
    figure = Figure(figsize=(7.6, 3.0), dpi=110)
    places = {"left": 0.03, "right": 0.98, "top": 0.84, "bottom": 0.14, "wspace": 0.35}
    panels = figure.subplots(1, 4, gridspec_kw={**places, "width_ratios": [n, d, d, k * 1.6]})
    shown = [
        (mix, "E, k x n", "positions"), (keys, "K, n x d", ""), (mix @ keys, "E K, k x d", ""),
        ((q @ (mix @ keys).mT / d**0.5).softmax(dim=-1), "weights, n x k", ""),
    ]  # fmt: skip
    for axes, (matrix, title, below) in zip(panels, shown, strict=True):
        panel(axes, matrix, title, below)
    outline(panels[0], n - 1.5, -0.5, 1, k)
    outline(panels[1], -0.5, n - 1.5, d, 1)
    panels[0].text(n - 1, -1.2, "the last position", fontsize=8, color=ORANGE, ha="right")
    return figure


def panel(axes: Axes, matrix: torch.Tensor, title: str, below: str) -> None:
    axes.imshow(matrix.numpy(), cmap="Blues", interpolation="nearest", aspect="equal")
    axes.set_xlabel(f"{title}\n{below}" if below else title, fontsize=9, color=INK)
    bare(axes)


def outline(axes: Axes, x: float, y: float, width: float, height: float) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=ORANGE, linewidth=2, clip_on=False))
