"""The stages of a run with their steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

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
