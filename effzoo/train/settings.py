"""The settings of a run: what they may be is checked before anything is read or written.

`Optimisation` and `Saving` hold those that few people set; `finetune` takes the others as keywords.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

from effzoo.annotations import NotNegative, Positive, Probability, Range, annotations_of, plain, problem
from effzoo.arguments import LARGEST
from effzoo.errors import OptionError, did_you_mean, listing, shown
from effzoo.train.optimizers import OPTIMIZERS
from effzoo.train.schedules import check_options

P = ParamSpec("P")
R = TypeVar("R")


Steps = Annotated[int, Range(1, LARGEST)]
Warmup = Annotated[int, Range(0, LARGEST)] | Probability
Every = Steps | Literal["epoch"] | None


@dataclass(frozen=True)
class Optimisation:
    """How the steps of a run are taken.

    optimizer: a name of `effzoo.train.optimizers.OPTIMIZERS`, AdamW by default (Loshchilov & Hutter 2019, Decoupled
        weight decay, arXiv:1711.05101); or a function of parameter groups, `[{"params": ..., "lr": ...,
        "weight_decay": ...}]`, that returns a torch.optim.Optimizer.
    rates: {pattern of a parameter's name: factor on its learning rate}; the first that fits counts. `{"*.lora.B": 16}`
        is LoRA+ (Hayou et al. 2024, arXiv:2402.12354).
    gradient_accumulation: batches that each process adds up for one step.
    weight_decay: of matrices; biases and norms have none.
    clip: the largest norm of the gradient of a step; None for no limit.
    warmup: steps (an int), or a share of the steps (a float below 1), in which the learning rate rises from 0.
    schedule: how the learning rate goes on after the warmup: to 0 ("linear", "cosine", ...), or "constant". The names
        are those of transformers.get_scheduler, whose "constant_with_warmup" is "constant" here.
    schedule_options: of that schedule, as `{"num_cycles": 3}` of "cosine_with_restarts". "warmup_stable_decay" needs
        num_decay_steps, "cosine_with_min_lr" min_lr or min_lr_rate.
    calibration_batches: optimizer steps whose examples are shown, before the first step, to methods that choose by
        looking at data (FISH masks, prefixes, ...). Every process reads all of them, batch_size at a time, so that the
        start does not depend on how a step is spread over processes and accumulated batches.

    Raises OptionError.
    """

    optimizer: str | Callable[..., Any] = "adamw"
    rates: Mapping[str, Positive] = field(default_factory=dict)
    gradient_accumulation: Steps = 1
    weight_decay: NotNegative = 0.01
    clip: Positive | None = 1.0
    warmup: Warmup = 0.06
    schedule: Literal[
        "linear", "cosine", "constant", "polynomial", "inverse_sqrt", "cosine_with_restarts", "cosine_with_min_lr",
        "warmup_stable_decay",
    ] = "linear"  # fmt: skip
    schedule_options: Mapping[str, Any] = field(default_factory=dict)
    calibration_batches: Steps = 8

    def __post_init__(self) -> None:
        check_fields(self, "optimisation")
        if isinstance(self.optimizer, str) and self.optimizer not in OPTIMIZERS:
            raise OptionError(
                f"optimisation: there is no optimizer {shown(self.optimizer)}"
                f"{did_you_mean(self.optimizer, OPTIMIZERS)} Optimizers: {listing(OPTIMIZERS)}, or a function of "
                "parameter groups"
            )
        check_options(self.schedule, self.schedule_options)


@dataclass(frozen=True)
class Saving:
    """When a run is evaluated, saved and logged, and which checkpoints stay.

    evaluate_every, save_every: optimizer steps, "epoch", or None. Both also happen at the end, unless save_every is
        None.
    log_every: optimizer steps; an entry of the history is the mean loss of that many. None for every tenth, and for
        ten entries, or one a step, in a run of less than 100.
    log_with: the names of trackers, which accelerate starts ("tensorboard", "wandb", "trackio", ...), or trackers of
        your own (accelerate.tracking.GeneralTracker). They get every entry of the history.
    eval_batch_size: examples per process; None is batch_size.
    keep: how many checkpoints stay, the newest; None for all.
    best: the evaluation metric ("loss", "accuracy", ...) by which a best checkpoint is kept besides, and loaded at the
        end. Each evaluation then writes a checkpoint. Those of an adapter that training has not brought to its final
        form (an earlier stage, a network that is not pruned yet) do not count.
    patience: end the run after so many evaluations in a row that were no better (early stopping); needs best.
    overwrite: remove the checkpoints of an earlier run.

    Raises OptionError.
    """

    evaluate_every: Every = "epoch"
    save_every: Every = "epoch"
    log_every: Steps | None = None
    log_with: str | Sequence[Any] = ()
    eval_batch_size: Steps | None = None
    keep: Steps | None = 2
    best: str | None = None
    patience: Steps | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "saving")
        if self.patience is not None and self.best is None:
            raise OptionError(f"saving: patience={self.patience} counts evaluations that are no better; give best")
        check_trackers(self.trackers)

    def logs_every(self, steps: int) -> int:
        """After how many steps a run of `steps` logs."""
        return self.log_every or min(10, max(1, steps // 10))

    @property
    def trackers(self) -> list[Any]:
        return [self.log_with] if isinstance(self.log_with, str) else list(self.log_with)


def check_trackers(given: Sequence[Any]) -> None:
    """Refuse trackers that accelerate would leave out. Raises OptionError."""
    if not given:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

    known, installed = list(LOGGER_TYPE_TO_CLASS), [str(tracker) for tracker in get_available_trackers()]
    for tracker in given:
        if isinstance(tracker, GeneralTracker):
            continue
        if tracker not in known:
            close = did_you_mean(tracker, known) if isinstance(tracker, str) else ""
            raise OptionError(
                f"saving: log_with takes names of trackers or instances of accelerate.tracking.GeneralTracker, got "
                f"{shown(tracker)}{close} Known: {listing(known)}."
            )
        if tracker not in installed:
            raise OptionError(f"saving: log_with={tracker!r} is not installed; pip install {tracker}")


MOVED = {  # keywords that `finetune` had -> what takes each
    **{name: f"optimisation=effzoo.train.Optimisation({name}=...)" for name in annotations_of(Optimisation)},
    **{name: f"saving=effzoo.train.Saving({name}=...)" for name in annotations_of(Saving)},
    "gradient_checkpointing": "recompute='blocks'",
}


def check_fields(settings: Any, name: str) -> None:
    """Compare every field of a frozen dataclass with its annotation, and make numbers of numpy those of Python.

    Raises OptionError, in which the settings have this name.
    """
    for setting, annotation in annotations_of(type(settings)).items():
        value = plain(getattr(settings, setting))
        if wrong := problem(value, annotation):
            raise OptionError(f"{name}: {setting} {wrong}")
        object.__setattr__(settings, setting, value)


def moved(places: Mapping[str, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """The function, which refuses keywords that it had once. Raises OptionError.

    places: by keyword, what to write instead.
    """

    def refusing(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def refuses(*arguments: P.args, **keywords: P.kwargs) -> R:
            for name in places.keys() & keywords.keys():
                raise OptionError(f"{function.__name__} has no {name} any more; write {places[name]}")
            return function(*arguments, **keywords)

        return refuses

    return refusing
