"""What few PEFT modules need besides their hooks: `class Mine(Packed, PeftModule)`."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Positionwise:
    """`before` and `after` compute each position from that position alone.

    The last block then computes only the positions that the head reads. A subclass that overrides the hooks has to
    derive from Positionwise again.
    """


class Packed(abc.ABC):
    """A file holds less than the module's state dict: indices and values, bits."""

    @abc.abstractmethod
    def packed(self) -> dict[str, Tensor] | None:
        """What a file needs to hold; None for the state dict itself."""

    @abc.abstractmethod
    def unpack(self, tensors: dict[str, Tensor]) -> None:
        """Take what `packed` gave. Raises KeyError or ValueError for tensors that do not fit."""


class Counted(abc.ABC):
    """Merging changes only some entries of weight and bias."""

    @abc.abstractmethod
    def changed(self, weight: Tensor | None, bias: Tensor | None) -> int | None:
        """How many entries of the site's weight and bias merging may change; None: all of those it touches."""


class Growing(abc.ABC):
    """The site's weight may grow under the module (`effzoo.resize_vocabulary`)."""

    @abc.abstractmethod
    def grow(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """The site's weight and bias got these entries at their ends: add as many, without effect at first."""

    def replaces(self) -> Sequence[int]:
        """Entries of the site's weight that the module replaces."""
        return ()


class OwnOutputs(abc.ABC):
    """The module may replace the site's weight by one with another number of outputs (a task head)."""

    @property
    @abc.abstractmethod
    def own_outputs(self) -> int | None:
        """Outputs of the module's weight; None where it changes the site's."""

    @abc.abstractmethod
    def renew(self, outputs: int) -> None:
        """Start with a new weight of so many outputs, where `own_outputs` is not None."""


def own_outputs(module: nn.Module) -> int | None:
    """`own_outputs` of a module; None where it changes the site's weight."""
    return module.own_outputs if isinstance(module, OwnOutputs) else None


def longer(parameter: nn.Parameter, more: Tensor, dim: int = 0) -> nn.Parameter:
    """A parameter with more entries at the end of an axis."""
    tensor = torch.cat([parameter.detach(), more.to(parameter)], dim=dim)
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)
