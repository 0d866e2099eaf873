"""The cost model of a transformer: projections O(n d^2), scaled dot product O(n^2 d), feed-forward O(n d d_h); and the
memory of OPT-1.3B."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
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

HEAD, USUAL = 64, 512  # width of a head; the length that BERT is trained on
GIB, GB = 2**30, 10**9
LORA = "lora[rank=8]"


@experiment(
    "cost",
    deck=(4, 0),
    source="Vaswani et al. 2017, arXiv:1706.03762, table 1; Zhang et al. 2022, OPT, arXiv:2205.01068, table 1",
)
def cost(run: Run) -> Findings:
    """Where do the operations, the time and the memory of a transformer go?"""
    dims = run.choose((128, 384), (128, 384, 768))
    lengths = run.choose((128, 512, 2048, 4096), (128, 512, 2048, 4096, 8192))
    layers: list[dict[str, Any]] = []
    for dim in dims:
        block = layer(dim, dim // HEAD, longest=max(lengths))
        for n in lengths:
            x = torch.randn(1, n, dim, generator=torch.Generator().manual_seed(0))
            taken = seconds(block, x, limit=run.choose(2.0, 30.0))
            by_formula = operations(n, dim)
            with torch.device("meta"):
                exact = counted(layer(dim, dim // HEAD, longest=n), x.to("meta")) == by_formula
            layers.append({"n": n, "dim": dim, "operations": by_formula, "counted alike": exact, "seconds": taken})
            run.say(f"d {dim}, n {n}: {1e3 * taken[WHOLE]:.1f} ms")
    predicted, measured = ([shares(row[what]) for row in layers] for what in ("operations", "seconds"))
    memory, slide = opt_table(peft=LORA).columns, opt_table(peft=LORA, length=USUAL).columns

    table = [["d", "n", *(f"{part}, % of operations: time" for part in PARTS), "layer, ms", "published"]]
    for row, expected, part_shares in zip(layers, predicted, measured, strict=True):
        cells = [f"{100 * expected[part]:.0f}: {100 * part_shares[part]:.0f}" for part in PARTS]
        said = "about half is feed-forward (lecture)" if row["n"] == USUAL else "no number"
        table.append([f"{row['dim']}", f"{row['n']}", *cells, f"{1e3 * row['seconds'][WHOLE]:.1f}", said])

    attended = [
        [part_shares[ATTENTION] for row, part_shares in zip(layers, measured, strict=True) if row["dim"] == dim]
        for dim in dims
    ]
    grows = all(a < b for of_width in attended for a, b in itertools.pairwise(of_width))
    half = [part_shares[FEED_FORWARD] for row, part_shares in zip(layers, measured, strict=True) if row["n"] == USUAL]
    away = max(
        abs(expected[part] - part_shares[part])
        for expected, part_shares in zip(predicted, measured, strict=True)
        for part in PARTS
    )
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
            Claim(
                "the formulas are the operations that the layer runs, as torch counts them",
                (all(row["counted alike"] for row in layers),),
            ),
            Claim(
                f"at n = {USUAL} the feed-forward is about half of the time (40 to 60 %), at every width",
                (all(0.4 <= x <= 0.6 for x in half),),
            ),
            Claim("the share of attention in the time grows with n at every width", (grows,)),
            Claim("every part's share of the time is within 10 points of its share of the operations", (away <= 0.1,)),
        ],
        values={
            "layers": layers,
            "largest distance of a share": away,
            "memory": {name: dict(column) for name, column in memory.items()},
            "memory at 512": {name: dict(column) for name, column in slide.items()},
        },
        settings=settings,
        notes=[
            "Shares of operations depend on n / d alone: feed-forward 16 / (24 + 4 n / d), two thirds for short "
            "sequences and half at n = 2 d; attention is as large as the projections there, as large as the "
            "feed-forward at n = 4 d, and more than all the rest above n = 6 d.",
            "Time is that of a forward pass with the fused attention kernel, on this machine now; other work on it "
            "disturbs the shortest times most.",
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
