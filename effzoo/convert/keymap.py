"""Reversible key maps: rules between our module paths and those of a layout of transformers, written as data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from effzoo.errors import ConversionError

PARAMETERS = ("weight", "bias")
Layers = int | Mapping[str, int]  # how many blocks there are, of several stacks by the letter of their number


@dataclass(frozen=True)
class Rule:
    """The parameters of our modules `ours` are those of their module `theirs`.

    In the paths, `{i}` stands for the number of a block (`{j}` in the decoder behind an encoder) and `{base}` for the
    prefix that the body has inside a model with a head. Several modules of ours are stacked along the outputs of one
    of theirs. transposed: theirs stores its weight as [in, out].
    first: the first block that has these modules.
    parameters: those that the rule speaks of.
    optional: some models have no such module.
    axis: their module is the bare tensor of one axis of a grid, (this axis, of how many), with a length of 1 along
        the others.
    experts: how many of ours `{e}` stands for, where their module is one bare tensor [experts, outputs, inputs] of
        all experts; 0: it is none.
    row: their module is a bare tensor [1, n], of which ours is the row.
    square: the first of ours has as many outputs as inputs, and the others share the rest alike; else all are alike.
    """

    ours: tuple[str, ...]
    theirs: str
    transposed: bool = False
    first: int = 0
    parameters: tuple[str, ...] = PARAMETERS
    optional: bool = False
    axis: tuple[int, int] | None = None
    row: bool = False
    square: bool = False
    experts: int = 0

    def key(self, parameter: str) -> str:
        """Their key of a parameter."""
        return self.theirs if self.axis or self.row or self.experts else f"{self.theirs}.{parameter}"

    def whole(self, parameter: str) -> bool:
        """Whether our tensor is theirs, row for row."""
        return (
            len(self.ours) == 1
            and self.axis is None
            and not self.row
            and not self.experts
            and not (self.transposed and parameter == "weight")
        )

    def split(self, parameter: str, theirs: Tensor) -> tuple[Tensor, ...]:
        """Their tensor as our tensors, in the order of `ours`."""
        if self.axis:
            return (theirs.flatten(0, -2),)
        if self.experts:
            if theirs.ndim != 3 or len(theirs) != self.experts:
                raise ConversionError(
                    f"{self.theirs} holds {len(theirs)} experts, and the model has {self.experts}; build it with "
                    f"experts={len(theirs)}"
                )
            return theirs.flatten(0, 1).chunk(len(self.ours))
        if self.row:
            return (theirs[0],)
        stacked = theirs.t() if self.transposed and parameter == "weight" else theirs
        if self.square:
            first, others = stacked.shape[1], len(self.ours) - 1
            return torch.split(stacked, [first, *[(len(stacked) - first) // others] * others])
        return stacked.chunk(len(self.ours))

    def join(self, parameter: str, ours: Iterable[Tensor]) -> Tensor:
        """Our tensors as their tensor: the inverse of `split`."""
        stacked = torch.cat(tuple(ours))
        if self.experts:
            return stacked.reshape(self.experts, -1, stacked.shape[-1])
        if self.row:
            return stacked[None]
        if self.axis:
            place, axes = self.axis
            return stacked[(None,) * place + (slice(None),) + (None,) * (axes - 1 - place)]
        return stacked.t().contiguous() if self.transposed and parameter == "weight" else stacked


def same(modules: Mapping[str, str]) -> tuple[Rule, ...]:
    """One rule for each pair {our path: their path} of modules that hold the same tensors."""
    return tuple(Rule((ours,), theirs) for ours, theirs in modules.items())


def expand(rules: Iterable[Rule], layers: Layers, base: str, experts: int = 0) -> Iterator[Rule]:
    """The rules with `{i}`, `{base}` and `{e}` filled in; experts: of each layer, without any of which their rules are
    left out."""
    counts = {"i": layers} if isinstance(layers, int) else layers
    for rule in rules:
        if any("{e}" in path for path in rule.ours):
            if not experts:
                continue
            every = (path.replace("{e}", str(e)) for e in range(experts) for path in rule.ours)
            rule = replace(rule, ours=tuple(every), experts=experts)
        letter = next((letter for letter in counts if f"{{{letter}}}" in rule.theirs), None)
        for number in (0,) if letter is None else range(rule.first, counts[letter]):
            ours = tuple(path.replace(f"{{{letter}}}", str(number)) for path in rule.ours)
            theirs = rule.theirs.replace(f"{{{letter}}}", str(number)).replace("{base}", base)
            yield replace(rule, ours=ours, theirs=theirs)


def to_ours(rules: Iterable[Rule], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict under our keys; keys without a rule are left out."""
    ours: dict[str, Tensor] = {}
    for rule in rules:
        for parameter in rule.parameters:
            tensor = theirs.get(rule.key(parameter))
            if tensor is not None:
                ours.update(
                    zip((f"{path}.{parameter}" for path in rule.ours), rule.split(parameter, tensor), strict=True)
                )
    return ours


def to_theirs(rules: Iterable[Rule], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under their keys; keys without a rule are left out."""
    theirs: dict[str, Tensor] = {}
    for rule in rules:
        for parameter in rule.parameters:
            tensors = [ours[key] for path in rule.ours if (key := f"{path}.{parameter}") in ours]
            if len(tensors) == len(rule.ours):
                theirs[rule.key(parameter)] = rule.join(parameter, tensors)
    return theirs


def trained(model: nn.Module) -> dict[str, bool]:
    """Whether each parameter learns, under all of its names."""
    return {key: parameter.requires_grad for key, parameter in model.named_parameters(remove_duplicate=False)}


def trained_in_ours(rules: Iterable[Rule], theirs: Mapping[str, bool]) -> dict[str, bool]:
    """What `trained` says of their parameters, under our keys: parts of one tensor learn as the whole does."""
    ours: dict[str, bool] = {}
    for rule in rules:
        for parameter in rule.parameters:
            if (flag := theirs.get(rule.key(parameter))) is not None:
                ours.update({f"{path}.{parameter}": flag for path in rule.ours})
    return ours


def trained_in_theirs(rules: Iterable[Rule], ours: Mapping[str, bool]) -> dict[str, bool]:
    """What `trained` says of our parameters, under their keys.

    Raises ConversionError where some parts of one tensor of theirs learn and others do not.
    """
    theirs: dict[str, bool] = {}
    for rule in rules:
        for parameter in rule.parameters:
            parts = {key: ours[key] for path in rule.ours if (key := f"{path}.{parameter}") in ours}
            if len(set(parts.values())) > 1:
                frozen, learning = (
                    ", ".join(key for key, flag in parts.items() if flag is wanted) for wanted in (False, True)
                )
                raise ConversionError(
                    f"{rule.key(parameter)} of transformers holds several tensors of ours, of which {frozen} is "
                    "frozen (requires_grad=False) and "
                    f"{learning} is not: freeze all of them, or none"
                )
            if parts:
                theirs[rule.key(parameter)] = all(parts.values())
    return theirs
