"""`effzoo matrix`: which fine-tuning method works on which attention kind, tried and not remembered."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from effzoo.checks.matrix import ARCHITECTURES, Cell, Matrix, candidates
from effzoo.checks.matrix import matrix as tried
from effzoo.cli.terminal import app, console, say, table
from effzoo.errors import UnknownNameError
from effzoo.registry import View, attention, load_file, peft, scope
from effzoo.writing import replace_file

MARKS = {"works": "+", "refused": "-", "fails": "X"}


@app.command()
def matrix(
    method: Annotated[
        list[str] | None, typer.Option(help="A fine-tuning method; may be repeated. Default: all.")
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option("--attention", help="An attention kind; may be repeated. Default: all.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="A Python file whose attention kinds and methods take part.")
    ] = None,
    experts: Annotated[
        bool, typer.Option("--experts", help="Try every method as an expert: routed\\[of=METHOD, experts=2].")
    ] = False,
    save: Annotated[Path | None, typer.Option(help="Also write every cell to this JSON file.")] = None,
) -> None:
    """Try every fine-tuning method on every attention kind, on tiny models.

    Tried is to attach, train, save, load, combine, merge and detach. Each cell has five marks, for an encoder, a
    decoder, a reversible model, an encoder-decoder (the kind in its encoder) and a Perceiver: + works, - is refused
    with a reason (listed below the table), X fails. The exit code is 1 when something fails.

    Example:  effzoo matrix --method lora --method prefix
    """
    with scope():
        if file is not None:
            load_file(file)
        methods, kinds = _chosen(peft, method) if method else candidates(experts), _chosen(attention, kind)
        with Progress(
            BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), console=console(), transient=True
        ) as bar:
            task = bar.add_task("", total=len(methods) * len(kinds) * len(ARCHITECTURES))
            result = tried(
                methods,
                kinds,
                experts=experts,
                on_cell=lambda cell: bar.update(task, advance=1, description=f"{cell.method} on {cell.attention}"),
            )
    say(_table(result, methods, kinds), f"\nmarks: {', '.join(ARCHITECTURES)};  + works, - refused, X fails")
    for reason, cells in result.refusals().items():
        say("", Text(f"refused ({len(cells)}): {_where(cells)}", style="yellow"), Text(reason, style="dim"))
    failing = [cell for cell in result.cells if cell.status == "fails"]
    for cell in failing:
        say("", Text(f"FAILS: {cell.method} on {cell.attention}, {cell.architecture}", style="bold red"), cell.reason)
    if save is not None:
        replace_file(save, (json.dumps([asdict(cell) for cell in result.cells], indent=0) + "\n").encode())
        say(f"\nwrote {save}")
    if failing:
        raise typer.Exit(1)


def _chosen(view: View[Any], names: list[str] | None) -> list[str]:
    for name in names or ():
        if name not in view.names():
            raise UnknownNameError(view.kind, name, view.names())
    return names or view.names()


def _table(result: Matrix, methods: list[str], kinds: list[str]) -> Table:
    listed = table("method", *kinds)
    for method in methods:
        statuses = [[result.cell(method, kind, name).status for name in ARCHITECTURES] for kind in kinds]
        cells = [Text("".join(MARKS[status] for status in of_kind)) for of_kind in statuses]
        for cell in cells:
            cell.highlight_regex(r"\+", "green")
            cell.highlight_regex("X", "bold red")
        listed.add_row(Text(method), *cells)
    return listed


def _where(cells: list[Cell]) -> str:
    """The methods, kinds and architectures of some cells, each once; "every method" and so on when it is all."""
    said = []
    for what, names, everything in (
        ("method", {c.method for c in cells}, set(peft.names())),
        ("attention kind", {c.attention for c in cells}, set(attention.names())),
        ("architecture", {c.architecture for c in cells}, set(ARCHITECTURES)),
    ):
        said.append(f"every {what}" if names == everything and len(names) > 1 else ", ".join(sorted(names)))
    return "; ".join(said)
