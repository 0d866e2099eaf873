"""What a method may do during training; `effzoo/peft/training.py` calls these hooks, and so may a loop of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from effzoo.peft.method import Batches, Method, Modules

HOOKS = ("calibrate", "schedule", "after_backward", "penalty", "begin", "finish")


@dataclass(frozen=True)
class Stage:
    """One part of the training, which begins with a fresh optimizer and a learning rate that starts anew.

    name: of the stage.
    share: of all steps.
    """

    name: str
    share: float


class TrainingHooks(Method):
    """A method that takes part in training: it chooses by data first, prunes on the way, or drops what only training
    needed.

    rates: {pattern of a tensor's name in the module: factor on the learning rate}.
    stages: parts of the training, for methods that train differently over time.
    schedule_ends: of a `schedule`: from this share of the (last) stage on, the adapter is what the options say.
    consistency: weight of the symmetric KL divergence between two forward passes of one batch (AdaMix).
    """

    rates: Mapping[str, float] = {}
    stages: Sequence[Stage] = ()
    schedule_ends: float = 1.0
    consistency: float = 0.0

    def hooks_in_use(self) -> set[str]:
        """The hooks below that do something with the options at hand; without `calibrate`, no data are asked for."""
        return {hook for hook in HOOKS if getattr(type(self), hook) is not getattr(TrainingHooks, hook)}

    def calibrate(self, model: nn.Module, modules: Modules, batches: Batches) -> None:
        """Called before training: choose a mask, or starting values.

        model: in evaluation mode.
        modules: what the method has hung, by path.
        batches: labelled ones, keyword arguments of the model.
        """

    def schedule(self, modules: Modules, progress: float) -> None:
        """Called before every optimizer step. progress: the share of this stage that is done, in [0, 1)."""

    def after_backward(self, modules: Modules) -> None:
        """Called before the optimizer uses the gradients of a step, which the parameters then have, clipped."""

    def penalty(self, modules: Modules) -> Tensor | None:
        """A scalar that is added to the loss of every optimizer step."""
        return None

    def begin(self, stage: str, modules: Modules) -> None:
        """Called when a stage begins, before its first step."""

    def finish(self, modules: Modules) -> None:
        """Called once after training: drop what only training needed; shapes then follow from the options alone."""


def uses(method: Method, hook: str) -> bool:
    """Whether a method does something at this hook of the training."""
    return isinstance(method, TrainingHooks) and hook in method.hooks_in_use()
