"""What a run has measured: the losses since the last log, an entry for each logged step, and which step is best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from effzoo.errors import TrainingError, did_you_mean, listing
from effzoo.train import checkpoints
from effzoo.train.evaluation import evaluate

if TYPE_CHECKING:
    from effzoo.train.loop import Loop


class History:
    """The measurements of a loop.

    entries: one for each logged step, as of `Result`.
    since: the first step whose evaluation may be the best.
    """

    def __init__(self, loop: Loop, since: int):
        self.loop, self.since = loop, since
        self.directory, self.saving = loop.setup.output_dir, loop.setup.saving
        self.go_on(0, [])

    def go_on(self, step: int, entries: list[dict[str, Any]]) -> None:
        """Go on after a step, with the entries up to it."""
        self.entries, self.logged = entries, step
        self.losses: dict[str, Tensor] = {}  # sums since the last log

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Add the losses of one batch, by name."""
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value.double()

    def log(self) -> None:
        """Note the mean losses since the last log, over all processes."""
        loop, steps = self.loop, self.loop.step - self.logged
        means = {name: loop.processes.mean(total) / steps for name, total in self.losses.items()}
        rate = float(max(loop.schedule.get_last_lr()))  # the largest, where tensors have their own
        self.losses, self.logged = {}, loop.step
        numbers = {"loss": "loss"}
        if not loop.scaler.is_enabled():  # in float16 it leaves out steps whose gradient is infinite
            numbers["grad_norm"] = "norm of the gradient"
        values = {**means, "learning_rate": rate, "grad_norm": loop.norm}
        self._note(values, numbers, f" with learning rate {rate:.2g}")

    def evaluate(self) -> dict[str, float]:
        """Note an evaluation, and return its metrics. Raises TrainingError where `best` is none of them."""
        loop, best = self.loop, self.saving.best
        assert loop.evaluation_loader is not None
        values = evaluate(loop.supervised, loop.evaluation_loader, loop.processes, loop.metrics)
        named = {key if key.startswith("eval_") else f"eval_{key}": value for key, value in values.items()}
        self._note(named, {"eval_loss": "loss of the evaluation"})
        if best is not None and f"eval_{best}" not in named:
            names = [key.removeprefix("eval_") for key in named]
            raise TrainingError(
                f"best={best!r} is no metric of the evaluation{did_you_mean(best, names)} Metrics: {listing(names)}."
            )
        return named

    def _note(self, values: Mapping[str, Any], numbers: Mapping[str, str], where: str = "") -> None:
        """Write down what was measured at this step. Raises TrainingError for what has to be a number and is none:
        what is learned after it is lost.

        numbers: these, by key, in words.
        """
        loop = self.loop
        entry = {"step": loop.step, "epoch": loop.epoch, **values}
        if loop.span.stage.name:
            entry["stage"] = loop.span.stage.name
        if self.entries and self.entries[-1]["step"] == loop.step:
            self.entries[-1].update(entry)
        else:
            self.entries.append(entry)
        loop.processes.track(values, loop.step)
        loop.tell("on_log", entry)
        for key, what in numbers.items():
            if not math.isfinite(values[key]):
                raise TrainingError(f"the {what} is {values[key]} at step {loop.step}{where}; {self.advice()}")

    def advice(self) -> str:
        """What to do when a number is not finite, and from where the run can go on."""
        saved = checkpoints.whole(self.directory)
        kept = f"; {saved[-1].name} holds what was learned before" if saved else ""
        return f"try a lower learning rate, a longer warmup, or precision='float32'{kept}"

    def best(self) -> Path | None:
        """The best checkpoint on disk, the earlier one of equals; None where none is asked for."""
        values = self._costs()
        known = [path for path in checkpoints.whole(self.directory) if checkpoints.step_of(path) in values]
        return min(known, key=lambda path: values[checkpoints.step_of(path)], default=None)

    def stale(self) -> bool:
        """Whether so many evaluations as `Saving(patience=...)` says, one after another, were no better."""
        patience, values = self.saving.patience, self._costs()
        best = min(values, key=values.__getitem__, default=0)
        evaluated = [entry["step"] for entry in self.entries if f"eval_{self.saving.best}" in entry]
        return patience is not None and sum(step > best and step >= self.since for step in evaluated) >= patience

    def _costs(self) -> dict[int, float]:
        return {} if self.saving.best is None else costs(self.entries, self.saving.best, self.since)


def costs(entries: Sequence[Mapping[str, Any]], metric: str, since: int = 0) -> dict[int, float]:
    """The value of `eval_<metric>` by step, with its sign turned where high ones are best; without undefined ones."""
    sign = 1 if lower_is_better(metric) else -1
    values = {
        entry["step"]: sign * entry.get(f"eval_{metric}", math.nan) for entry in entries if entry["step"] >= since
    }
    return {step: value for step, value in values.items() if not math.isnan(value)}


def lower_is_better(metric: str) -> bool:
    """Losses, errors and perplexities are best when low."""
    return any(word in metric for word in ("loss", "error", "perplexity"))
