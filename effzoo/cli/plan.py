"""`effzoo plan`: the memory of one training step, before anything is allocated."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

from effzoo.attention.backends import BACKENDS
from effzoo.cli.show import Attention, Peft
from effzoo.cli.terminal import app, heading, say, table
from effzoo.plan import plan as plan_of
from effzoo.plan.report import MIB
from effzoo.train.settings import whole_or_none


@app.command("plan")
def plan_(
    model: Annotated[str, typer.Argument(help="A model of the zoo, or a TOML file of your own.")],
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
    task: Annotated[
        str | None, typer.Option(help="The model's task; classification, and causal_lm for decoders, when left out.")
    ] = None,
) -> None:
    """Predict the memory of one training step, part by part, without allocating it.

    Example:  effzoo plan longformer --peft lora --batch 2 --length 4096 --precision autocast
    """
    for name, value in (("--length", length), ("--batch", batch), ("--max-length", max_length)):
        whole_or_none(name, value, least=1)
    given = {"attention": attention, "task": task, "max_length": max_length, "recompute": recompute}
    choices: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    plan = plan_of(
        model, peft, batch=batch, length=length, dtype=dtype, precision=precision, optimizer=optimizer,
        checkpointing=checkpointing or None, backend=backend, device=device, **choices,
    )  # fmt: skip
    parts = table("part", "MiB", "%", right=("MiB", "%"))
    for name, nbytes in plan.lines():
        parts.add_row(*map(Text, (name, f"{nbytes / MIB:,.2f}", f"{100 * nbytes / max(plan.total, 1):.1f}")))
    say(heading(plan.title), f"{plan.trainable:,} of {plan.parameters:,} parameters are trained", parts)
