"""The training loop. Read `Loop.train` first: everything else is one line of it.

- The loss of a step is the mean over all counted labels of the global batch: of all processes, all accumulated batches.
- Batches come from `batches`; how a run begins, is saved and goes on stands in `state`, what it measures in `history`,
  what callbacks see of it in `callbacks`.
- Methods take part (`effzoo/peft/training.py`): stages with an optimizer and learning rates of their own, schedules,
  penalties.
- A teacher may take part (`teaching`): it adds to the loss of the labels, and the parts are logged.
- Every step is looked at for trained tensors without a gradient (`gradients`), and for a gradient that is not a number,
  as that of a loss that is none: the run ends before the optimizer uses it. Every logged loss and every saved weight is
  looked at as well. In float16 the scaler leaves steps out whose gradient is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from effzoo.peft import training
from effzoo.train import checkpoints, state
from effzoo.train.batches import COUNTED, Batch, Steps
from effzoo.train.callbacks import Callback, Told
from effzoo.train.gradients import Gradients, check_reached
from effzoo.train.history import History
from effzoo.train.optimizers import clip, make_optimizer, parameter_groups
from effzoo.train.processes import Processes
from effzoo.train.schedules import make_schedule
from effzoo.train.settings import Every
from effzoo.train.setup import Setup
from effzoo.train.stages import StageSpan
from effzoo.train.supervised import Supervised


class Loop(Told):
    """One run of `finetune`. Callbacks are given it: they read what is public here, and call `stop` and `want`.

    model: that is trained, without a wrapper.
    step, steps: optimizer steps taken, and of the whole run.
    epoch: passes over the examples, with the share of the one that runs; of a stream, whole passes.
    history: one entry for each logged step, as of `Result`.
    optimizer: of the stage that runs.
    main: whether this process writes and reports.
    """

    def __init__(
        self,
        setup: Setup,
        processes: Processes,
        stages: Sequence[StageSpan],
        record: dict[str, Any],
        callbacks: Sequence[Callback],
        metrics: Callable[[Any], Mapping[str, float]] | None,
    ):
        super().__init__(processes, callbacks)
        self.setup, self.stages, self.record = setup, stages, record
        self.metrics, self.over = metrics, processes.spread(setup.model)
        self.model, self.saving, self.teaching = setup.model, setup.saving, setup.teaching
        self.main, self.device, self.steps = processes.main, processes.device, setup.steps
        self.step = 0
        self.measured = History(self, since=training.first_final_step(self.model, self.steps))
        self.span, self.gradients = stages[0], Gradients()
        self.train_loader, self.evaluation_loader = setup.loaders(self.device)
        self.batches = Steps(self.train_loader, setup.optimisation.gradient_accumulation)
        self.taught_steps = 0 if self.teaching is None else self.teaching.steps_of(self.steps)
        self.ends = {self.taught_steps, self.steps, *(span.end for span in stages if span.stage.name)}
        self.norm = 0.0  # of the gradient of the last step

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.measured.entries

    @property
    def epoch(self) -> float:
        per_epoch = self.setup.steps_per_epoch
        return float(self.batches.epoch + self.batches.ended) if per_epoch is None else self.step / per_epoch

    def train(self) -> None:
        """Take the steps that are left."""
        self.tell("on_start")
        if self.main:  # not before: what is refused leaves an earlier run as it is
            checkpoints.clean(self.setup.output_dir, earlier=self.step == 0)
        while self.step < self.steps and not self.stopped and not self.measured.stale():
            if self.step == self.span.end:
                self.enter(next(span for span in self.stages if span.start == self.step))
            training.schedule(self.model, (self.step - self.span.start) / self.span.steps)
            if self.teaching is not None:
                self.teaching.active = self.step < self.taught_steps
            step_batches = next(self.batches)
            self.tell("on_step_start")
            self._backward(step_batches)
            self._update()
            self.step += 1
            self.tell("on_step_end")
            self._follow()
        self.tell("on_end")

    def enter(self, span: StageSpan) -> None:
        """Begin a stage: its parameters may be others, so it has an optimizer, a schedule and a wrapper of its own."""
        training.begin(self.model, span.stage)
        self.span = span
        self.supervised = Supervised(self.model, self.teaching, self.setup.precision, self.over)
        self.wrapped = self.processes.wrap(self.supervised)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.gradients.begin(self.model)
        settings = self.setup.optimisation
        self.optimizer = make_optimizer(settings.optimizer, parameter_groups(self.setup, first=span.start == 0))
        self.schedule = make_schedule(
            settings.schedule, settings.schedule_options, self.optimizer, span.warmup, span.steps
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.setup.precision == "float16")

    def _backward(self, batches: list[Batch]) -> None:
        """Add up the gradients of one step.

        Each batch counts by its share of all labels of the step, times the processes, whose gradients and losses are
        averaged. The penalty, the same in all processes, comes with the last batch, so that it counts once. Processes
        that compute a sequence together have the loss of all of it, and parts of its gradient that add up.
        """
        self.wrapped.train()
        counts = torch.stack([batch.pop(COUNTED) for batch in batches])
        exact = torch.zeros((), device=self.device, dtype=torch.float32 if self.device.type == "mps" else torch.float64)
        total = self.processes.total(counts.sum()).clamp(min=1)
        for number, (batch, count) in enumerate(zip(batches, counts, strict=True), 1):
            last, share = number == len(batches), count.to(exact) * self.processes.number / total
            with nullcontext() if last else self.processes.no_sync(self.wrapped):
                loss, *penalty = self.wrapped(penalised=last, **self.processes.here(batch))
                loss = loss * share
                objective = loss * self.processes.sequence_ranks + sum(penalty)
                check_reached(objective, self.model)
                self.scaler.scale(objective).backward()
            parts = {} if self.teaching is None else self.teaching.parts
            taught = {f"loss_{name}": value * share for name, value in parts.items()}
            self.measured.add({"loss": (loss + sum(penalty)).detach(), **taught})

    def _update(self) -> None:
        """One step of the optimizer and of the schedule."""
        self.processes.average(self.trained)
        self.scaler.unscale_(self.optimizer)  # sees what overflowed in any process
        self.norm = clip(self.trained, self.setup.optimisation.clip)
        if not math.isfinite(self.norm) and not self.scaler.is_enabled():
            self.step += 1
            self.measured.log()  # which raises
        self.gradients.look()
        if self.main:
            self.gradients.warn_of_none()
        self.tell("on_gradients")
        if math.isfinite(self.norm):  # else the scaler leaves the step out
            training.after_backward(self.model)
        self.scaler.step(self.optimizer)
        scale = self.scaler.get_scale()
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # else the gradients were infinite in float16 and no step was taken
            self.schedule.step()
        self.tell("on_update")
        self.optimizer.zero_grad()

    def _follow(self) -> None:
        """Log, evaluate and save where it is time; a resumed run then averages its losses over the same steps."""
        time = "log" in self.wanted or self.step % self.saving.logs_every(self.steps) == 0 or self.step in self.ends
        if time or self.stopped or self._evaluates() or self._saves():
            self.measured.log()
        if self._evaluates():  # asked anew: whoever was told may have stopped the run
            self.tell("on_evaluate", self.measured.evaluate())
        if self._saves():
            self.tell("on_save", state.save(self))
        self.wanted = set()

    def _evaluates(self) -> bool:
        return self.evaluation_loader is not None and self._due("evaluate", self.saving.evaluate_every)

    def _saves(self) -> bool:
        """Where the best checkpoint is asked for, also after each evaluation."""
        every = self.saving.save_every
        due = "save" in self.wanted if every is None else self._due("save", every)
        return due or (self.saving.best is not None and self._evaluates())

    def _due(self, what: str, every: Every) -> bool:
        """Whether it is wanted, it is time, or the run ends here."""
        if what in self.wanted or self.stopped or self.step == self.steps:
            return True
        return self.batches.ended if every == "epoch" else every is not None and self.step % every == 0
