"""`effzoo check`: the contract of what a file registers, or of a registered name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from effzoo import checks
from effzoo.checks import Report, Result
from effzoo.cli.terminal import app, heading, say
from effzoo.errors import OptionError, UnknownNameError
from effzoo.registry import View, attention, load_file, peft, scope
from effzoo.spec import parse_one

VIEWS = {"attention": attention, "peft": peft}
MARKS = {"green": ("ok ", "green"), "red": ("RED", "bold red"), "skipped": ("-  ", "yellow"), "not run": ("?  ", "yellow")}
FIX = """    from effzoo.attention import AttentionCore, register

    @register("mine")
    class Mine(AttentionCore): ..."""


@app.command()
def check(
    target: Annotated[str, typer.Argument(help='A Python file, or a registered name or spec such as "longformer\\[window=4]".')],
    only: Annotated[list[str] | None, typer.Option(help="Run this check alone (its name is beside a red line); may be repeated.")] = None,
) -> None:
    """Check that attention kinds and fine-tuning methods keep their contract.

    A file is run, and everything it registers is checked: against its own definition, with padding, causality and memory, and inside
    models. The exit code is 0 when nothing is red and 1 otherwise.

    Example:  effzoo check mine.py
    """
    with scope():
        entries = _entries(target)
        wanted = _wanted(only, [kind for kind, _ in entries])
        reports = [_check(kind, name, wanted[kind]) for kind, name in entries if kind in wanted]
    red = [report for report in reports if not report.ok]
    if red:
        say("", Text(f"{', '.join(f'{report.kind} {report.subject}' for report in red)}: the contract is broken", style="bold red"))
        raise typer.Exit(1)
    say("", Text("everything holds", style="bold green"))


def _entries(target: str) -> list[tuple[str, str]]:
    """The (kind, name) pairs to check; of aliases, the first name."""
    path = Path(target)
    if path.suffix == ".py" or path.is_file():
        found = load_file(path)
        if not found:
            raise OptionError(f"{target} registers nothing, so there is nothing to check. Put a decorator before your class:\n\n{FIX}\n")
        return list(dict.fromkeys((kind, VIEWS[kind].get(name).name) for kind, name in found if kind in VIEWS))
    name = parse_one(target).name
    kinds = [kind for kind, view in VIEWS.items() if name in _names(view)]
    if not kinds:
        raise UnknownNameError("attention kind, method or file", name, sorted(set().union(*map(_names, VIEWS.values()))))
    return [(kind, target) for kind in kinds]


def _wanted(only: list[str] | None, kinds: list[str]) -> dict[str, list[str] | None]:
    """The checks to run of each kind, all or those asked for; kinds without any of those are left out."""
    if only is None:
        return dict.fromkeys(kinds)
    known = {kind: {check.__name__ for check in checks.KINDS[kind]} for kind in kinds}
    for name in only:
        if not any(name in names for names in known.values()):
            raise UnknownNameError("check", name, set().union(*known.values()))
    return {kind: [name for name in only if name in names] for kind, names in known.items() if names & set(only)}


def _check(kind: str, name: str, only: list[str] | None) -> Report:
    say(heading(f"{kind} {name}"))
    report = checks.check(kind, name, only=only, on_result=_tell)
    say(f"{report.summary()} in {sum(result.seconds for result in report.results):.1f} s, checked as {report.subject}")
    return report


def _tell(result: Result) -> None:
    mark, style = MARKS[result.status]
    red = result.status == "red"
    line = Text(result.label, style="bold" if red else "").append(f"  ({result.check})" if red else "", style="dim not bold")
    row = Table.grid(padding=(0, 1, 0, 0))
    row.add_row(Text(mark, style=style), line)
    if result.reason:
        row.add_row("", Text(result.reason, style="red" if red else "dim"))
    say(row)


def _names(view: View[object]) -> set[str]:
    return {name for first in view.names() for name in (first, *view.aliases(first))}
