"""`effzoo course`: the assignments, handed out, checked, graded and ranked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from effzoo.arguments import whole
from effzoo.cli.check import in_forks
from effzoo.cli.terminal import app, heading, pairs, say, table
from effzoo.course import Assignment, Grade, assignments, find, formats, grade, hints
from effzoo.course.handing_out import start as hand_out
from effzoo.course.kit import Hidden, Verified, read_hidden, verify, write_kit
from effzoo.errors import OptionError, UnknownNameError, listing
from effzoo.writing import replace_file

course = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(course, name="course")
FORMATS = ("text", "json", "gradescope", "classroom", "junit")
MARKS = {"green": ("ok ", "green"), "red": ("RED", "bold red"), "not run": ("-  ", "yellow")}
CELLS = {  # (you read the key, it should be read): what is drawn
    (True, True): ("██", "blue"),
    (False, False): ("··", "dim"),
    (True, False): ("++", "bold red"),
    (False, True): ("--", "bold red"),
}
TRACE = 8  # lines of a traceback that are shown

Name = Annotated[str, typer.Argument(help="An assignment: a03, A3 or 3, or the folder of one of your own.")]
File = Annotated[Path, typer.Argument(help="What was written: a .py file, or the notebook of `start --notebook`.")]


@course.callback()
def about() -> None:
    """Assignments that grade themselves: swap attention and adapters, see the mistake named.

    Example:  effzoo course list,  effzoo course start a03,  effzoo course check a03 a03/a03.py
    """


@course.command("list")
def list_() -> None:
    """List the assignments."""
    made = table("assignment", "deck", "what you write", "points", "minutes", right=("points", "minutes"))
    for one in assignments().values():
        made.add_row(one.name, one.deck, one.title, str(one.of), str(one.minutes))
    say(made, "", "Begin one:  effzoo course start a03")


@course.command()
def start(
    name: Name,
    to: Annotated[Path | None, typer.Option(help="The folder to write into; default: its name, here.")] = None,
    notebook: Annotated[bool, typer.Option("--notebook", help="A notebook in place of a .py file.")] = False,
) -> None:
    """Write the text and the starter of an assignment into a folder."""
    asked = find(name)
    folder = to or Path(asked.name)
    paths = hand_out(asked, folder, notebook)
    say(heading(f"{asked.name}: {asked.title}"), *(f"  {path}" for path in paths), "")
    file = paths[-1] if not notebook else folder / f"{asked.name}.py"
    say("Read README.md, write, then:", f"  effzoo course check {name} {file}")


@course.command()
def check(
    name: Name,
    file: File,
    task: Annotated[list[str] | None, typer.Option(help="This task alone; may be repeated.")] = None,
    hint: Annotated[
        bool,
        typer.Option(
            "--hint", help="The next hint of the first red task. Each costs a tenth of its points, and is logged."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of what is drawn: other lengths, widths and values.")] = 0,
) -> None:
    """Check what was written, task by task; the first red one is explained.

    The exit code is 0 when every task is green, and 1 when one is not.

    Example:  effzoo course check a03 a03/a03.py --hint
    """
    whole("--seed", seed, least=0, most=2**31)
    with in_forks():
        done = _graded(find(name), file, seed, task)
    _show(done)
    if hint and done.first is not None and not done.refused:
        _hint(done)
    elif done.first is not None and not done.refused:
        say("", Text("for a hint on this task: --hint (a tenth of its points)", style="dim"))
    _total(done)
    if not done.ok:
        raise typer.Exit(1)


@course.command("grade")
def grade_(
    name: Name,
    file: File,
    hidden: Annotated[Path | None, typer.Option(help="The grader's hidden.toml; default: the seed of `check`.")] = None,
    format_: Annotated[str, typer.Option("--format", help=f"One of {listing(FORMATS)}.")] = "text",
    output: Annotated[Path | None, typer.Option(help="Write to this file; default: print.")] = None,
) -> None:
    """Grade what was handed in, with hidden numbers, in the format of a grading system.

    The exit code is 0 whatever the points are; 2 when there is nothing to grade.

    Example:  effzoo course grade a03 a03.py --hidden hidden.toml --format gradescope --output results.json
    """
    if format_ not in FORMATS:
        raise UnknownNameError("format", format_, FORMATS)
    with in_forks():  # of what does not know the hidden numbers
        kept = Hidden(0) if hidden is None else read_hidden(hidden)
        done = _graded(find(name), file, kept.seed, None)
    if format_ == "text" and output is None:
        _show(done)
        _total(done)
        return
    text = {
        "text": lambda: str(done),
        "json": lambda: json.dumps(formats.as_json(done), indent=2),
        "gradescope": lambda: json.dumps(
            formats.as_gradescope(done, kept.visibility, kept.tasks_of(done.assignment.name)), indent=2
        ),
        "classroom": lambda: json.dumps(formats.as_classroom(done), indent=2),
        "junit": lambda: formats.as_junit(done),
    }[format_]()
    if output is None:
        typer.echo(text)
    else:
        replace_file(output, f"{text}\n".encode())
        say(f"{done.points:g} of {done.of} points, written to {output}")


@course.command()
def board(folder: Annotated[Path, typer.Argument(help="A folder of documents of `grade --format json`.")]) -> None:
    """Rank what was handed in: by points, then by the figures of the open assignment."""
    documents = []
    for path in sorted(folder.glob("*.json")):
        try:
            told = json.loads(path.read_text())
        except ValueError as error:
            raise OptionError(f"{path} is no JSON: {error}") from error
        if isinstance(told, dict) and {"assignment", "points", "of", "board"} <= told.keys():
            documents.append((path.stem, told))
    if not documents:
        raise OptionError(f"{folder} has no documents of `effzoo course grade --format json`; write some with --output")
    for name in sorted({told["assignment"] for _, told in documents}):
        mine = [(who, told) for who, told in documents if told["assignment"] == name]
        figures = list(dict.fromkeys(key for _, told in mine for key in told["board"]))
        mine.sort(
            key=lambda pair: (-pair[1]["points"], [_rank(key, pair[1]["board"].get(key)) for key in figures], pair[0])
        )
        made = table("who", "points", *figures, right=("points", *figures))
        for who, told in mine:
            values = [f"{told['board'][key]:,.4g}" if key in told["board"] else "" for key in figures]
            made.add_row(who, f"{told['points']:g} of {told['of']}", *values)
        say(heading(f"{name}: {mine[0][1].get('title', '')}"), made, "")


@course.command()
def kit(folder: Annotated[Path, typer.Argument(help="A new folder, for a private repository.")]) -> None:
    """Write an instructor's kit: solutions, mutants, a hidden seed, and workflows for graders."""
    write_kit(folder)
    say(f"written to {folder}; keep it where students cannot read it, and begin with its README.md")


