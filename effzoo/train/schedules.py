"""How the learning rate goes on over the steps of a stage, by transformers' names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from effzoo.annotations import Count, problem
from effzoo.errors import OptionError, did_you_mean, listing, shown

SCHEDULES = {  # our name -> that of transformers.get_scheduler
    "linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup", "polynomial": "polynomial",
    "inverse_sqrt": "inverse_sqrt", "cosine_with_restarts": "cosine_with_restarts",
    "cosine_with_min_lr": "cosine_with_min_lr", "warmup_stable_decay": "warmup_stable_decay",
}  # fmt: skip
GIVEN = ("optimizer", "num_warmup_steps", "num_training_steps", "num_stable_steps", "last_epoch")  # by the run


def make_schedule(
    name: str, options: Mapping[str, Any], optimizer: torch.optim.Optimizer, warmup: int, steps: int
) -> LRScheduler:
    """The schedule over so many steps, the first ones warmup."""
    from transformers import get_scheduler  # takes seconds

    return get_scheduler(SCHEDULES[name], optimizer, warmup, steps, dict(options))


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise OptionError for options that a schedule does not have, that it lacks, or that would do nothing."""
    from transformers import SchedulerType
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    what = f"optimisation: the schedule {name!r}"
    parameters = inspect.signature(cast(Any, TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(SCHEDULES[name])])).parameters
    known = [option for option in parameters if option not in GIVEN]
    for option in options:
        if option not in known:
            raise OptionError(
                f"{what} does not take the option {shown(option)}{did_you_mean(option, known)} Options: "
                f"{listing(known) if known else 'none'}."
            )
    for option in known:
        if parameters[option].default is inspect.Parameter.empty and option not in options:
            raise OptionError(f"{what} needs the option {option}; schedule_options={{{option!r}: ...}}")
    if name == "cosine_with_min_lr" and ("min_lr" in options) == ("min_lr_rate" in options):
        raise OptionError(f"{what} needs one of the options min_lr and min_lr_rate; schedule_options={{'min_lr': ...}}")
    if "num_cycles" in options and options.get("decay_type", "cosine") != "cosine":
        raise OptionError(f"{what}: num_cycles does nothing with decay_type={options['decay_type']!r}; leave it out")
    decay = options.get("num_decay_steps", 1)
    if wrong := problem(decay, Count):
        raise OptionError(f"{what}: num_decay_steps {wrong}")
    check_steps(name, options, 1e9, 1, 9 + decay)


def check_steps(name: str, options: Mapping[str, Any], rate: float, warmup: int, steps: int) -> None:
    """Raise OptionError for options that do not fit to a learning rate and a number of steps."""
    what = f"optimisation: the schedule {name!r} with schedule_options={shown(dict(options))}"
    decay = options.get("num_decay_steps", 1)
    if decay > steps - warmup:
        raise OptionError(f"{what}: of {steps} steps, {warmup} of them warmup, at most {steps - warmup} can be decay")
    if "warmup_type" in options and not warmup:
        raise OptionError(f"{what}: warmup_type does nothing without warmup; leave it out")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
    try:
        factor_at = cast(LambdaLR, make_schedule(name, options, optimizer, warmup, steps)).lr_lambdas[0]
        factors = {step: factor_at(step) for step in range(0, steps, -(-steps // 100))}
    except (TypeError, ValueError, ArithmeticError) as error:
        raise OptionError(f"{what}: {error}") from None
    for step, factor in factors.items():
        if not 0 <= factor <= 1 + 1e-9:
            raise OptionError(
                f"{what} multiplies the learning rate {rate:g} by {factor:.3g} at step {step} of {steps}, and such a "
                "factor is from 0 to 1"
            )
