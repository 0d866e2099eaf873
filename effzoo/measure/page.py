"""Results as tables to read (Markdown) and as one HTML page that holds its figures."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from effzoo.measure.prediction import crossover
from effzoo.measure.rows import Row
from effzoo.measure.scaling import crossovers
from effzoo.plots import png_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = list[list[str]]  # the first row is the head


def scaling_table(rows: Sequence[Row], mode: str) -> Table:
    """Milliseconds of each kind at each length, with the crossover."""
    chosen = [row for row in rows if row["mode"] == mode]
    lengths = sorted({row["n"] for row in chosen})
    crossing = crossovers(list(chosen))
    table = [["attention", *(f"{n:,}" for n in lengths), "faster than full from"]]
    for kind in dict.fromkeys(row["attention"] for row in chosen):
        by = {row["n"]: row for row in chosen if row["attention"] == kind}
        if not any("seconds" in row for row in by.values()):
            continue
        crossing_at = crossing.get((kind, mode))
        table.append(
            [f"`{kind}`", *(_cell(by.get(n)) for n in lengths), "" if kind == "full" else _length(crossing_at)]
        )
    return table


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if "seconds" not in row:
        return str(row.get("failed", ""))
    ratio = f" ({row['ratio']:.2f})" if "ratio" in row and row["attention"] != "full" else ""
    return f"{short(1000 * row['seconds'])}{ratio}"


def short(value: float) -> str:
    """Four digits at most, or a whole number."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _length(n: int | None) -> str:
    return "nowhere" if n is None else f"{n:,}"


def finetune_table(rows: Sequence[Row]) -> Table:
    """A row for each kind and method: time of a step, tokens a second, peak and saved memory, trained parameters."""
    table = [["attention", "method", "ms a step", "of full", "tokens / s", "peak MiB", "saved MiB", "trained"]]
    for row in rows:
        if "seconds" not in row:
            table.append([f"`{row['attention']}`", f"`{row['peft']}`", str(row.get("failed", "")), "", "", "", "", ""])
            continue
        table.append([
            f"`{row['attention']}`", f"`{row['peft']}`", f"{1000 * row['seconds']:,.0f}",
            f"{row['ratio']:.2f}" if "ratio" in row else "",
            f"{row['tokens_per_second']:,.0f}", f"{row['peak_bytes'] / 2**20:,.0f}",
            f"{sum(row['saved'].values()) / 2**20:,.1f}", f"{row['trainable']:,}",
        ])  # fmt: skip
    return table


def crossover_table(rows: Sequence[Row]) -> Table:
    """Of predicted rows: from which length on each kind is faster than full attention, and by how much at the
    longest."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    longest = max(row["n"] for row in rows)
    table = [
        [
            "attention",
            *(f"{mode}, faster from" for mode in modes),
            *(f"{mode}, of full at {longest:,}" for mode in modes),
        ]
    ]
    for kind in dict.fromkeys(row["attention"] for row in rows if row["attention"] != "full"):
        by = {row["mode"]: row for row in rows if row["attention"] == kind and row["n"] == longest}
        crossings = {mode: crossover(rows, kind, mode) for mode in modes if mode in by}
        cells = ["cannot" if mode not in by else _length(crossings[mode]) for mode in modes]
        table.append([f"`{kind}`", *cells, *(f"{by[mode]['ratio']:.3f}" if mode in by else "" for mode in modes)])
    return table


def markdown(table: Table) -> str:
    """The table as Markdown."""
    head, *body = table
    return (
        "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])
        .replace("| --- |", "|---|")
        .replace(" --- |", "---|")
    )


def page(title: str, about: str, parts: Mapping[str, Table | Figure]) -> str:
    """An HTML page without anything outside it: tables, and figures as PNG."""
    lines = [
        "<!doctype html>", f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>',
        "body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: "
        "#222; }",
        "table { border-collapse: collapse; font-size: 13px; } td, th { padding: .25rem .6rem; border-bottom: 1px "
        "solid #ddd; text-align: right; }",
        "td:first-child, th:first-child { text-align: left; } img { max-width: 100%; } h2 { margin-top: 2.5rem; "
        "font-size: 1.15rem; }",
        "</style></head><body>", f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(about)}</p>",
    ]  # fmt: skip
    for name, part in parts.items():
        lines.append(f"<h2>{html.escape(name)}</h2>")
        if isinstance(part, list):
            lines.append("<table>")
            for place, row in enumerate(part):
                tag = "td" if place else "th"
                lines.append(
                    "<tr>" + "".join(f"<{tag}>{html.escape(cell.strip('`'))}</{tag}>" for cell in row) + "</tr>"
                )
            lines.append("</table>")
        else:
            lines.append(
                f'<img alt="{html.escape(name)}" '
                f'src="data:image/png;base64,{base64.b64encode(png_bytes(part)).decode()}">'
            )
    return "\n".join([*lines, "</body></html>", ""])
