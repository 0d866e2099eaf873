"""The progress of a run in the terminal: a bar, and a line per evaluation. Imported only when a run starts: it needs
transformers."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback


class Bar(TrainerCallback):
    """Steps done of all steps with the latest training loss and its stage; evaluations stay above it as lines."""

    def __init__(self, console: Console):
        numbers = (TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), *numbers)
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step)
            self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        stage = f"{logs['stage']}   " if "stage" in logs else ""
        if "loss" in logs:
            self.loss = float(logs["loss"])
            self.progress.update(self.task, description=f"{stage}loss {self.loss:.4g}")
        speed = ("_runtime", "_per_second", "_preparation_time")
        shown = {
            key.removeprefix("eval_"): value
            for key, value in logs.items()
            if key.startswith("eval_") and not key.endswith(speed)
        }
        if shown:
            numbers = [f"validation {name} {value:.4g}" for name, value in shown.items()]
            training = "" if self.loss is None else f"training loss {self.loss:.4g}   "
            self.progress.console.print(
                f"step {state.global_step:>6}   {stage}{training}{'   '.join(numbers)}", markup=False
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.stop()

    def close(self) -> None:
        """Take the bar down when the run ends early."""
        self.progress.stop()
