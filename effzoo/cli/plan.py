"""`effzoo plan`: the memory of one training step, before anything is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from effzoo.arguments import whole_or_none
from effzoo.attention.backends import BACKENDS
from effzoo.builder import build
from effzoo.cli.own import File, loaded
from effzoo.cli.show import Attention, Peft
from effzoo.cli.terminal import app, heading, say, table
from effzoo.measure.cards import CARDS
from effzoo.measure.cards import card as card_of
from effzoo.plans import plan as plan_of
from effzoo.plans.report import MIB


@app.command("plan")
def plan_(
    model: Annotated[
        str, typer.Argument(help="A model of the zoo, a TOML file of your own, or a folder of a saved model.")
    ],
    length: Annotated[int, typer.Option(help="Positions of a sequence.")],
    batch: Annotated[int, typer.Option(help="Sequences of a batch.")] = 1,
    peft: Peft = None,
    attention: Attention = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    precision: Annotated[
        str, typer.Option(help="plain, autocast, or master (half weights with a float32 copy of trained ones).")
    ] = "plain",
    optimizer: Annotated[str, typer.Option(help="adamw, adam, momentum, sgd or adafactor.")] = "adamw",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Keep only the inputs of blocks and compute the rest again.")
    ] = False,
    recompute: Annotated[
        str | None, typer.Option(help="As effzoo finetune does: nothing, hidden or blocks; default: keep all.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="What computes attention: " + ", ".join(BACKENDS) + "; default: the model's.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; no card is needed.")] = "cpu",
    max_length: Annotated[
        int | None, typer.Option(help="Positions that the model is built for, where the entry's own are too few.")
    ] = None,
    ranks: Annotated[
        int, typer.Option(help="Devices over which each sequence is spread; the plan is that of one.")
    ] = 1,
    link: Annotated[float | None, typer.Option(help="Gigabytes a second that a rank sends to others.")] = None,
    card: Annotated[str | None, typer.Option(help="Whose rate operations take: " + ", ".join(CARDS) + ".")] = None,
    task: Annotated[
        str | None, typer.Option(help="The model's task; classification, and causal_lm for decoders, when left out.")
    ] = None,
    file: File = None,
) -> None:
    """Predict the memory of one training step, part by part, without allocating it.

    Example:  effzoo plan longformer --peft lora --batch 2 --length 4096 --precision autocast
    """
    for name, value in (("--length", length), ("--batch", batch), ("--ranks", ranks), ("--max-length", max_length)):
        whole_or_none(name, value, least=1)
    given = {"attention": attention, "task": task, "max_length": max_length, "recompute": recompute}
    choices: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    rate = None if card is None else card_of(card).rate(dtype or "float32")
    with loaded(file):
        planned: Any = model
        if Path(model).is_dir():
            how = {"recompute"} & choices.keys()
            planned = build(pretrained=model, **{name: choices.pop(name) for name in choices.keys() - how})
        plan = plan_of(
            planned, peft, batch=batch, length=length, dtype=dtype, precision=precision, optimizer=optimizer,
            checkpointing=checkpointing or None, backend=backend, device=device, ranks=ranks,
            link=None if link is None else 1e9 * link, rate=rate, **choices,
        )  # fmt: skip
    parts = table("part", "MiB", "%", right=("MiB", "%"))
    for name, nbytes in plan.lines():
        parts.add_row(*map(Text, (name, f"{nbytes / MIB:,.2f}", f"{100 * nbytes / max(plan.total, 1):.1f}")))
    say(heading(plan.title), f"{plan.trainable:,} of {plan.parameters:,} parameters are trained", parts)
    if plan.spread is not None:
        say(str(plan.spread))
