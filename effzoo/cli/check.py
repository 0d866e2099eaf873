"""`effzoo check`: the contract of what a file registers, or of a registered name."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from effzoo import checks
from effzoo.arguments import number, whole
from effzoo.checks import Report, Result
from effzoo.checks.against import Reference, read
from effzoo.checks.apart import Limits, check_apart
from effzoo.checks.server import ready
from effzoo.cli import terminal
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
UNVERIFIED = 4  # the exit code where nothing is red, and nothing was compared
LACKS = {
    "attention": "Write `pattern(n, mask)`, which keys a query sees, or `dense`, the formula in O(n^2), or give "
    "--against an entry that it must equal, or a file with the function dense.",
    "peft": "Write `delta(weight, bias)`, the change of the weight, where there is one, or give --against a method "
    "that it must equal, or a file with the function dense.",
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
    against: Annotated[
        str | None,
        typer.Option(
            help='What the numbers must equal, whatever the file says: an entry such as "longformer\\[window=8]", or a '
            "file with a function dense, FILE.py or FILE.py:NAME."
        ),
    ] = None,
    spec: Annotated[
        str | None, typer.Option(help='Which entry of the file, with its options: "mine\\[window=4]"; default: all.')
    ] = None,
    own: Annotated[
        bool, typer.Option("--own", help="Refuse what derives from a registered entry, or calls one or the definition.")
    ] = False,
    apart: Annotated[
        bool,
        typer.Option(
            "--apart", help="Run the file in a process of its own, and compare its numbers here: for grading."
        ),
    ] = False,
    seconds: Annotated[float, typer.Option(help="With --apart, how long that process may run.")] = 120.0,
    gigabytes: Annotated[float, typer.Option(help="With --apart, how much it may allocate.")] = 12.0,
    seed: Annotated[int, typer.Option(help="Of the lengths, widths, paddings and values that --against draws.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document instead: every check with status, reason, cause.")
    ] = False,
) -> None:
    """Check that attention kinds and fine-tuning methods keep their contract.

    A file is run, and everything it registers is checked: against its own definition, with padding, causality and
    memory, for its cost, and inside models. Of the first failure you are told what happened, the likely cause and how
    to see it. The exit code is 0 when nothing is red, 1 when something is, 2 when there is nothing to check (no such
    file, a name that does not exist), and 4 when nothing is red, but no definition says what the numbers must be.

    With --against, a reference that the file cannot edit says what the numbers must be, on drawn lengths, widths,
    paddings, global tokens and seeds; for a fine-tuning method both get the same factors.

    Example:  effzoo check mine.py --against "longformer\\[window=8]"
    """
    whole("--seed", seed, least=0, most=2**31)
    for name, value in (("--seconds", seconds), ("--gigabytes", gigabytes)):
        number(name, value, "a number above 0, at most 1,000,000", lambda x: 0 < x <= 1e6)
    with in_forks() if apart else nullcontext(), scope():
        reference = None if against is None else read(against, seed=seed)
        if apart:
            limits = Limits(seconds, gigabytes)
            reports = _apart(target, only, reference, spec, own, limits, as_json)
        else:
            reports = _here(target, only, reference, spec, own, as_json)
    red = [report for report in reports if not report.ok]
    if as_json:
        typer.echo(json.dumps(_document(target, reports), indent=2))
    elif red:
        more = [*(["--against", against] if against else []), *(["--spec", spec] if spec else []), *["--own"] * own]
        _explain(target, red[0], more)
        say(
            "",
            Text(
                f"{', '.join(f'{report.kind} {report.subject}' for report in red)}: the contract is broken",
                style="bold red",
            ),
        )
    elif unverified := [report for report in reports if only is None and not report.verified]:
        named = ", ".join(f"{report.kind} {report.subject}" for report in unverified)
        say("", f"{named}: nothing is red, but no definition says what the numbers must be", LACKS[unverified[0].kind])
        say(Text("not verified: nothing to compare with", style="bold yellow"))
    elif only is not None:
        say("", Text("what was asked for holds", style="bold green"))
    else:
        compared = "; ".join(f"{report.subject} equals {report.compared_with}" for report in reports)
        say("", Text(f"everything holds: {compared}", style="bold green"))
    if red:
        raise typer.Exit(1)
    if only is None and not all(report.verified for report in reports):
        raise typer.Exit(UNVERIFIED)


def in_forks() -> AbstractContextManager[None]:
    """Run files in forks of this process, where it is the command's alone: no file waits for torch to be imported."""
    return ready(fork=True) if terminal.fresh else nullcontext()


