"""`effzoo bench`: time and memory on this machine, as ratios of what runs in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from effzoo.arguments import number, whole
from effzoo.cli.terminal import app, console, say, table
from effzoo.measure import cards, report
from effzoo.measure.finetuning import METHODS, Finetuning
from effzoo.measure.page import Table, finetune_table, scaling_table
from effzoo.measure.rows import Row
from effzoo.measure.scaling import KINDS, Scaling
from effzoo.recompute import Level
from effzoo.registry import load_file, scope

ABOUT = """Measure time and memory on this machine, and draw them.

Example:  effzoo bench scaling --mode train
"""
bench = typer.Typer(no_args_is_help=True, help=ABOUT)
app.add_typer(bench, name="bench")

OUT = (
    "Folder for rows, figures and page; rows that are there are not measured again. Default: runs/bench-SUITE- and "
    "cpu, or the GPU's name."
)
Out = Annotated[Path | None, typer.Option(help=OUT)]
Kinds = Annotated[
    list[str] | None, typer.Option("--attention", help="An attention kind with its options; may be repeated.")
]
File = Annotated[Path | None, typer.Option(help="A Python file whose attention kinds and methods take part.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")]


@bench.command()
def scaling(
    out: Out = None,
    attention: Kinds = None,
    length: Annotated[list[int] | None, typer.Option(help="A length; may be repeated. Default: 512 to 16,384.")] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="forward, train or decode; may be repeated. Default: all.")
    ] = None,
    dim: Annotated[int, typer.Option(help="Width of the layer.")] = 512,
    heads: Annotated[int, typer.Option(help="Heads of the layer.")] = 8,
    batch: Annotated[int, typer.Option(help="Sequences of a batch.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Device = "cpu",
    longest: Annotated[
        float, typer.Option(help="Seconds a pass may take; a kind that takes more is not tried at greater lengths.")
    ] = 20.0,
    seconds: Annotated[float, typer.Option(help="For the rounds of one length and mode.")] = 20.0,
    file: File = None,
) -> None:
    """Measure one attention layer of each kind against the length: time, peak memory, and from where on it is faster
    than full attention.

    A kind that differs from its definition is not timed.

    Example:  effzoo bench scaling --attention full --attention "longformer\\[window=256]" --length 1024 --length 4096
        --mode train
    """
    with scope():
        if file is not None:
            load_file(file)
        for name, value in (("--dim", dim), ("--heads", heads), ("--batch", batch)):
            whole(name, value, least=1, most=2**16)
        for n in length or ():
            whole("--length", n, least=1)
        _seconds({"--longest": longest, "--seconds": seconds})
        lengths, modes = tuple(length or Scaling.lengths), tuple(mode or Scaling.modes)
        given = Scaling(attention or KINDS, lengths, modes, dim, heads, batch, dtype, device, longest, seconds)
        folder = _folder(out, "scaling", device)
        rows = _run(given.run, folder)
        for one in given.modes:
            _show(f"{one}: milliseconds (in times of full attention)", scaling_table(rows, one))
        _leave(rows, folder)


@bench.command()
def finetune(
    out: Out = None,
    attention: Kinds = None,
    peft: Annotated[
        list[str] | None, typer.Option(help="A fine-tuning method with its options; may be repeated.")
    ] = None,
    length: Annotated[int, typer.Option(help="Positions of a sequence.")] = 512,
    batch: Annotated[int, typer.Option(help="Sequences of a batch.")] = 4,
    dropout: Annotated[float, typer.Option(help="Dropout everywhere, attention included.")] = 0.0,
    precision: Annotated[str, typer.Option(help="float32, or bfloat16 by autocast.")] = "float32",
    device: Device = "cpu",
    recompute: Annotated[
        str, typer.Option(help="Computed again for the backward pass: nothing, hidden, or blocks (least memory).")
    ] = "hidden",
    seconds: Annotated[float, typer.Option(help="For the rounds of one attention kind.")] = 60.0,
    file: File = None,
) -> None:
    """Measure one training step of a small encoder under each attention kind and fine-tuning method: time, memory, what
    autograd keeps.

    Example:  effzoo bench finetune --attention full --attention longformer --peft full --peft lora
    """
    with scope():
        if file is not None:
            load_file(file)
        whole("--length", length, least=1, most=2**20)
        whole("--batch", batch, least=1, most=2**16)
        number("--dropout", dropout, "a share from 0 to less than 1", lambda x: 0 <= x < 1)
        _seconds({"--seconds": seconds})
        level = cast(Level, recompute)
        given = Finetuning(
            attention or KINDS, peft or METHODS, length, batch, dropout, precision, device, level, seconds
        )
        folder = _folder(out, "finetune", device)
        rows = _run(given.run, folder)
        _show("one training step", finetune_table(rows))
        _leave(rows, folder)


def _folder(given: Path | None, suite: str, device: str) -> Path:
    """Where a suite leaves its rows."""
    cards.need(device)
    return Path(f"runs/bench-{suite}-{cards.file_name(device)}") if given is None else given


def _seconds(given: Mapping[str, float]) -> None:
    for name, value in given.items():
        number(name, value, "a number of seconds, 0 or more", lambda x: x >= 0)


def _run(suite: Callable[[Path, Callable[[str, int, int], None]], list[Row]], out: Path) -> list[Row]:
    with Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console(),
        transient=True,
    ) as bar:
        task = bar.add_task("")
        return suite(
            out / "rows.jsonl",
            lambda said, done, total: bar.update(task, description=said, completed=done, total=total),
        )


def _show(title: str, lines: Table) -> None:
    head, *body = lines
    if body:
        made = table(*head, right=tuple(head[1:]))
        for row in body:
            made.add_row(*(Text(cell.strip("`")) for cell in row))
        say(Text(title, style="bold cyan"), made, "")


def _leave(rows: Sequence[Row], out: Path) -> None:
    say(f"wrote {report.write(rows, out)} and {out / 'rows.jsonl'}")