@course.command("verify")
def verify_(folder: Annotated[Path, typer.Argument(help="A kit.")]) -> None:
    """Grade every solution and mutant of a kit: all points for these, fewer for those, with the mistake named."""

    def tell(one: Verified) -> None:
        mark, style = ("RED", "bold red") if one.wrong else ("ok ", "green")
        line = Text(mark, style=style).append(
            f" {one.path.relative_to(folder)}  {one.grade.points:g} of {one.grade.of}", style="not bold default"
        )
        say(line, *([Text(f"    {one.wrong}", style="red")] if one.wrong else []))

    with in_forks():
        right = verify(folder, tell)
    if not right:
        raise typer.Exit(1)


def _graded(asked: Assignment, file: Path, seed: int, only: list[str] | None) -> Grade:
    done = grade(asked, file, seed=seed, only=only)
    done.hints = hints.costs(asked, file)
    return done


def _show(done: Grade) -> None:
    """The tasks with their points; of the first red one what happened, the likely cause and where."""
    say(heading(f"{done.assignment.name}: {done.assignment.title}"))
    rows = Table.grid(padding=(0, 1, 0, 0))
    for one in done.outcomes:
        mark, style = MARKS[one.status]
        rows.add_row(
            Text(mark, style=style), Text(f"{one.points}/{one.part.points}"),
            Text(one.part.title, "bold" if one.status == "red" else "").append(f"  ({one.part.name})", "dim not bold"),
        )  # fmt: skip
    say(rows)
    if done.refused:
        say("", Text(f"not run: {done.refused}", style="bold red"))
    elif done.first is not None:
        first = done.first
        again = f"effzoo course check {done.assignment.name} {done.file} --task {first.part.name}"
        lines = [
            ("what happened", first.happened),
            ("likely cause", first.cause),
            ("call", first.where),
            ("this alone", again),
        ]
        say(
            "", Text(f"the first red task, {first.part.name}", style="bold"), pairs([line for line in lines if line[1]])
        )
        own = [line for line in first.trace.splitlines() if line.strip()]
        if own:
            say(Text("\n".join(own[-TRACE:]), style="dim"))
    if done.printed:
        say("", Text("your file printed", style="bold"), Text(done.printed[-1000:], style="dim"))


def _total(done: Grade) -> None:
    lost = f", {done.lost:g} lost to hints" if done.lost else ""
    say("", Text(f"{done.points:g} of {done.of} points{lost}", style="bold green" if done.ok else "bold"))


def _hint(done: Grade) -> None:
    assert done.first is not None
    hint = hints.next_hint(done, done.first)
    say("", Text(f"hint, {hint.level}", style="bold cyan").append(f"  ({hint.task})", style="dim not bold"), hint.text)
    if hint.mine is not None and hint.wanted is not None:
        say(
            "",
            _patterns(hint),
            Text("rows: queries; ++ a key read that should not be, -- one that is left out", style="dim"),
        )
    say("", Text(f"logged in {hints.log_of(done.file)}", style="dim"))


def _patterns(hint: hints.Hint) -> Table:
    """Which keys each query reads, yours beside the wanted; what differs is red."""
    assert hint.mine is not None and hint.wanted is not None
    made = Table.grid(padding=(0, 4, 0, 0))
    made.add_row(Text("yours", style="bold"), Text("wanted", style="bold"))
    for mine, wanted in zip(hint.mine.tolist(), hint.wanted.tolist(), strict=True):
        left, right = Text(), Text()
        for a, b in zip(mine, wanted, strict=True):
            left.append(*CELLS[a, b])
            right.append(*CELLS[b, b])
        made.add_row(left, right)
    return made


def _rank(figure: str, value: float | None) -> float:
    """Smaller is better; a figure that is absent is last."""
    if value is None:
        return float("inf")
    return value if figure in formats.LESS_IS_MORE else -value
