"""What a method may do during training; `effzoo/peft/training.py` calls these hooks, for `finetune` and for a loop of
one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from effzoo.peft.method import Batches, Method, Modules

HOOKS = ("calibrate", "schedule", "penalty", "begin", "finish")


@dataclass(frozen=True)
class Stage:
    """One part of the training: its name, and its share of all steps. Each begins with a fresh optimizer and a learning
    rate that starts anew."""

    name: str
    share: float


class TrainingHooks(Method):
    """A method that takes part in training: it looks at data first, prunes or anneals on the way, has stages, or drops
    what only training needed."""

    rates: Mapping[str, float] = {}  # pattern of a tensor's name in the module -> factor on the learning rate
    stages: Sequence[Stage] = ()  # parts of the training, for methods that train differently over time
    # of a `schedule`: from this share of the (last) stage on, the adapter is what the options say
    schedule_ends: float = 1.0
    consistency: float = 0.0  # weight of the symmetric KL divergence between two forward passes of one batch (AdaMix)

    def hooks_in_use(self) -> set[str]:
        """The hooks below that do something with the options at hand: no data are asked for where none are looked
        at."""
        return {hook for hook in HOOKS if getattr(type(self), hook) is not getattr(TrainingHooks, hook)}

    def calibrate(self, model: nn.Module, modules: Modules, batches: Batches) -> None:
        """Look at labelled batches (keyword arguments of the model) before training: choose a mask, an initial
        value."""

    def schedule(self, modules: Modules, progress: float) -> None:
        """Called before every optimizer step with the share of the training (of this stage) that is done, in [0, 1)."""

    def penalty(self, modules: Modules) -> Tensor | None:
        """A scalar that is added to the loss of every optimizer step."""
        return None

    def begin(self, stage: str, modules: Modules) -> None:
        """Called when a stage begins, before its first step."""

    def finish(self, modules: Modules) -> None:
        """Called once after training: drop what only training needed. Shapes afterwards must follow from the options
        alone."""


def uses(method: Method, hook: str) -> bool:
    """Whether a method does something at this hook of the training."""
    return isinstance(method, TrainingHooks) and hook in method.hooks_in_use()
