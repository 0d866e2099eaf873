"""The stages of a run: their steps, the learning rates of their parameters, and the model that changes between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from effzoo.errors import OptionError
from effzoo.peft.training import timetable
from effzoo.peft.training_hooks import Stage


@dataclass(frozen=True)
class StageSpan:
    """A stage with its steps: from `start` (0 is the first of the run) to `end` - 1.

    warmup: in how many of them, the first ones, the learning rate rises.
    """

    stage: Stage
    start: int
    steps: int
    warmup: int

    @property
    def end(self) -> int:
        return self.start + self.steps


def stage_spans(model: nn.Module, total: int, warmup: float | int) -> list[StageSpan]:
    """The stages of a run of `total` steps, one after another.

    warmup: steps in each stage, or a share (float) of each, which never takes all of them.

    Raises TrainingError for more stages than steps, OptionError for a warmup that leaves no step of a stage.
    """
    spans: list[StageSpan] = []
    for stage, steps in timetable(model, total):
        rising = warmup if isinstance(warmup, int) else min(math.ceil(warmup * steps), steps - 1)
        if rising >= steps:
            of = f" of the stage {stage.name!r}" if stage.name else ""
            raise OptionError(
                f"warmup of {rising} steps takes all {steps} steps{of}; give fewer steps of warmup, or a share of "
                "the steps (a float below 1)"
            )
        spans.append(StageSpan(stage, spans[-1].end if spans else 0, steps, rising))
    return spans


def parameter_groups(
    model: nn.Module, decayed: Set[str], rates: Mapping[str, float], rate: float, decay: float
) -> list[dict[str, Any]]:
    """The trainable parameters in groups of one learning rate and one weight decay, for an optimizer.

    decayed: the names of those with weight decay, which come first.
    rates: learning rates by name; all others have `rate`.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    trained.sort(key=lambda entry: entry[0] not in decayed)
    for name, parameter in trained:
        group = (decay if name in decayed else 0.0, rates.get(name, rate))
        groups.setdefault(group, []).append(parameter)
    return [
        {"params": parameters, "lr": learning_rate, "weight_decay": weight_decay}
        for (weight_decay, learning_rate), parameters in groups.items()
    ]


class CurrentModel(nn.Module):
    """The model as the running stage wraps it.

    Trainer's loop holds one object from the first step to the last; `inner` is exchanged when a stage begins.
    """

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Any) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.inner(**inputs)
        return outputs

    def no_sync(self) -> AbstractContextManager[None]:
        """Gradients stay in their process."""
        no_sync = getattr(self.inner, "no_sync", nullcontext)
        context: AbstractContextManager[None] = no_sync()
        return context
