"""The contract of a PEFT method: which sites it takes, and which module it hangs on each.

A method is a class whose options are the keyword-only parameters of its constructor. `make(site)` returns the
PeftModule for one site; which hooks that module overrides (`effzoo/sites/hooks.py`) is the whole method. `attach` does
the rest: targets by role, freezing, names, files, merging. Methods that take part in training derive from
`TrainingHooks` (`effzoo/peft/training_hooks.py`) instead.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from effzoo.errors import OptionError, TargetError
from effzoo.sites import Model, PeftModule, Site

Targets = str | Sequence[str] | None
Layers = int | Sequence[int] | None
Modules = Mapping[str, PeftModule]  # what a method has hung, by the path of the site
ALL_LINEAR = "all-linear"  # as a target: every linear layer of the blocks
HEAD = "head.*"  # roles of the task head, which an adapter trains whatever its methods are
LABELS = "head.out"  # the layer of it that has an output for each label
Batches = Iterable[Mapping[str, Any]]
# fmt: off
FORMER = {  # what methods said before, and how it is said now
    "idle": "`hooks_in_use(self)` of TrainingHooks says which hooks of the training do something with these options",
    "settled": "`schedule_ends` of TrainingHooks is the share of the last stage after which the adapter is final",
    "settled_options": "`prepare` returns the options whose meaning it has found in the model",
    "zero_gradient": "tell the checks: effzoo.checks.facts.ZERO_GRADIENT[name] = {pattern: reason}",
    "alike": "tell the checks: effzoo.checks.facts.SAME_AT_START[name] = reason",
}
OF_TRAINING = (
    "calibrate", "schedule", "after_backward", "penalty", "begin", "finish", "stages", "consistency", "rates",
    "schedule_ends", "hooks_in_use",
)
# fmt: on


class Method(abc.ABC):
    """One PEFT method. Options that most methods share:

    targets: role patterns such as `attn.q` or `attn.*` (`effzoo.peft.roles(model)` lists the roles); None for
        `default_targets`. A pattern matches a whole role: `*` any characters, dots too, `?` one, `[qv]` one of these;
        case counts. `all-linear` is every linear layer of the blocks, whatever its role.
    layers: block indices, negative ones from the end; None for every block.

    A given pattern that matches nothing, or only in some of the layers, is an error. What a subclass says of itself:

    accepts: the site types on which it can hang.
    default_targets: role patterns; one that a model lacks is passed over, unlike a given one.
    identity_at_init: whether the model's output is unchanged right after attaching; an option may change it.
    learning_rate: of AdamW, when the user gives none.
    size: the option that sets how much is trained (rank, bottleneck, length); `effzoo.peft.within` fits it to a budget.
    paper: author, year, title, arXiv number, section.

    An instance belongs to one adapter of one model, so what `prepare` or the first `make` creates can be shared by its
    modules: a parameter registered in several of them is trained, stored and counted once.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    size: ClassVar[str] = ""
    accepts: ClassVar[tuple[type[Site], ...]] = (Site,)
    default_targets: tuple[str, ...] = ()
    identity_at_init: bool = True
    learning_rate: float = 5e-4
    targets: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, now in FORMER.items():
            if hasattr(cls, name):
                raise OptionError(f"{cls.__name__} says `{name}`, which is no longer read: {now}")
        training = any(parent.__name__ == "TrainingHooks" for parent in cls.__mro__)
        for name in () if training else OF_TRAINING:
            if hasattr(cls, name):
                subclass = f"class {cls.__name__}(TrainingHooks), from effzoo.peft"
                raise OptionError(
                    f"{cls.__name__} has `{name}`, which is read of methods that take part in training: {subclass}"
                )
        for site in cls.accepts:
            if not (isinstance(site, type) and issubclass(site, Site)):
                raise OptionError(
                    f"{cls.__name__}: accepts is a tuple of site types, such as Linear or MemorySite, got {site!r}"
                )

    def __init__(self, *, targets: Targets = None, layers: Layers = None):
        self.targets = (targets,) if isinstance(targets, str) else None if targets is None else tuple(targets)
        self.layers = (layers,) if isinstance(layers, int) else None if layers is None else tuple(layers)
        if self.targets == () or self.layers == ():
            raise TargetError(f"{self.name}: targets and layers must not be empty; leave them out for the default")

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> Mapping[str, Any] | None:
        """Called once before `make`, for sizes and tensors that concern all sites together.

        model: the model, without wrappers.
        found: the sites on which the method will hang, by path.

        Returns the options whose meaning it has found in the model, as files and reports shall name them, or None.
        """

    @abc.abstractmethod
    def make(self, site: Site) -> PeftModule | None:
        """The module to hang on this site, or None when there is nothing to adapt here (a layer without bias, say)."""


def examples(batches: Batches) -> Iterator[dict[str, Any]]:
    """The examples of batches, one by one, each as a batch of one; of a packed row each document."""
    for batch in batches:
        size = next(value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.ndim)
        whole = {
            key: isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size for key, value in batch.items()
        }
        for i in range(size):
            row = {key: value[i : i + 1] if whole[key] else value for key, value in batch.items()}
            documents = row.pop("document_ids", None)
            for number in () if documents is None else documents[documents > 0].unique_consecutive().tolist():
                yield {key: value[:, documents[0] == number] if whole[key] else value for key, value in row.items()}
            if documents is None:
                yield row


def predicts_next(model: nn.Module, found: Mapping[str, Site]) -> bool:
    """Whether a site among these is in a stack that predicts each token of a text from those before it, so that nothing
    there may read a whole text: that of a language model, or the decoder of an encoder-decoder."""
    if isinstance(getattr(model, "decoder", None), Model):
        return any(path.startswith("decoder.") for path in found)
    return getattr(getattr(model, "config", None), "causal", False) and getattr(model, "task", "") == "causal_lm"
