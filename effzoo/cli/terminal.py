"""The application that the commands join, its console, and how errors are told."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

from effzoo.errors import EffzooError

COMMANDS = {  # name: module, and the first paragraph of its help; in the order in which a newcomer needs them
    "models": ("show", "List the models of the zoo."),
    "attention": ("show", "List the attention kinds."),
    "peft": ("show", "List the parameter-efficient fine-tuning methods."),
    "routers": ("show", "List the routers, which say what experts see a token."),
    "show": ("show", "Show one entry: what it computes, its options, its paper, and for attention its pattern."),
    "account": ("show", "Count what a method trains, stores and changes on a model, without loading any weights."),
    "plan": ("plan", "Predict the memory of one training step, part by part, without allocating it."),
    "finetune": ("train", "Fine-tune a model on texts, by default to classify them, and save the adapter."),
    "predict": ("apply", "Say what a saved model says of each row of a file: labels, numbers, tags or answers."),
    "generate": ("apply", "Continue a text with a saved decoder."),
    "embed": ("apply", "Write a vector for each text."),
    "check": ("check", "Check that attention kinds and fine-tuning methods keep their contract."),
    "course": ("course", "Assignments that grade themselves: swap attention and adapters, see the mistake named."),
    "matrix": ("matrix", "Try every fine-tuning method on every attention kind, on tiny models."),
    "bench": ("bench", "Measure time and memory on this machine, and draw them."),
    "lab": ("lab", "List the experiments, or run one beside the published numbers."),
}
MISTAKE, BUG, INTERRUPTED, BROKEN_PIPE = 2, 3, 130, 141
fresh = False  # whether this process has run nothing with torch before the command
KEPT = {  # what is true of each command after Ctrl-C; nothing was written by the others
    "finetune": "with --resume, the same command goes on from the newest checkpoint in --output, if there is one "
    "already",
    "bench": "what was measured is in rows.jsonl in --out, and the same command measures the rest",
    "lab": "experiments that were done are in --out; the one that ran is not, and begins anew",
}


class Commands(TyperGroup):
    """Tells an error in one message without a traceback; `--debug`, anywhere on the line, shows the traceback."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        imported = self.commands
        self.commands = {name: imported.get(name) or Later(name=name, help=COMMANDS[name][1]) for name in COMMANDS}

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.ensure_object(dict)["debug"] = "--debug" in args
        return super().parse_args(ctx, [argument for argument in args if argument != "--debug"])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EffzooError as error:
            self._tell(ctx, str(error), MISTAKE)
        except BrokenPipeError:  # the reader has seen enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from None
        except OSError as error:
            self._tell(ctx, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", MISTAKE)
        except KeyboardInterrupt:
            self._tell(ctx, f"interrupted; {KEPT.get(ctx.invoked_subcommand, 'nothing was written')}", INTERRUPTED)
        except Exception as error:
            if _is_control_flow(error):
                raise
            self._tell(
                ctx,
                f"{type(error).__name__}: {error}\nThis is a bug in effzoo or in a plug-in; --debug shows where.",
                BUG,
            )

    @staticmethod
    def _tell(ctx: Any, message: str, code: int) -> None:
        if ctx.obj["debug"]:
            raise  # the error that is being handled
        text = Text("error: ", style="bold red").append(Text(message, style="red"))
        Console(stderr=True, highlight=False).print(text, soft_wrap=True)
        raise typer.Exit(code)


class Later(TyperCommand):
    """A command whose module is imported when it is called: what torch takes to import, help need not wait for."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        global fresh
        fresh = "torch" not in sys.modules
        importlib.import_module(f"effzoo.cli.{COMMANDS[str(self.name)][0]}")
        return get_group(app).commands[str(self.name)].make_context(info_name, args, parent, **extra)


def _is_control_flow(error: Exception) -> bool:
    """Whether typer or its click uses this exception to end, or to report wrong usage itself."""
    return any(
        cls.__module__.split(".")[0] in ("click", "typer") or "_click" in cls.__module__ for cls in type(error).__mro__
    )


def _version(wanted: bool) -> None:
    if wanted:
        names = ("effzoo", "torch", "transformers")
        typer.echo(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
        raise typer.Exit


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False
)


@app.callback()
def effzoo(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere on the line.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the versions and exit.")
    ] = False,
) -> None:
    """Efficient transformers with integrated parameter-efficient fine-tuning.

    A model, an attention kind and a fine-tuning method are chosen by name; options follow in brackets. In a shell,
    quote them: "longformer\\[window=256]", "prefix\\[length=16]|lora\\[rank=4]".

    [bold]Start with[/bold]  effzoo models  or  effzoo show longformer.
    """


def console() -> Console:
    """A console on standard output as it is now, which prints what it is given without guessing at highlights."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if known else 100)


def say(*parts: RenderableType) -> None:
    """Print; strings are taken as they are, without markup."""
    out = console()
    for part in parts:
        out.print(Text(part) if isinstance(part, str) else part)


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table without frame lines; names, in the first column, and numbers, at the right, stay in one piece."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        whole = column in (columns[0], *right)
        justify: Any = "right" if column in right else "left"
        made.add_column(Text(column), justify=justify, overflow="fold", no_wrap=whole)
    return made


def pairs(lines: list[tuple[str, str]]) -> Table:
    """Names and what they are, in two columns."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in lines:
        made.add_row(Text(name), Text(value))
    return made


def heading(text: str) -> Text:
    return Text(text, style="bold cyan")
