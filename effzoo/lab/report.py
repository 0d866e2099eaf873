"""What a run leaves behind: result.json, table.md and figure.png in a folder of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effzoo.errors import InputError
from effzoo.lab.experiment import Claim, Experiment, Run
from effzoo.measure.cards import machine, versions
from effzoo.measure.page import markdown
from effzoo.measure.rows import commit
from effzoo.plots import png_bytes
from effzoo.writing import replace_files

RESULT, TABLE, FIGURE = "result.json", "table.md", "figure.png"


def perform(experiment: Experiment, run: Run, folder: Path) -> dict[str, Any]:
    """Run an experiment, write its three files into `folder`, and return what result.json holds."""
    started, used = time.perf_counter(), time.process_time()
    findings = experiment.function(run)
    result = {
        "name": experiment.name, "decks": list(experiment.decks), "about": experiment.about,
        "source": experiment.source, "quick": run.quick,
        "seeds": list(run.seeds), "data": "default" if run.data is None else run.data.name,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - used, 1), "machine": machine(), "versions": versions(),
        "commit": commit(),
        "settings": dict(findings.settings), "tables": {title: table for title, table in findings.tables.items()},
        "claims": [claim.stored() for claim in findings.claims],
        "notes": list(findings.notes), "values": dict(findings.values),
    }  # fmt: skip
    text = json.dumps(result, indent=1, allow_nan=False, default=_refuse) + "\n"
    replace_files(folder, {FIGURE: png_bytes(findings.figure), TABLE: page(result).encode(), RESULT: text.encode()})
    return result


def _refuse(value: Any) -> Any:
    raise InputError(
        f"findings hold numbers, strings, lists and maps, got {type(value).__name__}; an experiment "
        "turns tensors into numbers"
    )


def page(result: Mapping[str, Any]) -> str:
    """The result as Markdown: tables, claims, notes, and how it was made."""
    parts = [f"# {result['name']}", result["about"], f"Source: {result['source']}."]
    for title, table in result["tables"].items():
        parts += [f"**{title}**", markdown(table)]
    if result["claims"]:
        parts.append("\n".join(f"- {Claim.read(claim)}" for claim in result["claims"]))
    parts += [*result["notes"], made(result)]
    return "\n\n".join(parts) + "\n"


def made(result: Mapping[str, Any]) -> str:
    """How a result was made, in a line."""
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    seeds = ", ".join(map(str, result["seeds"]))
    size = "quick" if result["quick"] else "standard"
    return (
        f"{size}; {settings}; seeds {seeds}; data: {result['data']}; {result['seconds']:.0f} s; {result['machine']}, "
        f"torch {result['versions']['torch']}, commit {result['commit']}"
    )
