"""The progress of a run in the terminal: a bar, and a line per evaluation."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from effzoo.train.callbacks import Callback
from effzoo.train.loop import Loop


class Bar(Callback):
    """Steps done of all steps with the latest training loss and its stage; evaluations stay above it as lines."""

    def __init__(self, console: Console | None = None):
        console = console or Console(stderr=True)
        numbers = (TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), *numbers)
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.loss: float | None = None

    def on_start(self, loop: Loop) -> None:
        if loop.main:
            self.task = self.progress.add_task("", total=loop.steps, completed=loop.step)
            self.progress.start()

    def on_step_end(self, loop: Loop) -> None:
        if loop.main:
            self.progress.update(self.task, completed=loop.step)

    def on_log(self, loop: Loop, entry: dict[str, Any]) -> None:
        if not loop.main:
            return
        stage = f"{entry['stage']}   " if "stage" in entry else ""
        if "loss" in entry:
            self.loss = float(entry["loss"])
            self.progress.update(self.task, description=f"{stage}loss {self.loss:.4g}")
        shown = {key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")}
        if shown:
            numbers = [f"validation {name} {value:.4g}" for name, value in shown.items()]
            training = "" if self.loss is None else f"training loss {self.loss:.4g}   "
            self.progress.console.print(f"step {loop.step:>6}   {stage}{training}{'   '.join(numbers)}", markup=False)

    def close(self) -> None:
        self.progress.stop()
