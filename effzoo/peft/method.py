"""The contract of a PEFT method: where it hangs, and what it hangs there.

A method is a class whose options are the keyword-only parameters of its constructor. `make(site)` returns the PeftModule to hang on
one site; which doors that module opens (parameter, input, function: `effzoo/sites.py`) is the whole method. `attach`
does the rest: targets by role, freezing, names, files, merging.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import ClassVar

from effzoo.errors import TargetError
from effzoo.sites import PeftModule, Site

Targets = str | Sequence[str] | None
Layers = int | Sequence[int] | None


class Method(abc.ABC):
    """One PEFT method. Options that most methods share:

    targets: role patterns such as `attn.q` or `attn.*` (`effzoo.peft.roles(model)` lists them); None means `default_targets`.
    layers: block indices, negative ones from the end; None means every block. A given pattern that matches nothing, or
    only in some of the layers, is an error.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    identity_at_init: ClassVar[bool] = True  # whether the model's output is unchanged right after attaching
    default_targets: ClassVar[tuple[str, ...]] = ()  # those that a model lacks are passed over, unlike given ones
    accepts: ClassVar[tuple[type[Site], ...]] = (Site,)  # site types on which the method can hang
    zero_gradient: ClassVar[Mapping[str, str]] = {}  # pattern of role.tensor -> why its gradient vanishes by mathematics

    def __init__(self, *, targets: Targets = None, layers: Layers = None):
        self.targets = (targets,) if isinstance(targets, str) else None if targets is None else tuple(targets)
        self.layers = (layers,) if isinstance(layers, int) else None if layers is None else tuple(layers)
        if self.targets == () or self.layers == ():
            raise TargetError(f"{self.name}: targets and layers must not be empty; leave them out for the default")

    @abc.abstractmethod
    def make(self, site: Site) -> PeftModule | None:
        """The module to hang on this site, or None when there is nothing to adapt here (a layer without bias, say)."""
