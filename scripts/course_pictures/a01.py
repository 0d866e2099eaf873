from __future__ import annotations

import math
from typing import Any

import torch
from matplotlib.figure import Figure

from scripts.pictures import GREY, INK, bare


def draw() -> Figure:
    """Scores of six causal queries, the first and the last key padding, and the weights that are left."""
    n = 6
    draw = torch.Generator().manual_seed(4)
    scores = torch.randn(n, n, generator=draw)
    valid = torch.arange(n) < n - 1
    valid[0] = False  # so that query 0 has no key
    allowed = torch.ones(n, n, dtype=torch.bool).tril() & valid
    weights = scores.masked_fill(~allowed, -math.inf).softmax(dim=-1).nan_to_num(0.0)
    figure = Figure(figsize=(7.6, 3.1), dpi=110)
    axes = figure.subplots(1, 3, gridspec_kw={"left": 0.05, "right": 0.975, "top": 0.86, "bottom": 0.13, "wspace": 0.2})
    texts: list[list[list[str]]] = [
        [[f"{x:.1f}" for x in row] for row in scores.tolist()],
        [["" if yes else r"$-\infty$" for yes in row] for row in allowed.tolist()],
        [[f"{x:.2f}" for x in row] for row in weights.tolist()],
    ]
    panels = (
        (scores, "scores  " + r"$q\,k^\top/\sqrt{d}$", {"vmin": -5, "vmax": 5, "cmap": "PuOr"}, "keys"),
        (allowed, "causal, keys 0 and 5 are padding", {"vmin": 0, "vmax": 2.2, "cmap": "Blues"}, "allowed keys: blue"),
        (weights, "weights: each row sums to 1, or 0", {"vmin": 0, "vmax": 2, "cmap": "Blues"}, "out = weights v"),
    )
    for place, (cells, title, colours, below), words in zip(axes, panels, texts, strict=True):
        cells_of(place, cells, words, colours)
        place.set_title(title, fontsize=9, color=INK)
        place.set_xlabel(below, fontsize=9, color=GREY)
    axes[0].set_ylabel("queries", fontsize=9, color=GREY)
    return figure


def cells_of(axes: Any, cells: torch.Tensor, words: list[list[str]], colours: dict[str, Any]) -> None:
    axes.imshow(cells.numpy(), interpolation="nearest", **colours)
    for i, row in enumerate(words):
        for j, word in enumerate(row):
            axes.text(j, i, word, ha="center", va="center", fontsize=8, color=INK)
    bare(axes)
