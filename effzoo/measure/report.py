"""What a suite leaves beside its rows: figures as PNG, and one HTML page with the tables and the figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from effzoo.errors import InputError
from effzoo.measure import figures
from effzoo.measure.page import Table, finetune_table, page, scaling_table
from effzoo.measure.rows import Row
from effzoo.plots import png_bytes
from effzoo.writing import replace_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write(rows: Sequence[Row], folder: Path) -> Path:
    """Write `index.html` and the figures of the rows of one suite to a folder; the page's path. Raises InputError when
    there is nothing to show."""
    suites = {row["suite"] for row in rows if "seconds" in row}
    if len(suites) != 1:
        raise InputError(
            f"a report shows one suite, and needs rows with times; got {', '.join(sorted(suites)) or 'none'}"
        )
    suite = suites.pop()
    parts = _scaling(rows) if suite == "scaling" else _finetune(rows)
    figures = {name: part for name, part in parts.items() if not isinstance(part, list)}
    files = {f"{name.replace(', ', '_').replace(' ', '_')}.png": png_bytes(figure) for name, figure in figures.items()}
    made = sorted(
        {f"{row['machine']}, torch {row['versions']['torch']}, commit {row['commit'] or 'unknown'}" for row in rows}
    )
    replace_files(folder, files | {"index.html": page(f"effzoo bench {suite}", "; ".join(made), parts).encode()})
    return folder / "index.html"


def _scaling(rows: Sequence[Row]) -> dict[str, Table | Figure]:
    parts: dict[str, Table | Figure] = {}
    for mode in dict.fromkeys(row["mode"] for row in rows):
        if not any("seconds" in row for row in rows if row["mode"] == mode):
            continue
        parts[f"{mode}, milliseconds (in times of full attention)"] = scaling_table(rows, mode)
        parts[f"{mode}, time"] = figures.against_length(rows, mode)
        if any("ratio" in row and row["attention"] != "full" for row in rows if row["mode"] == mode):
            parts[f"{mode}, ratio"] = figures.against_length(rows, mode, "ratio")
        if any(row.get("peak_bytes") for row in rows if row["mode"] == mode):
            parts[f"{mode}, memory"] = figures.against_length(rows, mode, "peak_bytes")
    return parts


def _finetune(rows: Sequence[Row]) -> dict[str, Table | Figure]:
    return {
        "one training step": finetune_table(rows),
        "time of a step": figures.of_methods(rows),
        "saved activations": figures.of_methods(rows, "saved"),
    }
