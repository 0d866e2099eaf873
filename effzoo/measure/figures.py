"""Figures of the suites: time and memory against the length, ratios to full attention with the crossover, cost of a
step by method."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from effzoo.attention import get
from effzoo.errors import InputError
from effzoo.measure.page import short
from effzoo.measure.rows import Row
from effzoo.measure.scaling import REFERENCE
from effzoo.plots import LINES, MARKERS
from effzoo.spec import parse_one

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PASSES = {"forward": "forward", "train": "forward and backward", "decode": "one token of cached decoding"}


def against_length(rows: Sequence[Row], mode: str, what: str = "seconds") -> Figure:
    """Time ("seconds"), memory ("peak_bytes") or the ratio to full attention ("ratio") of each kind against n, log-log.

    Grey lines have the slope that theory gives: 1 for kinds whose cost is linear in n, 2 for n^2. Bars are quartiles
    over the rounds.
    """
    from matplotlib.figure import Figure

    labels = {"seconds": "milliseconds", "peak_bytes": "peak memory, MiB", "ratio": "time, in times of full attention"}
    if what not in labels:
        raise InputError(f"what is one of {', '.join(labels)}, got {what!r}")
    factor = {"seconds": 1e3, "peak_bytes": 2.0**-20, "ratio": 1.0}[what]
    series = _series([row for row in rows if row["mode"] == mode], what)
    if not series:
        raise InputError(f"no row of mode {mode!r} has {what!r}")
    styles = _styles(list(dict.fromkeys(row["attention"] for row in rows)))
    figure = Figure(figsize=(7.4, 4.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for kind, points in series.items():
        colour, marker = styles[kind]
        if what == "ratio" and kind == REFERENCE:
            continue
        values = [factor * row[what] for row in points]
        axes.plot(
            [row["n"] for row in points], values, color=colour, marker=marker, markersize=4.5, linewidth=1.6, label=kind
        )
        quartiles = {"seconds": "quartiles", "ratio": "ratio_quartiles"}.get(what)
        if quartiles:
            low, high = zip(*(row[quartiles] for row in points), strict=True)
            errors = [
                [max(0.0, v - factor * q) for v, q in zip(values, low, strict=True)],
                [max(0.0, factor * q - v) for v, q in zip(values, high, strict=True)],
            ]
            axes.errorbar(
                [row["n"] for row in points], values, yerr=errors, color=colour, linewidth=1, fmt="none", capsize=2
            )
    if what == "ratio":
        axes.axhline(1.0, color="#666666", linewidth=1.0, linestyle="--")
        axes.annotate(
            "full attention",
            (min(row["n"] for row in rows), 1.0),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8,
            color="#666666",
        )
    elif mode != "decode":
        _slopes(axes, series, what, factor)
    _length_axes(axes, sorted({row["n"] for points in series.values() for row in points}))
    axes.set(ylabel=labels[what], title=_title(rows, PASSES[mode]))
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure


def of_methods(rows: Sequence[Row], what: str = "seconds") -> Figure:
    """Time of a training step ("seconds") or what autograd keeps of it ("saved"), a panel per attention kind and a bar
    per method."""
    from matplotlib.figure import Figure

    label = {"seconds": "milliseconds a step", "saved": "saved activations, MiB"}[what]
    kinds = list(dict.fromkeys(row["attention"] for row in rows))
    methods = list(dict.fromkeys(row["peft"] for row in rows))
    value_of = {(row["attention"], row["peft"]): _value(row, what) for row in rows}
    figure = Figure(figsize=(2.0 + 1.5 * len(kinds), 0.6 + 0.26 * len(methods) + 0.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, sharex=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        values = [value_of.get((kind, method)) for method in methods]
        axes.barh(methods, [value or 0 for value in values], color=LINES[0], height=0.7)
        for place, value in enumerate(values):
            if value is None:
                axes.text(0, place, " refused", va="center", fontsize=7, color="#666666")
        axes.set_title(kind.replace("[", "\n["), fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.supxlabel(label, fontsize=9)
    return figure


def _value(row: Mapping[str, Any], what: str) -> float | None:
    if "failed" in row or "seconds" not in row:
        return None
    return float(sum(row["saved"].values()) / 2**20) if what == "saved" else 1000.0 * float(row["seconds"])


def _styles(kinds: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each kind, the same in every figure of the rows; full attention is black."""
    colours, markers = itertools.cycle((*LINES[:-1], "#888888")), itertools.cycle(MARKERS)
    return {kind: (LINES[-1], "o") if kind == REFERENCE else (next(colours), next(markers)) for kind in kinds}


def _series(rows: Sequence[Row], what: str) -> dict[str, list[Row]]:
    """The rows that have the value, by kind, in the order of the lengths; of a case that was measured again, the
    last."""
    series: dict[str, list[Row]] = {}
    last = {(row["attention"], row["n"]): row for row in rows}
    for row in sorted(last.values(), key=lambda row: row["n"]):
        if row.get(what) is not None:
            series.setdefault(row["attention"], []).append(row)
    order = list(dict.fromkeys(row["attention"] for row in rows))
    return {kind: series[kind] for kind in order if kind in series}


def _slopes(axes: Axes, series: Mapping[str, list[Row]], what: str, factor: float) -> None:
    """A grey line of slope 1 and one of slope 2 through the last point of the dearest kind of each cost, for the
    eye."""
    for slope in (1, 2):
        ends = [points[-1] for kind, points in series.items() if _exponent(kind) == slope and len(points) > 2]
        if not ends or (what == "peak_bytes" and slope == 2):  # flash attention keeps no scores
            continue
        end = max(ends, key=lambda row: row[what] / row["n"] ** slope)
        first = min(row["n"] for points in series.values() for row in points)
        lengths = [first, end["n"]]
        axes.plot(
            lengths,
            [factor * end[what] * (n / end["n"]) ** slope for n in lengths],
            color="#bbbbbb",
            linewidth=1.0,
            zorder=0,
        )
        axes.annotate(
            f"slope {slope}",
            (lengths[0], factor * end[what] * (first / end["n"]) ** slope),
            fontsize=7,
            color="#888888",
        )


def _exponent(kind: str) -> int:
    """Of n in the kind's declared cost."""
    return 2 if get(parse_one(kind).name).cost.replace(" ", "").startswith("n^2") else 1


def _length_axes(axes: Axes, lengths: Sequence[int]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(lengths), [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("length n")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#dddddd", linewidth=0.6, which="major")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _title(rows: Sequence[Row], what: str) -> str:
    row = rows[0]
    return f"{what}, d = {row['dim']}, {row['heads']} heads, batch {row['batch']}, {row['dtype']}\n{row['machine']}"
