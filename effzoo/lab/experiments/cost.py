"""The cost model of a transformer: projections O(n d^2), scaled dot product O(n^2 d), feed-forward O(n d d_h); and the
memory of OPT-1.3B."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from effzoo.lab.analyses.layer_cost import (
    ATTENTION,
    FEED_FORWARD,
    PARTS,
    PROJECTIONS,
    WHOLE,
    counted,
    layer,
    operations,
    seconds,
    shares,
)
from effzoo.lab.draw import LINES, MARKERS, panels
from effzoo.lab.experiment import Claim, Findings, Run, Table, experiment
from effzoo.plans import OPT_SLIDE, OPT_SLIDE_REMARK, opt_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEAD, USUAL = 64, 512  # width of a head; the length of the lecture's table of memory
WIDE = 1024  # the lecture speaks of d > 1K
GIB, GB = 2**30, 10**9
LORA = "lora[rank=8]"


@experiment(
    "cost",
    deck=(4, 0),
    source="Vaswani et al. 2017, arXiv:1706.03762, table 1; Zhang et al. 2022, OPT, arXiv:2205.01068, table 1",
)
def cost(run: Run) -> Findings:
    """Where do the operations, the time and the memory of a transformer go?"""
    dims, lengths = (384, WIDE), run.choose((256, 1024), (256, 512, 1024, 2048))
    layers: list[dict[str, Any]] = []
    for dim, n in itertools.product(dims, lengths):
        by_formula, empty = operations(n, dim), torch.empty(1, n, dim, device="meta")
        with torch.device("meta"):
            exact = counted(layer(dim, dim // HEAD, longest=n), empty) == by_formula
        layers.append({"n": n, "dim": dim, "operations": by_formula, "counted alike": exact, "by seed": []})
    for seed, row in itertools.product(run.seeds, layers):
        torch.manual_seed(seed)
        block, x = layer(row["dim"], row["dim"] // HEAD, longest=row["n"]), torch.randn(1, row["n"], row["dim"])
        row["by seed"].append(seconds(block, x, limit=0.5))
        run.say(f"seed {seed}, d {row['dim']}, n {row['n']}: {1e3 * row['by seed'][-1][WHOLE]:.1f} ms")
    for row in layers:
        row["seconds"] = {name: median(taken[name] for taken in row["by seed"]) for name in (*PARTS, WHOLE)}
    predicted, measured = ([shares(row[what]) for row in layers] for what in ("operations", "seconds"))
    memory, slide = opt_table(peft=LORA).columns, opt_table(peft=LORA, length=USUAL).columns

    table = [["d", "n", *(f"{part}, % of operations: time" for part in PARTS), "layer, ms", "published"]]
    for row, expected, part_shares in zip(layers, predicted, measured, strict=True):
        cells = [f"{100 * expected[part]:.0f}: {100 * part_shares[part]:.0f}" for part in PARTS]
        said = "about half is feed-forward (lecture)" if (row["n"], row["dim"]) == (WIDE, WIDE) else "no number"
        table.append([f"{row['dim']}", f"{row['n']}", *cells, f"{1e3 * row['seconds'][WHOLE]:.1f}", said])

    (wide,) = (row for row in layers if (row["n"], row["dim"]) == (WIDE, WIDE))
    expected, of_seeds = shares(wide["operations"]), [shares(taken) for taken in wide["by seed"]]
    grown = []
    for i in range(len(run.seeds)):
        attended = [[shares(row["by seed"][i])[ATTENTION] for row in layers if row["dim"] == dim] for dim in dims]
        grown.append(min(of_width[-1] - of_width[0] for of_width in attended))
    figure, (left, middle, right) = panels(3, width=4.4, height=3.8)
    _shares(left, layers, measured)
    _seconds(middle, layers, dims[-1])
    _memory(right, memory)
    settings = {
        "d": list(dims), "n": list(lengths), "d_h": "4 d", "head": HEAD, "dtype": "float32",
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    return Findings(
        tables={
            "Shares of a layer": table,
            "Memory of OPT-1.3B, 1 x 512, float16 with float32 copies, AdamW, GB": _memory_table(slide, GB, OPT_SLIDE),
            "The same at 1 x 2048, GiB": _memory_table(memory, GIB, {}),
        },
        figure=figure,
        claims=[
            Claim.law(
                "the formulas are the operations that the layer runs, as torch counts them",
                all(row["counted alike"] for row in layers),
            ),
            Claim.law(
                "at d = n = 1,024 the feed-forward is about half of the operations (40 to 60 %)",
                abs(expected[FEED_FORWARD] - 0.5) <= 0.1,
            ),
            Claim.of_differences(
                "at d = n = 1,024 it is about half of the time",
                [0.1 - abs(part_shares[FEED_FORWARD] - 0.5) for part_shares in of_seeds],
            ),
            Claim.of_differences(
                f"the share of attention in the time grows with n, from {lengths[0]} to {lengths[-1]}, at every width",
                grown,
            ),
            Claim.of_differences(
                "at d = n = 1,024 every part's share of the time is within 10 points of its share of the operations",
                [0.1 - max(abs(part_shares[part] - expected[part]) for part in PARTS) for part_shares in of_seeds],
            ),
        ],
        values={
            "layers": layers,
            "memory": {name: dict(column) for name, column in memory.items()},
            "memory at 512": {name: dict(column) for name, column in slide.items()},
        },
        settings=settings,
        notes=[
            "Shares of operations depend on n / d alone: feed-forward 16 / (24 + 4 n / d), two thirds for short "
            "sequences and half at n = 2 d; attention is as large as the projections there, as large as the "
            "feed-forward at n = 4 d, and more than all the rest above n = 6 d.",
            "The lecture says half for d above 1K, and does not say at which n; here n is d. Time is that of a forward "
            "pass with the fused attention kernel on one sequence. A seed draws weights and the sequence and takes the "
            "median of three rounds or more, in which the parts take turns; the table and the figure show the median "
            "of the seeds.",
            "Hidden states of OPT-1.3B stand there by the lectures' formula in numbers of 2 bytes, as it is and with "
            "the weights of all heads, and "
            "as planned from the real model on shapes: with the fused kernel, and with attention weights written out.",
            OPT_SLIDE_REMARK,
        ],
    )


def _memory_table(memory: Mapping[str, Mapping[str, int]], unit: int, lecture: Mapping[str, str]) -> Table:
    """Every part of each column in a unit of bytes, beside the figures of the lecture where it has some."""
    parts = next(iter(memory.values()))
    rows = [[part, *(f"{of_method[part] / unit:.2f}" for of_method in memory.values())] for part in parts]
    if not lecture:
        return [["part", *memory], *rows]
    return [["part", *memory, "the lecture's, full"], *([*row, lecture.get(row[0], "no number")] for row in rows)]


def _shares(axes: Axes, layers: list[dict[str, Any]], measured: list[dict[str, float]]) -> None:
    ratios = [2 ** (k / 8) for k in range(-20, 53)]
    curves = [[shares({PROJECTIONS: 8, ATTENTION: 4 * r, FEED_FORWARD: 16})[part] for r in ratios] for part in PARTS]
    for part, curve, colour in zip(PARTS, curves, LINES, strict=False):
        axes.plot(ratios, curve, color=colour, linewidth=1.6, label=part)
    for number, dim in enumerate(dict.fromkeys(row["dim"] for row in layers)):
        of_width = [
            (row["n"] / dim, part_shares)
            for row, part_shares in zip(layers, measured, strict=True)
            if row["dim"] == dim
        ]
        for part, colour in zip(PARTS, LINES, strict=False):
            axes.plot(
                [r for r, _ in of_width],
                [x[part] for _, x in of_width],
                linestyle="",
                color=colour,
                marker=MARKERS[number],
                markersize=5,
            )
        axes.plot([], [], linestyle="", color="#666666", marker=MARKERS[number], markersize=5, label=f"time, d = {dim}")
    axes.set_xscale("log", base=2)
    axes.set_xticks([2.0**k for k in range(-2, 7, 2)], ["1/4", "1", "4", "16", "64"])
    axes.set(xlabel="n / d", ylabel="share of the layer", title="lines: operations, marks: time", ylim=(0, 1.02))
    axes.figure.legend(
        *axes.get_legend_handles_labels(), frameon=False, fontsize=9, ncols=6, loc="outside lower center"
    )


def _seconds(axes: Axes, layers: list[dict[str, Any]], dim: int) -> None:
    of_width = [row for row in layers if row["dim"] == dim]
    for number, part in enumerate(PARTS):
        times = [1e3 * row["seconds"][part] for row in of_width]
        axes.plot(
            [row["n"] for row in of_width],
            times,
            color=LINES[number],
            marker=MARKERS[number],
            markersize=5,
            linewidth=1.6,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([row["n"] for row in of_width], [f"{row['n']}" for row in of_width])
    axes.set(xlabel="n", ylabel="milliseconds", title=f"time of the parts, d = {dim}")


def _memory(axes: Axes, memory: Mapping[str, Mapping[str, int]]) -> None:
    stacked = (
        "weights",
        "gradients of trainable parameters",
        "optimizer states",
        "float32 copy",
        "hidden states, planned, fused attention",
    )
    bottom = [0.0] * len(memory)
    for part, colour in zip(stacked, LINES, strict=False):
        heights = [of_method[part] / GIB for of_method in memory.values()]
        axes.bar(
            list(memory),
            heights,
            bottom=bottom,
            color=colour,
            width=0.55,
            label=part.partition(" of ")[0].partition(",")[0],
        )
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axes.set(ylabel="GiB", title="OPT-1.3B, 1 x 2048", ylim=(0, 1.05 * max(bottom)))
    axes.grid(visible=False, axis="x")
    axes.legend(
        *(list(reversed(entries)) for entries in axes.get_legend_handles_labels()),
        frameon=False,
        fontsize=8,
        loc="upper right",
    )
