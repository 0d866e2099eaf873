"""`effzoo lab`: the experiments of the lectures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from effzoo.cli.own import loaded
from effzoo.cli.terminal import app, heading, say, table


@app.command()
def lab(
    command: typer.Context,
    name: Annotated[
        str | None, typer.Argument(help="An experiment; leave it out for the list, 'all' for every one in turn.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Sizes for at most three minutes on two cores, instead of 10 to 20.")
    ] = False,
    data: Annotated[Path | None, typer.Option(help="A file or folder in place of the default data.")] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="A seed; may be repeated. Default: 0 to 4, with --quick 0 to 2.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The folder in which each experiment makes one: result.json, table.md, figure.png.")
    ] = Path("runs/lab"),
    file: Annotated[
        Path | None, typer.Option("--file", help="A Python file with experiments of your own, or with what they name.")
    ] = None,
) -> None:
    """List the experiments, or run one beside the published numbers.

    A run leaves a table, a figure, and the numbers as JSON.

    Example:  effzoo lab spectrum --quick
    """
    from effzoo.arguments import whole
    from effzoo.lab import DECKS, Run, catalogue, get, perform

    command.with_resource(loaded(file))
    if name is None:
        for deck, title in DECKS.items():
            experiments = [experiment for experiment in catalogue().values() if experiment.decks[0] == deck]
            if not experiments:
                continue
            listed = table("experiment", "question", "source")
            for experiment in experiments:
                listed.add_row(Text(experiment.name, style="bold"), Text(experiment.about), Text(experiment.source))
            say(heading(f"Deck {deck}: {title}"), listed, "")
        say("Run one with:  effzoo lab NAME --quick")
        return
    chosen = list(catalogue().values()) if name == "all" else [get(name)]
    for number in seed or ():
        whole("--seed", number, least=0, most=2**32 - 1)
    seeds = tuple(seed or range(3 if quick else 5))
    run = Run(quick=quick, seeds=seeds, data=data, say=lambda said: say(Text(f"  {said}", style="dim")))
    for experiment in chosen:
        say(heading(experiment.name), experiment.about)
        result = perform(experiment, run, out / experiment.name)
        _show(result)
        say(f"wrote {out / experiment.name}: result.json, table.md, figure.png   {result['seconds']:.0f} s", "")


def _show(result: Mapping[str, Any]) -> None:
    from effzoo.lab import Claim

    for title, (head, *body) in result["tables"].items():
        made = table(*head, right=tuple(head[1:]))
        for row in body:
            made.add_row(*(Text(cell.strip("`")) for cell in row))
        say(Text(title, style="bold"), made, "")
    for claim in result["claims"]:
        judged = Claim.read(claim)
        say(Text(str(judged), style="green" if judged.verdict == "seen" else "yellow"))
    for note in result["notes"]:
        say(Text(note, style="dim"))
