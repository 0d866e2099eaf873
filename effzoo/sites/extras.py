"""What few PEFT modules need besides their hooks: `class Mine(Packed, PeftModule)`."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Positionwise:
    """`before` and `after` compute each position from that position alone: where a head reads a few, the last block
    computes these alone.

    Said by the class that defines them, and not inherited by one that defines them anew.
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
    """Merging changes some entries of the tensors that it touches, not all."""

    @abc.abstractmethod
    def changed(self, weight: Tensor | None, bias: Tensor | None) -> int | None:
        """How many entries of the site's weight and bias merging may change; None for every entry of the tensors that
        it touches."""


class Growing(abc.ABC):
    """The module can follow a site whose weight gets more rows (`effzoo.resize_vocabulary`)."""

    @abc.abstractmethod
    def grow(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """The site's weight and bias got these rows at their ends; take as many more, so that nothing changes there
        yet."""

    def replaces(self) -> Sequence[int]:
        """Rows of the site's weight that it puts rows of its own in the place of, whatever they are."""
        return ()


class OwnOutputs(abc.ABC):
    """The module may put a weight of its own in the place of the site's, which can then have another number of outputs
    (a task head)."""

    @property
    @abc.abstractmethod
    def own_outputs(self) -> int | None:
        """Of how many outputs that weight is; None where the module changes the site's own."""

    @abc.abstractmethod
    def renew(self, outputs: int) -> None:
        """Start anew with a weight of so many outputs. Only for what has `own_outputs`."""


def own_outputs(module: nn.Module) -> int | None:
    """Of how many outputs the weight is that a module puts in the place of its site's; None where it changes the site's
    own."""
    return module.own_outputs if isinstance(module, OwnOutputs) else None


def longer(parameter: nn.Parameter, rows: Tensor, dim: int = 0) -> nn.Parameter:
    """A parameter with rows (or columns, dim=1) added at its end."""
    return nn.Parameter(
        torch.cat([parameter.detach(), rows.to(parameter)], dim=dim), requires_grad=parameter.requires_grad
    )
