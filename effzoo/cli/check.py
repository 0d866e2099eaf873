"""`effzoo check`: the contract of what a file registers, or of a registered name."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from effzoo import checks
from effzoo.checks import Report, Result
from effzoo.cli.terminal import app, heading, pairs, say
from effzoo.errors import OptionError, UnknownNameError, listing
from effzoo.registry import View, attention, load_file, peft, scope
from effzoo.spec import parse_one

VIEWS = {"attention": attention, "peft": peft}
MARKS = {
    "green": ("ok ", "green"),
    "red": ("RED", "bold red"),
    "skipped": ("-  ", "yellow"),
    "not run": ("?  ", "yellow"),
}
TRACE = 12  # lines of a traceback that are shown
FIX = """    from effzoo.attention import AttentionCore, register

    @register("mine")
    class Mine(AttentionCore): ..."""


@app.command()
def check(
    target: Annotated[
        str, typer.Argument(help='A Python file, or a registered name or spec such as "longformer\\[window=4]".')
    ],
    only: Annotated[
        list[str] | None, typer.Option(help="Run this check alone (its name is beside a red line); may be repeated.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document instead: every check with status, reason, cause.")
    ] = False,
) -> None:
    """Check that attention kinds and fine-tuning methods keep their contract.

    A file is run, and everything it registers is checked: against its own definition, with padding, causality and
    memory, for its cost, and inside models. Of the first failure you are told what happened, the likely cause and how
    to see it. The exit code is 0 when nothing is red, 1 when something is, and 2 when there is nothing to check (no
    such file, a name that does not exist).

    Example:  effzoo check mine.py
    """
    with scope():
        entries = _entries(target)
        wanted = _wanted(only, [kind for kind, _ in entries])
        run = _silently if as_json else _check
        reports = [run(kind, name, wanted[kind]) for kind, name in entries if kind in wanted]
    red = [report for report in reports if not report.ok]
    if as_json:
        typer.echo(json.dumps(_document(target, reports), indent=2))
    elif red:
        _explain(target, red[0])
        say(
            "",
            Text(
                f"{', '.join(f'{report.kind} {report.subject}' for report in red)}: the contract is broken",
                style="bold red",
            ),
        )
    else:
        say("", Text("everything holds", style="bold green"))
    if red:
        raise typer.Exit(1)


def _entries(target: str) -> list[tuple[str, str]]:
    """The (kind, name) pairs to check; of aliases, the first name."""
    path = Path(target)
    if path.suffix == ".py" or path.is_file():
        entered = load_file(path)
        if not entered:
            raise OptionError(
                f"{target} registers nothing, so there is nothing to check. Put a decorator before "
                f"your class:\n\n{FIX}\n"
            )
        entries = list(dict.fromkeys((kind, VIEWS[kind].get(name).name) for kind, name in entered if kind in VIEWS))
        if not entries:
            registered = listing(f"{kind} {name!r}" for kind, name in entered)
            raise OptionError(
                f"{target} registers {registered}; there are checks for {listing(VIEWS)}, and none for "
                "what is registered here"
            )
        return entries
    name = parse_one(target).name
    kinds = [kind for kind, view in VIEWS.items() if name in _names(view)]
    if not kinds:
        raise UnknownNameError(
            "attention kind, method or file", name, sorted(set().union(*map(_names, VIEWS.values())))
        )
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


def _silently(kind: str, name: str, only: list[str] | None) -> Report:
    return checks.check(kind, name, only=only)


def _tell(result: Result) -> None:
    mark, style = MARKS[result.status]
    red = result.status == "red"
    line = Text(result.label, style="bold" if red else "").append(
        f"  ({result.check})" if red else "", style="dim not bold"
    )
    row = Table.grid(padding=(0, 1, 0, 0))
    row.add_row(Text(mark, style=style), line)
    if result.reason:
        row.add_row("", Text(result.reason, style="red" if red else "dim"))
    say(row)


def _explain(target: str, report: Report) -> None:
    """The first failure: what happened, the likely cause, how to see it."""
    first = report.failures[0]
    say("", Text(f"the first failure, {first.check}", style="bold"))
    see = "the traceback below" if first.trace else first.see
    lines = [
        ("what happened", first.happened),
        ("likely cause", first.cause),
        ("how to see it", see),
        ("this alone", _again(target, first.check)),
    ]
    say(pairs([(name, text) for name, text in lines if text]))
    if first.trace:
        say("", Text("\n".join(first.trace.splitlines()[-TRACE:]), style="dim"))


def _again(target: str, check: str) -> str:
    """The command that runs one check again."""
    given = f'"{target}"' if set(target) & set(" []|()") else target
    return f"effzoo check {given} --only {check}"


def _document(target: str, reports: list[Report]) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "target": target,
        "ok": all(report.ok for report in reports),
        "reports": [
            {
                "kind": report.kind,
                "subject": report.subject,
                "ok": report.ok,
                "first_failure": report.failures[0].check if report.failures else None,
                "checks": [
                    {**asdict(result), "ok": result.ok, "happened": result.happened, "cause": result.cause}
                    for result in report.results
                ],
            }
            for report in reports
        ],
    }


def _names(view: View[object]) -> set[str]:
    return {name for first in view.names() for name in (first, *view.aliases(first))}
