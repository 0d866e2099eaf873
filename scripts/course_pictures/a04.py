from __future__ import annotations

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from effzoo import plots
from effzoo.course.assignments.a04_blocks.tasks import shifts
from scripts.pictures import GREY, INK, bare


def draw() -> Figure:
    """Two permutations of four blocks, and which blocks know which after one and after two layers."""
    blocks, size = 4, 4
    permutations = shifts(blocks, 2)
    of_heads = [
        torch.zeros(blocks, blocks).index_put((torch.arange(blocks), torch.tensor(p)), torch.ones(()))
        for p in permutations
    ]
    step = (torch.eye(blocks) + sum(of_heads) > 0).float()
    figure = Figure(figsize=(7.6, 2.5), dpi=110)
    axes = figure.subplots(
        1, 4, gridspec_kw={"left": 0.05, "right": 0.985, "top": 0.84, "bottom": 0.12, "wspace": 0.14}
    )
    panels = (
        (of_heads[0], "head 0: p = (0, 1, 2, 3)", "keys, 4 blocks"),
        (of_heads[1], "head 1: p = (1, 2, 3, 0)", "keys, 4 blocks"),
        (step, "after 1 layer", f"reach {float(step.mean()):g}"),
        ((step @ step > 0).float(), "after 2 layers", f"reach {float((step @ step > 0).float().mean()):g}"),
    )
    colours = ListedColormap([plots.COLOURS[plots.NOT], plots.COLOURS[plots.ATTENDED]])
    for place, (cells, title, below) in zip(axes, panels, strict=True):
        whole = cells.repeat_interleave(size, 0).repeat_interleave(size, 1)
        place.imshow(whole.numpy(), cmap=colours, vmin=0, vmax=1, interpolation="nearest")
        for edge in range(size, blocks * size, size):
            place.axhline(edge - 0.5, color="white", linewidth=1)
            place.axvline(edge - 0.5, color="white", linewidth=1)
        place.set_title(title, fontsize=9, color=INK)
        place.set_xlabel(below, fontsize=9, color=GREY)
        bare(place)
    axes[0].set_ylabel("queries", fontsize=9, color=GREY)
    return figure
