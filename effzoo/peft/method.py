"""The contract of a PEFT method: where it hangs, and what it hangs there.

A method is a class whose options are the keyword-only parameters of its constructor. `make(site)` returns the PeftModule to hang on
one site; which doors that module opens (parameter, input, function: `effzoo/sites`) is the whole method. `attach`
does the rest: targets by role, freezing, names, files, merging. Methods that take part in training override hooks as well;
`effzoo/peft/training.py` calls them, for `finetune` and for a loop of one's own.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from effzoo.errors import TargetError
from effzoo.sites import PeftModule, Site

Targets = str | Sequence[str] | None
Layers = int | Sequence[int] | None
Modules = Mapping[str, PeftModule]  # what a method has hung, by the path of the site
ALL_LINEAR = "all-linear"  # as a target: every linear layer of the blocks
HEAD = "head.*"  # roles of the task head, which an adapter trains whatever its methods are
LABELS = "head.out"  # the layer of it that has an output for each label
Batches = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Stage:
    """One part of the training: its name, and its share of all steps. Each begins with a fresh optimizer and a learning rate that starts anew."""

    name: str
    share: float


class Method(abc.ABC):
    """One PEFT method. Options that most methods share:

    targets: role patterns such as `attn.q` or `attn.*` (`effzoo.peft.roles(model)` lists them); None means `default_targets`. A pattern matches a
    whole role, `*` any characters in it, dots too, `?` one, `[qv]` one of these; upper and lower case differ. It takes in what a model has:
    `attn.q` the queries alone, `attn.q*` the global ones too. `all-linear` is every linear layer of the blocks, whatever its role and also those
    that an attention kind or an architecture adds, but nothing outside the blocks: no head, no embedding.
    layers: block indices, negative ones from the end; None means every block. A given pattern that matches nothing, or
    only in some of the layers, is an error.

    An instance belongs to one adapter of one model: what `prepare` or the first `make` creates can be shared by the modules (a parameter
    registered in several of them is trained, stored and counted once).
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    identity_at_init: bool = True  # whether the model's output is unchanged right after attaching; an option may change it
    default_targets: ClassVar[tuple[str, ...]] = ()  # those that a model lacks are passed over, unlike given ones
    accepts: ClassVar[tuple[type[Site], ...]] = (Site,)  # site types on which the method can hang
    zero_gradient: Mapping[str, str] = {}  # pattern of role.tensor -> why its gradient vanishes by mathematics
    alike: ClassVar[str] = ""  # why two modules of this method may do the same at a site, so that a router over them learns nothing there
    size: ClassVar[str] = ""  # the option that sets how much is trained (rank, bottleneck, length, share); see `effzoo.peft.within`
    learning_rate: float = 5e-4  # of AdamW when the user gives none
    rates: ClassVar[Mapping[str, float]] = {}  # pattern of a tensor's name in the module -> factor on the learning rate
    settled: float = 1.0  # of a `schedule`: from this share of the (last) stage on, the adapter is what the options say
    idle: Sequence[str] = ()  # hooks below that have nothing to do with the options at hand: no data are asked for in vain
    stages: Sequence[Stage] = ()  # parts of the training, for methods that train differently over time
    settled_options: Mapping[str, Any] = {}  # options whose meaning `prepare` has found in the model, as files and reports shall name them
    targets: tuple[str, ...] | None = None  # what the user gave, of a method whose constructor passes it on
    layers: tuple[int, ...] | None = None
    consistency: float = 0.0  # weight of the symmetric KL divergence between two forward passes of one batch (AdaMix)

    def __init__(self, *, targets: Targets = None, layers: Layers = None):
        self.targets = (targets,) if isinstance(targets, str) else None if targets is None else tuple(targets)
        self.layers = (layers,) if isinstance(layers, int) else None if layers is None else tuple(layers)
        if self.targets == () or self.layers == ():
            raise TargetError(f"{self.name}: targets and layers must not be empty; leave them out for the default")

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        """Called once before `make`, with all sites that were found, by path: for sizes and tensors that concern them together."""

    @abc.abstractmethod
    def make(self, site: Site) -> PeftModule | None:
        """The module to hang on this site, or None when there is nothing to adapt here (a layer without bias, say)."""

    def calibrate(self, model: nn.Module, modules: Modules, batches: Batches) -> None:
        """Look at labelled batches (keyword arguments of the model) before training: choose a mask, an initial value."""

    def schedule(self, modules: Modules, progress: float) -> None:
        """Called before every optimizer step with the share of the training (of this stage) that is done, in [0, 1)."""

    def penalty(self, modules: Modules) -> Tensor | None:
        """A scalar that is added to the loss of every optimizer step."""
        return None

    def begin(self, stage: str, modules: Modules) -> None:
        """Called when a stage begins, before its first step."""

    def finish(self, modules: Modules) -> None:
        """Called once after training: drop what only training needed. Shapes afterwards must follow from the options alone."""