def _here(
    target: str, only: list[str] | None, reference: Reference | None, spec: str | None, own: bool, as_json: bool
) -> list[Report]:
    """The reports of a target, in this process."""
    entries = _entries(target)
    if spec is not None:
        entries = [(kind, spec) for kind, name in entries if name == parse_one(spec).name]
        if not entries:
            raise UnknownNameError("entry", spec, [name for _, name in _entries(target)])
    if reference is not None:
        entries = [(kind, name) for kind, name in entries if kind == reference.kind]
        if not entries:
            raise OptionError(f"{target} has nothing of {reference.kind}, which {reference.text} is")
    wanted = _wanted(only, [kind for kind, _ in entries], reference is not None, own)
    run = _silently if as_json else _check
    return [run(kind, name, only=wanted[kind], against=reference, own=own) for kind, name in entries if kind in wanted]


def _apart(
    target: str, only: list[str] | None, reference: Reference | None, spec: str | None, own: bool, limits: Limits,
    as_json: bool,
) -> list[Report]:  # fmt: skip
    """The reports of a file that runs in a process of its own."""
    if not Path(target).is_file():
        raise OptionError(f"--apart runs a file, and {target} is none")
    kinds = list(VIEWS) if reference is None else [reference.kind]
    names = _wanted(only, kinds, False, own)
    every = {kind: checks.checks_of(kind, False, own) for kind in names}
    chosen = {
        kind: [one for one in every[kind] if (names[kind] or [one.__name__]).count(one.__name__)] for kind in names
    }
    reports = check_apart(target, chosen, reference=reference, spec=spec, limits=limits)
    for report in [] if as_json else reports:
        say(heading(f"{report.kind} {report.subject}"))
        for result in report.results:
            _tell(result)
    return reports


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


def _wanted(only: list[str] | None, kinds: list[str], against: bool, own: bool) -> dict[str, list[str] | None]:
    """The checks to run of each kind, all or those asked for; kinds without any of those are left out."""
    if only is None:
        return dict.fromkeys(kinds)
    known = {kind: {check.__name__ for check in checks.checks_of(kind, against, own)} for kind in kinds}
    for name in only:
        if not any(name in names for names in known.values()):
            raise UnknownNameError("check", name, set().union(*known.values()))
    return {kind: [name for name in only if name in names] for kind, names in known.items() if names & set(only)}


def _check(kind: str, name: str, **how: Any) -> Report:
    say(heading(f"{kind} {name}"))
    report = checks.check(kind, name, on_result=_tell, **how)
    say(f"{report.summary()} in {sum(result.seconds for result in report.results):.1f} s, checked as {report.subject}")
    return report


def _silently(kind: str, name: str, **how: Any) -> Report:
    return checks.check(kind, name, **how)


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


def _explain(target: str, report: Report, more: list[str]) -> None:
    """The first failure: what happened, the likely cause, how to see it."""
    first = report.failures[0]
    say("", Text(f"the first failure, {first.check}", style="bold"))
    see = "the traceback below" if first.trace else first.see
    lines = [
        ("what happened", first.happened),
        ("likely cause", first.cause),
        ("how to see it", see),
        ("this alone", _again(target, first.check, more)),
    ]
    say(pairs([(name, text) for name, text in lines if text]))
    if first.trace:
        say("", Text("\n".join(first.trace.splitlines()[-TRACE:]), style="dim"))


def _again(target: str, check: str, more: list[str]) -> str:
    """The command that runs one check again, in quotes what a shell would read."""
    words = [target, *more, "--only", check]
    return " ".join(["effzoo check", *(f'"{word}"' if set(word) & set(" []|()") else word for word in words)])


def _document(target: str, reports: list[Report]) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "target": target,
        "ok": all(report.ok for report in reports),
        "verified": all(report.verified for report in reports),
        "reports": [
            {
                "kind": report.kind,
                "subject": report.subject,
                "ok": report.ok,
                "verified": report.verified,
                "compared_with": report.compared_with,
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
