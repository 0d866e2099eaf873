from __future__ import annotations

from matplotlib.figure import Figure

from effzoo.lab.analyses.layer_cost import ATTENTION, FEED_FORWARD, PROJECTIONS, operations, shares
from scripts.pictures import BLUE, GREEN, GREY, INK, ORANGE


def draw() -> Figure:
    """The shares of the three parts of a layer in its operations, by n, for one width."""
    d = 768
    lengths = [round(2 ** (k / 8)) for k in range(48, 129)]  # 64 to 65,536
    parts = [shares(operations(n, d)) for n in lengths]
    figure = Figure(figsize=(7.6, 3.0), dpi=110)
    axes = figure.add_axes((0.09, 0.17, 0.865, 0.7))
    names = (PROJECTIONS, FEED_FORWARD, ATTENTION)
    axes.stackplot(
        lengths, [[one[name] for one in parts] for name in names], colors=[GREEN, ORANGE, BLUE], alpha=0.75, linewidth=0
    )
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0], lengths[-1])
    axes.set_ylim(0, 1)
    ticks = [2**k for k in range(6, 17, 2)]
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    for n, at, text in (
        (180, 0.17, "projections: linear in n"), (180, 0.6, "feed-forward: linear in n"),
        (17000, 0.7, "attention: quadratic in n"),
    ):  # fmt: skip
        axes.text(n, at, text, ha="center", va="center", fontsize=9, color=INK)
    crossing = 2 * d + 4 * d
    axes.axvline(crossing, color=INK, linewidth=1, linestyle="--")
    axes.text(crossing * 0.95, 0.955, "n = crossover(d, hidden)", ha="right", va="top", fontsize=9, color=INK)
    axes.set_xlabel("n", fontsize=9, color=GREY)
    axes.set_ylabel("share of the operations", fontsize=9, color=GREY)
    axes.set_title(f"one layer, d = {d}, hidden = 4 d", fontsize=10, color=INK)
    axes.tick_params(labelsize=8, colors=GREY)
    return figure
