"""What a run tells others of itself: a protocol of ours, and callbacks of transformers under it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from effzoo.devices import on_cpu
from effzoo.errors import IncompatibleError, OptionError
from effzoo.train.history import costs, lower_is_better
from effzoo.train.schedules import SCHEDULES

if TYPE_CHECKING:
    from effzoo.train.loop import Loop
    from effzoo.train.processes import Processes
    from effzoo.train.setup import Setup


FOLLOWING = ("log", "evaluate", "save")  # a step
DECISIVE = ("on_start", "on_step_end", "on_log", "on_evaluate", "on_save")  # what one process asks for, all then do


class Callback:
    """Told what happens in a run; each method does nothing until it is overridden.

    loop: the run. `model`, `optimizer`, `step`, `steps`, `epoch`, `history` and `main` are there to be read; `stop()`
        ends the run after this step, `want("log", "evaluate", "save")` has these follow the step.
    """

    def on_start(self, loop: Loop) -> None:
        """Before the first step of this call."""

    def on_step_start(self, loop: Loop) -> None:
        """The batches of a step are there."""

    def on_gradients(self, loop: Loop) -> None:
        """The gradients of a step are there, averaged and clipped."""

    def on_update(self, loop: Loop) -> None:
        """The optimizer has taken the step, and the gradients are still there."""

    def on_step_end(self, loop: Loop) -> None:
        """The step is counted; what was asked for by `want` follows."""

    def on_log(self, loop: Loop, entry: dict[str, Any]) -> None:
        """entry: of the history, as it was just written."""

    def on_evaluate(self, loop: Loop, metrics: dict[str, float]) -> None:
        """metrics: by name, each with `eval_` before it."""

    def on_save(self, loop: Loop, checkpoint: Path) -> None:
        """A checkpoint is whole."""

    def on_end(self, loop: Loop) -> None:
        """After the last step, before adapters are finished."""

    def close(self) -> None:
        """The run is over, also where an error ended it."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as JSON."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Take what `state` gave; the run is resumed."""


class Told:
    """A run with callbacks, which are told of it and ask for something.

    stopped: whether no more steps are taken.
    wanted: of "log", "evaluate" and "save", what follows this step.
    """

    def __init__(self, processes: Processes, callbacks: Sequence[Callback]):
        self.processes, self.callbacks = processes, callbacks
        self.stopped, self.wanted = False, set[str]()

    def stop(self) -> None:
        """Take no more steps after this one, in every process."""
        self.stopped = True

    def want(self, *what: str) -> None:
        """Have "log", "evaluate" or "save" follow this step, in every process.

        What `on_save` and `on_end` want comes too late. Raises OptionError for something else.
        """
        for name in set(what) - set(FOLLOWING):
            raise OptionError(f"a step is followed by 'log', 'evaluate' or 'save', and a callback wants {name!r}")
        self.wanted |= set(what)

    def tell(self, event: str, *values: Any) -> None:
        """Call the method of every callback; what one process asks for, all then do."""
        for callback in self.callbacks:
            getattr(callback, event)(self, *values)
        if event in DECISIVE and self.processes.number > 1:
            asked = torch.tensor([self.stopped, *(what in self.wanted for what in FOLLOWING)], dtype=torch.float32)
            stopped, *wanted = (self.processes.total(asked) > 0).tolist()
            self.stopped = stopped
            self.wanted = {what for what, by_one in zip(FOLLOWING, wanted, strict=True) if by_one}


class OfTransformers(Callback):
    """Runs callbacks of transformers, with the arguments and the state that a Trainer would give them.

    Their `model` is the model itself. Not called are on_init_end, on_substep_end, on_prediction_step, on_predict and
    on_push_begin.

    Raises IncompatibleError where one sets `control.should_epoch_stop`.
    """

    def __init__(self, callbacks: Sequence[TrainerCallback | type[TrainerCallback]]):
        self.callbacks = [callback() if isinstance(callback, type) else callback for callback in callbacks]

    def on_start(self, loop: Loop) -> None:
        self.arguments, self.epoch = _arguments(loop.setup), int(loop.epoch)
        self.state_of_trainer, self.control = TrainerState(), TrainerControl()  # it may have been in another run
        try:
            self._tell(loop, "on_train_begin")
        except AssertionError as error:
            raise OptionError(
                f"a callback of transformers refuses the run: {error} (here they are fields of Saving: best is "
                "metric_for_best_model, evaluate_every is eval_strategy)"
            ) from error
        self._tell(loop, "on_epoch_begin")

    def on_step_start(self, loop: Loop) -> None:
        if int(loop.epoch) > self.epoch:
            self.epoch = int(loop.epoch)
            self._tell(loop, "on_epoch_end")
            self._tell(loop, "on_epoch_begin")
        self._tell(loop, "on_step_begin")

    def on_gradients(self, loop: Loop) -> None:
        self._tell(loop, "on_pre_optimizer_step")

    def on_update(self, loop: Loop) -> None:
        self._tell(loop, "on_optimizer_step")

    def on_step_end(self, loop: Loop) -> None:
        self._tell(loop, "on_step_end")

    def on_log(self, loop: Loop, entry: dict[str, Any]) -> None:
        self._tell(loop, "on_log", logs=dict(entry))

    def on_evaluate(self, loop: Loop, metrics: dict[str, float]) -> None:
        self._tell(loop, "on_evaluate", metrics=dict(metrics))

    def on_save(self, loop: Loop, checkpoint: Path) -> None:
        self._tell(loop, "on_save")

    def on_end(self, loop: Loop) -> None:
        self._tell(loop, "on_epoch_end")
        self._tell(loop, "on_train_end")

    def state(self) -> dict[str, Any]:
        return {type(c).__name__: c.state() for c in self.callbacks if isinstance(c, ExportableState)}

    def load(self, state: dict[str, Any]) -> None:
        for callback in self.callbacks:
            for name, value in state.get(type(callback).__name__, {}).get("attributes", {}).items():
                setattr(callback, name, value)

    def _tell(self, loop: Loop, event: str, **values: Any) -> None:
        """Call every callback, and pass on what it wants."""
        self._bring_up_to_date(loop, event)
        for callback in self.callbacks:
            changed = getattr(callback, event)(
                self.arguments, self.state_of_trainer, self.control, model=loop.model, processing_class=None,
                optimizer=loop.optimizer, lr_scheduler=loop.schedule, train_dataloader=loop.train_loader,
                eval_dataloader=loop.evaluation_loader, **values,
            )  # fmt: skip
            self.control = changed or self.control
        control = self.control
        if control.should_epoch_stop:
            raise IncompatibleError(
                "a callback of transformers set control.should_epoch_stop, and a run here is counted in steps; set "
                "control.should_training_stop"
            )
        if control.should_training_stop:
            loop.stop()
        wanted = {"log": control.should_log, "evaluate": control.should_evaluate, "save": control.should_save}
        loop.want(*(what for what, asked in wanted.items() if asked))
        control.should_log = control.should_evaluate = control.should_save = False

    def _bring_up_to_date(self, loop: Loop, event: str) -> None:
        state = self.state_of_trainer
        state.epoch, state.global_step, state.max_steps = loop.epoch, loop.step, loop.steps
        state.log_history = loop.history
        state.num_train_epochs = math.ceil(loop.steps / (loop.setup.steps_per_epoch or 1))
        state.is_world_process_zero = state.is_local_process_zero = loop.main
        before = loop.history[:-1] if event in ("on_log", "on_evaluate") else loop.history  # as Trainer has it
        if values := {} if loop.saving.best is None else costs(before, loop.saving.best):
            step = state.best_global_step = min(values, key=values.__getitem__)
            state.best_metric = values[step] if lower_is_better(str(loop.saving.best)) else -values[step]


def of_user(given: Any) -> list[Callback]:
    """The callbacks of a run: ours, and those of transformers, instances or classes. Raises OptionError."""
    accepted = "callbacks is a list of effzoo.train.Callback and transformers.TrainerCallback, got"
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise OptionError(f"{accepted} {given!r:.80}")
    callbacks: list[Callback] = []
    for callback in given:
        kind = callback if isinstance(callback, type) else type(callback)
        if issubclass(kind, Callback):
            callbacks.append(callback() if isinstance(callback, type) else callback)
        elif issubclass(kind, TrainerCallback):
            callbacks.append(OfTransformers([callback]))
        else:
            raise OptionError(f"{accepted} one {callback!r:.80}")
    return callbacks


def _arguments(setup: Setup) -> TrainingArguments:
    """The settings of a run in the words of Trainer."""
    saving, run = setup.saving, setup.optimisation
    arguments = TrainingArguments(
        output_dir=str(setup.output_dir), use_cpu=on_cpu(), seed=setup.seed, max_steps=setup.steps,
        bf16=setup.precision == "bfloat16", fp16=setup.precision == "float16",
        per_device_train_batch_size=setup.batch_size,
        per_device_eval_batch_size=saving.eval_batch_size or setup.batch_size,
        gradient_accumulation_steps=run.gradient_accumulation, learning_rate=setup.largest_rate,
        weight_decay=run.weight_decay, max_grad_norm=run.clip or 0.0, lr_scheduler_type=SCHEDULES[run.schedule],
        logging_steps=saving.logs_every(setup.steps), eval_strategy="no" if setup.evaluate is None else "steps",
        eval_steps=setup.number(saving.evaluate_every),
        save_strategy="no" if saving.save_every is None else "steps",
        save_steps=setup.number(saving.save_every), metric_for_best_model=saving.best,
        greater_is_better=None if saving.best is None else not lower_is_better(saving.best),
        report_to="none", label_names=["labels"],
    )  # fmt: skip
    arguments.load_best_model_at_end = saving.best is not None  # checked by Trainer's rules if it were given above
    return arguments
