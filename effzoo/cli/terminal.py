"""The application that the commands join, its console, and how errors are told."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from effzoo.errors import EffzooError

ORDER = (
    "models",
    "attention",
    "peft",
    "routers",
    "show",
    "account",
    "plan",
    "finetune",
    "check",
    "matrix",
    "bench",
    "lab",
)
MISTAKE, BUG, INTERRUPTED = 2, 3, 130
KEPT = {  # what is true of each command after Ctrl-C; nothing was written by the others
    "finetune": "with --resume, the same command goes on from the newest checkpoint in --output, if there is one "
    "already",
    "bench": "what was measured is in rows.jsonl in --out, and the same command measures the rest",
    "lab": "experiments that were done are in --out; the one that ran is not, and begins anew",
}


class Commands(TyperGroup):
    """Tells an error in one message without a traceback; `--debug`, anywhere on the line, shows the traceback."""

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order in which a newcomer needs them."""
        return sorted(super().list_commands(ctx), key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.ensure_object(dict)["debug"] = "--debug" in args
        return super().parse_args(ctx, [argument for argument in args if argument != "--debug"])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EffzooError as error:
            self._tell(ctx, str(error), MISTAKE)
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


def _is_control_flow(error: Exception) -> bool:
    """Whether typer or its click uses this exception to end, or to report wrong usage itself."""
    return any(
        cls.__module__.split(".")[0] in ("click", "typer") or "_click" in cls.__module__ for cls in type(error).__mro__
    )


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False
)


@app.callback()
def effzoo(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere on the line.")
    ] = False,
) -> None:
    """Efficient transformers with integrated parameter-efficient fine-tuning.

    A model, an attention kind and a fine-tuning method are chosen by name; options follow in brackets. In a shell,
    quote them: "longformer\\[window=256]", "prefix\\[length=16]|lora\\[rank=4]".

    [bold]Start with[/bold]  effzoo models  or  effzoo show longformer.
    """


def console() -> Console:
    """A console on standard output as it is now, which prints what it is given without guessing at highlights."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 100)


def say(*parts: RenderableType) -> None:
    """Print; strings are taken as they are, without markup."""
    out = console()
    for part in parts:
        out.print(Text(part) if isinstance(part, str) else part)


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table without frame lines."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(Text(column), justify="right" if column in right else "left", overflow="fold")
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
