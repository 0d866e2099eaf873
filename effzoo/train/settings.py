"""The settings of a run: what they may be is checked before anything is read or written.

`Optimisation` and `Saving` hold those that few people set; `finetune` takes the others as keywords.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

from effzoo.annotations import NotNegative, Positive, Probability, Range, annotations_of, plain, problem
from effzoo.errors import OptionError

P = ParamSpec("P")
R = TypeVar("R")

LARGEST = 2**31 - 1  # of a count: what 32 bits hold
Steps = Annotated[int, Range(1, LARGEST)]
Warmup = Annotated[int, Range(0, LARGEST)] | Probability
Every = Steps | Literal["epoch"] | None


@dataclass(frozen=True)
class Optimisation:
    """How AdamW takes the steps of a run (Loshchilov & Hutter 2019, Decoupled weight decay, arXiv:1711.05101).

    gradient_accumulation: batches that each process adds up for one step.
    weight_decay: of matrices; biases and norms have none.
    clip: the largest norm of the gradient of a step; None for no limit.
    warmup: steps (an int), or a share of the steps (a float below 1), in which the learning rate rises from 0.
    schedule: the learning rate after the warmup falls to 0 ("linear", "cosine") or stays ("constant").
    calibration_batches: batches of training examples for methods that choose by looking at data (FISH masks, ...),
        before the first step; the same in every process.

    Raises OptionError.
    """

    gradient_accumulation: Steps = 1
    weight_decay: NotNegative = 0.01
    clip: Positive | None = 1.0
    warmup: Warmup = 0.06
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    calibration_batches: Steps = 8

    def __post_init__(self) -> None:
        check_fields(self, "optimisation")


@dataclass(frozen=True)
class Saving:
    """When a run is evaluated, saved and logged, and which checkpoints stay.

    evaluate_every, save_every: optimizer steps, "epoch", or None. Both also happen at the end, unless save_every is
        None.
    log_every: optimizer steps; an entry of the history is the mean loss of that many.
    eval_batch_size: examples per process; None is batch_size.
    keep: how many checkpoints stay, the newest; None for all.
    best: the evaluation metric ("loss", "accuracy", ...) by which a best checkpoint is kept besides, and loaded at the
        end. Each evaluation then writes a checkpoint. Those of an adapter that training has not brought to its final
        form (an earlier stage, a network that is not pruned yet) do not count.
    overwrite: remove the checkpoints of an earlier run.

    Raises OptionError.
    """

    evaluate_every: Every = "epoch"
    save_every: Every = "epoch"
    log_every: Steps = 10
    eval_batch_size: Steps | None = None
    keep: Steps | None = 2
    best: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "saving")


MOVED = {  # keywords that `finetune` had -> what takes each
    **{name: f"optimisation=effzoo.train.Optimisation({name}=...)" for name in annotations_of(Optimisation)},
    **{name: f"saving=effzoo.train.Saving({name}=...)" for name in annotations_of(Saving)},
    "gradient_checkpointing": "recompute='blocks'",
}


def check_fields(settings: Any, name: str) -> None:
    """Compare every field of a frozen dataclass with its annotation, and make numbers of numpy those of Python.

    Raises OptionError, in which the settings have this name.
    """
    for field, annotation in annotations_of(type(settings)).items():
        value = plain(getattr(settings, field))
        if wrong := problem(value, annotation):
            raise OptionError(f"{name}: {field} {wrong}")
        object.__setattr__(settings, field, value)


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


def whole(name: str, value: Any, *, least: int, most: int = LARGEST) -> int:
    """An integer in a range. Raises OptionError."""
    integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if integer and value > most:
        raise OptionError(f"{name} is an integer from {least} to {most:,}, got {value!r}")
    if not integer or value < least:
        raise OptionError(f"{name} is an integer of at least {least}, got {value!r}")
    return int(value)


def whole_or_none(name: str, value: Any, *, least: int) -> int | None:
    """An integer of at least so much, or None. Raises OptionError."""
    return None if value is None else whole(name, value, least=least)


def number(name: str, value: Any, meaning: str, fits: Callable[[float], bool]) -> float:
    """A finite number of which something holds; meaning: that, in words. Raises OptionError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not _finite(value) or not fits(float(value)):
        raise OptionError(f"{name} is {meaning}, got {value!r}")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def number_or_none(name: str, value: Any, meaning: str, fits: Callable[[float], bool]) -> float | None:
    """A finite number of which something holds, or None. Raises OptionError."""
    return None if value is None else number(name, value, meaning, fits)


def folder(name: str, value: Any) -> Path:
    """A folder, which may not be there yet. Raises OptionError."""
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise OptionError(f"{name} is the path of a folder, got {value!r}")
    path = Path(value)
    if path.exists() and not path.is_dir():
        raise OptionError(f"{name} is the path of a folder, and {path} is a file")
    return path


def callbacks_of(value: Any) -> list[Any]:
    """Callbacks of transformers, instances or classes. Raises OptionError."""
    from transformers import TrainerCallback

    if not isinstance(value, Sequence) or isinstance(value, str):
        raise OptionError(f"callbacks is a list of transformers.TrainerCallback, got {value!r}")
    for callback in value:
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise OptionError(f"callbacks is a list of transformers.TrainerCallback, got one {callback!r}")
    return list(value)


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False
