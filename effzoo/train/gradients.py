"""Which trained tensors the loss reaches: one without a gradient never moves, however long a run is."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from effzoo.errors import TrainingError
from effzoo.sharding import some

_SHOWN = 6  # patterns of names in a sentence


@dataclass(frozen=True)
class Untouched:
    """The trained tensors that a run did not reach: their sizes by name.

    none: that got no gradient, as nothing that the loss depends on reads them.
    zero: whose gradient was zero throughout.
    of: all that were trained.
    undecided: whose gradient was zero while another tensor was still all zeros and about to move, in a run too short to
        tell; no fault yet.
    """

    none: Mapping[str, int] = field(default_factory=dict)
    zero: Mapping[str, int] = field(default_factory=dict)
    of: Mapping[str, int] = field(default_factory=dict)
    undecided: Mapping[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.none or self.zero)

    def __str__(self) -> str:
        short = (
            "had a gradient of zero while other tensors were still zero, and the run was too short to tell "
            "whether it stays so"
        )
        always = "got a gradient of zero in every step"
        groups = (self.none, "got no gradient"), (self.zero, always), (self.undecided, short)
        sentences = [f"{self._share(sizes)} {what}: {patterns(sizes)}" for sizes, what in groups if sizes]
        return "; ".join(sentences) or "every trained tensor got a gradient"

    def reasons(self) -> dict[str, str]:
        """The names with what became of each."""
        return {
            **dict.fromkeys(self.none, "no gradient"),
            **dict.fromkeys(self.zero, "a gradient of zero in every step"),
        }

    def _share(self, sizes: Mapping[str, int]) -> str:
        numbers, total = sum(sizes.values()), sum(self.of.values())
        return (
            f"{len(sizes)} of {len(self.of)} trained tensors ({numbers:,} of {total:,} numbers, "
            f"{100 * numbers / max(total, 1):.3g} %)"
        )


class Gradients:
    """Looks at the gradients of each step, before the optimizer uses them, until every trained tensor has had one.

    A gradient of zero differs from none: the first factor of LoRA has a gradient of zero while the second is zero,
    which lasts as long as the learning rate is 0. So a zero is judged by a step in which no trained tensor with a
    gradient is still all zeros itself.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.trained: dict[str, int] = {}
        self._left: dict[str, nn.Parameter] = {}  # without a gradient other than zero up to now
        self._zero: set[str] = set()  # of those left, the ones with a gradient of zero
        self._judged: set[str] = set()  # of these, the ones that had it when `_unmoved` was empty
        # all zeros, though they have a gradient: what they are multiplied with has none yet
        self._unmoved: list[nn.Parameter] = []

    def begin(self, model: nn.Module) -> None:
        """A stage begins, in which other parameters may be trained."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name not in self.trained:
                self._left[name] = parameter
                self.trained[name] = parameter.numel()

    def look(self) -> None:
        """Take note of the gradients of one step. Raises TrainingError when nothing has one."""
        self.steps += 1
        self._unmoved = [p for p in self._unmoved if p.requires_grad and not _moved(p)]
        for name, parameter in list(self._left.items()):
            if parameter.grad is not None and _moved(parameter.grad):
                del self._left[name]
                self._zero.discard(name)
                self._judged.discard(name)
                if not _moved(parameter):
                    self._unmoved.append(parameter)
            elif parameter.grad is not None:
                self._zero.add(name)
        if not self._unmoved:
            self._judged |= self._zero
        if self.trained and len(self._left) == len(self.trained) and not self._zero:
            raise TrainingError(
                f"{nothing_reached(self.trained)}; train something that the loss depends on, with other targets or "
                "another attention kind"
            )

    def warn_of_none(self) -> None:
        """After the first step, name what got no gradient."""
        untouched = self.untouched()
        if self.steps == 1 and untouched.none:
            sentence = str(replace(untouched, zero={}, undecided={}))
            logging.getLogger("effzoo").warning("after the first step, %s", sentence)

    def untouched(self) -> Untouched:
        """What had no gradient up to now; nothing before the first step."""
        if not self.steps:
            return Untouched()
        none = {name: self.trained[name] for name in self._left if name not in self._zero}
        zero = {name: self.trained[name] for name in self._left if name in self._judged}
        undecided = {name: self.trained[name] for name in self._left if name in self._zero - self._judged}
        return Untouched(none, zero, dict(self.trained), undecided)

    def check_moved(self) -> None:
        """Raise TrainingError when nothing had a gradient other than zero: the run has learned nothing."""
        if self.steps and len(self._left) == len(self.trained):
            raise TrainingError(f"{self.untouched()}; nothing was learned in {self.steps} steps")


def _moved(tensor: torch.Tensor) -> bool:
    """Whether a number of a tensor is not zero."""
    return some(tensor.detach(), lambda x: x != 0)


def check_reached(loss: torch.Tensor, model: nn.Module) -> None:
    """Raise TrainingError for a loss that depends on nothing that is trained."""
    if not loss.requires_grad:
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        raise TrainingError(nothing_reached(trained))


def nothing_reached(names: Iterable[str]) -> str:
    """That nothing trained has a gradient, in words."""
    return (
        f"the loss depends on nothing that is trained: {patterns(names)} got no gradient; choose other targets or "
        "another attention kind"
    )


def patterns(names: Iterable[str]) -> str:
    """Names without the adapter's part and with `*` for numbers of blocks, each pattern once, the first few."""
    bare = [re.sub(r"\.adapters\.[^.]+", "", name) for name in names]
    starred = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in bare))
    return ", ".join(starred[:_SHOWN]) + (f" and {len(starred) - _SHOWN} more" if len(starred) > _SHOWN else "")


def check_finite(model: nn.Module, step: int, hint: str) -> None:
    """Raise TrainingError when a trained tensor holds a number that is not finite."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and some(parameter.detach(), lambda x: ~torch.isfinite(x)):
            raise TrainingError(f"{name} is not finite after step {step}, so nothing is saved of it; {hint}")
