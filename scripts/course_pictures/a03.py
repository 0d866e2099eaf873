from __future__ import annotations

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from effzoo import plots
from scripts.pictures import BLUE, GREY, INK, bare


def draw() -> Figure:
    """Which keys a query reads in a window, and the blocks of queries with the bands of keys that they reach."""
    n, window, block = 24, 4, 8
    figure = Figure(figsize=(7.6, 3.9), dpi=110)
    left, right = figure.subplots(1, 2, gridspec_kw={"left": 0.06, "right": 0.99, "top": 0.88, "bottom": 0.09})
    cells = plots.pattern(f"longformer[window={window}]", n).numpy()
    for axes, title in ((left, "n x n: right, and quadratic"), (right, "blocks and their bands: the same, and linear")):
        axes.imshow(cells, cmap=ListedColormap([plots.COLOURS[0], plots.COLOURS[1]]), interpolation="nearest")
        axes.set_title(title, fontsize=10, color=INK)
        axes.set_xlabel("keys", fontsize=9, color=GREY)
        bare(axes)
    left.set_ylabel("queries", fontsize=9, color=GREY)
    for start in range(0, n, block):
        first, last = max(0, start - window // 2), min(n, start + block + window // 2)
        edge = right.add_patch(  # the scores that one block computes
            Rectangle((first - 0.5, start - 0.5), last - first, block, fill=False, edgecolor=BLUE, linewidth=2)
        )
        edge.set_clip_on(False)
    return figure
