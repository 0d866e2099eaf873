"""Reversible key maps: rules between our module paths and those of a layout of transformers, written as data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

PARAMETERS = ("weight", "bias")


@dataclass(frozen=True)
class Rule:
    """The parameters of our modules `ours` are those of their module `theirs`.

    In the paths, `{i}` stands for the number of a block and `{base}` for the prefix that the body has inside a model with a head. Several
    modules of ours are stacked along the outputs of one of theirs. transposed: theirs stores its weight as [in, out].
    first: the first block that has these modules.
    """

    ours: tuple[str, ...]
    theirs: str
    transposed: bool = False
    first: int = 0

    def split(self, parameter: str, theirs: Tensor) -> tuple[Tensor, ...]:
        """Their tensor as our tensors, in the order of `ours`."""
        stacked = theirs.t() if self.transposed and parameter == "weight" else theirs
        return stacked.chunk(len(self.ours))

    def join(self, parameter: str, ours: Iterable[Tensor]) -> Tensor:
        """Our tensors as their tensor: the inverse of `split`."""
        stacked = torch.cat(tuple(ours))
        return stacked.t().contiguous() if self.transposed and parameter == "weight" else stacked


def same(modules: Mapping[str, str]) -> tuple[Rule, ...]:
    """One rule for each pair {our path: their path} of modules that hold the same tensors."""
    return tuple(Rule((ours,), theirs) for ours, theirs in modules.items())


def expand(rules: Iterable[Rule], layers: int, base: str) -> Iterator[Rule]:
    """The rules with `{i}` and `{base}` filled in."""
    for rule in rules:
        for i in range(rule.first, layers) if "{i}" in rule.theirs else (0,):
            ours = tuple(path.replace("{i}", str(i)) for path in rule.ours)
            yield Rule(ours, rule.theirs.replace("{i}", str(i)).replace("{base}", base), rule.transposed)


def to_ours(rules: Iterable[Rule], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict under our keys; keys without a rule are left out."""
    ours: dict[str, Tensor] = {}
    for rule in rules:
        for parameter in PARAMETERS:
            tensor = theirs.get(f"{rule.theirs}.{parameter}")
            if tensor is not None:
                ours.update(zip((f"{path}.{parameter}" for path in rule.ours), rule.split(parameter, tensor), strict=True))
    return ours


def to_theirs(rules: Iterable[Rule], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under their keys; keys without a rule are left out."""
    theirs: dict[str, Tensor] = {}
    for rule in rules:
        for parameter in PARAMETERS:
            tensors = [ours[key] for path in rule.ours if (key := f"{path}.{parameter}") in ours]
            if len(tensors) == len(rule.ours):
                theirs[f"{rule.theirs}.{parameter}"] = rule.join(parameter, tensors)
    return theirs
