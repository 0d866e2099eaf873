"""The parts of a run: its stages with their steps, the learning rates of their parameters, and the model that changes
between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from effzoo.errors import OptionError
from effzoo.peft.attach import acting, attached
from effzoo.peft.training import timetable
from effzoo.peft.training_hooks import Stage, TrainingHooks


@dataclass(frozen=True)
class Part:
    """A stage of a run: steps `start` (0 for the first of the run) to `end` - 1, of which the first `warmup` raise the
    learning rate."""

    stage: Stage
    start: int
    steps: int
    warmup: int

    @property
    def end(self) -> int:
        return self.start + self.steps


def parts(model: nn.Module, total: int, warmup: float | int) -> list[Part]:
    """The parts of a run of `total` steps. warmup: steps in each stage, or a share (float) of each, which never takes
    all of them.

    Raises TrainingError for more stages than steps, OptionError for a warmup at whose end no step is left: nothing
        would learn at its rate.
    """
    found: list[Part] = []
    for stage, steps in timetable(model, total):
        start = found[-1].end if found else 0
        rising = warmup if isinstance(warmup, int) else min(math.ceil(warmup * steps), steps - 1)
        if rising >= steps:
            of = f" of the stage {stage.name!r}" if stage.name else ""
            raise OptionError(
                f"warmup of {rising} steps takes all {steps} steps{of}; give fewer steps of warmup, or a share of "
                "the steps (a float below 1)"
            )
        found.append(Part(stage, start, steps, rising))
    return found


def used(model: nn.Module, given: float | None) -> dict[str, Any]:
    """What the record of a run says of its learning rates: the given one or each method's own, and the factors that
    methods have for tensors."""
    methods = {f"{name}.{method.name}": method for name in acting(model) for method, _ in attached(model)[name].methods}
    record: dict[str, Any] = {
        "learning_rate": {name: method.learning_rate for name, method in methods.items()} if given is None else given
    }
    factors = {
        name: dict(method.rates)
        for name, method in methods.items()
        if isinstance(method, TrainingHooks) and method.rates
    }
    return {**record, "rates": factors} if factors else record


def groups(
    model: nn.Module, decayed: Set[str], rates: Mapping[str, float], rate: float, decay: float
) -> list[dict[str, Any]]:
    """The trainable parameters as groups of one learning rate each: those with weight decay first, then those without.

    decayed: names with weight decay.
    rates: by name, `rate` for all others.
    """
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for wanted in (True, False):
        for name, parameter in named:
            if (name in decayed) == wanted:
                found.setdefault((decay if wanted else 0.0, rates.get(name, rate)), []).append(parameter)
    return [
        {"params": parameters, "lr": own, "weight_decay": own_decay} for (own_decay, own), parameters in found.items()
    ]


class Current(nn.Module):
    """The model as the running stage wraps it; Trainer's loop holds on to one object from the first step to the
    last."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Any) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.inner(**inputs)
        return outputs

    def no_sync(self) -> AbstractContextManager[None]:
        """Gradients stay in their process."""
        own = getattr(self.inner, "no_sync", nullcontext)
        context: AbstractContextManager[None] = own()
        return context
