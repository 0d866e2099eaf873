"""The modules of a model of ours in its twin of transformers, which is what the keys of the `peft` package name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effzoo.architectures import Transformer
from effzoo.convert.keymap import Rule
from effzoo.convert.layouts import layout_for
from effzoo.errors import AdapterError
from effzoo.sites import PeftModule, Site, TiedLinear, sites

KNOWN_TABLES = ("embed_tokens", "lm_head")  # the names of peft's EMBEDDING_LAYER_NAMES
TASK_TYPES = {
    "features": "FEATURE_EXTRACTION",
    "classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "causal_lm": "CAUSAL_LM",
}
Modules = Mapping[str, PeftModule]  # what one adapter has hung, by the path of the site
Config = dict[str, Any]


@dataclass
class Written:
    """What one adapter is in their files.

    config: of adapter_config.json.
    tensors: by key, without the prefix of the base model.
    targets: their modules.
    parts: {their module: a number for each of our modules that it stacks}, the rank that each has of a common low rank,
        say; 0 for one without adapter.
    """

    config: Config = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)
    parts: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class Wanted:
    """What a site of ours shall hold.

    method: its name.
    options: of the method.
    tensors: of its module, by name.
    """

    method: str
    options: dict[str, Any]
    tensors: dict[str, Tensor]


class Twin:
    """A model of ours and the module paths of the model of transformers that computes the same.

    Raises AdapterError for a model of another architecture, ConversionError where transformers has no such model.
    """

    def __init__(self, model: nn.Module):
        if not isinstance(model, Transformer):
            raise AdapterError(
                "the files of peft name the modules of a model of transformers, and effzoo knows them for its "
                f"Transformer, not for {type(model).__name__}; save and load with format='effzoo'"
            )
        self.model = model
        self.layout = layout_for(model)
        self.rules = {
            rule.theirs: rule
            for rule in self.layout.rules(model.config, model.task, model.task)
            if rule.axis is None and not rule.experts
        }
        self.sites: dict[str, Site] = dict(sites(model))
        self.theirs = {path: rule for rule in self.rules.values() for path in rule.ours if path in self.sites}
        (self.token,) = (path for path, site in self.sites.items() if site.role == "embed.token")
        table = f"{self.theirs[self.token].theirs}.weight"
        tied = [
            key
            for key, other in self.layout.ties(model.config, model.task).items()
            if other == table and model.task.endswith("_lm")
        ]
        self.tied_head = tied[0].removesuffix(".weight") if tied else None  # their module that multiplies by the table
        if self.tied_head is not None:
            self.rules.setdefault(self.tied_head, Rule(("head.out",), self.tied_head, parameters=("weight",)))

    def rule(self, path: str) -> Rule:
        """The rule for one of our modules. AdapterError when their model has no such module."""
        if path not in self.theirs:
            raise AdapterError(
                f"{path} has no module of its own in {self.layout.classes[self.model.task]} of "
                "transformers, so peft cannot adapt it"
            )
        return self.theirs[path]

    def adapted(self, path: str) -> Rule:
        """The rule for their module that multiplies by the weight; a tied head has its bias elsewhere in some."""
        if isinstance(self.sites[path], TiedLinear) and self.tied_head is not None:
            return self.rules[self.tied_head]
        return self.rule(path)

    def weight(self, path: str) -> Tensor:
        """The base weight of one of our modules; of a tied head the table."""
        weight = self.sites[self.token if isinstance(self.sites[path], TiedLinear) else path].weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def ties_with_peft(self, tied: str) -> str:
        """What to name in a config with ensure_weight_tying, so that peft ties the head to the table when it loads the
        file.

        It knows both by two names alone. AdapterError where the model has neither.
        """
        table = self.theirs[self.token].theirs
        known = [
            name for name in (table, self.tied_head) if name is not None and name.rpartition(".")[2] in KNOWN_TABLES
        ]
        if not known:
            raise AdapterError(
                f"{tied}: the language-model head is tied to this table, so in effzoo a change of it reaches both; "
                f"peft ties modules called {' or '.join(KNOWN_TABLES)} (ensure_weight_tying), and here they are "
                f"{table} and {self.tied_head}; leave embed.token out of the targets"
            )
        return known[0]

    def is_head(self, path: str) -> bool:
        return self.sites[path].role.startswith("head.")

    def outside(self, theirs: str) -> bool:
        """Whether one of their modules lies outside the body, in the head of the task."""
        return bool(self.layout.base(self.model.task)) and not theirs.startswith(self.layout.base(self.model.task))

    @property
    def task_type(self) -> str | None:
        return TASK_TYPES.get(self.model.task)


def whole(modules: Mapping[str, Any], twin: Twin) -> dict[str, list[str]]:
    """{their module: our modules in it that have an adapter}, in their order."""
    adapted: dict[str, list[str]] = {}
    for path in modules:
        adapted.setdefault(twin.adapted(path).theirs, []).append(path)
    return adapted


def split(tensor: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    """Parts of these sizes."""
    return list(torch.split(tensor, list(sizes), dim))


def tidy(number: float) -> float | int:
    """A whole number as an int, also when rounding has moved it by a few units in the last place."""
    return round(number) if abs(number - round(number)) <= 1e-12 * max(1.0, abs(number)) else number


def shaped(key: str, tensor: Tensor, *shape: int) -> Tensor:
    """The tensor, if it has this shape; AdapterError otherwise."""
    if tuple(tensor.shape) != shape:
        raise AdapterError(f"{key} has shape {tuple(tensor.shape)}, this model needs {shape}")
    return tensor


def more_tokens(theirs: Tensor, ours: Tensor) -> str:
    """The end of a sentence about a table with another number of tokens than ours: what to do when it has more."""
    larger = theirs.shape[1:] == ours.shape[1:] and len(theirs) > len(ours)
    return f"; call effzoo.resize_vocabulary(model, {len(theirs)}) first" if larger else ""


def first_axis(key: str, tensor: Tensor, axes: int = 2) -> int:
    """The length of the first of so many axes; AdapterError for another number of axes, and for no entry."""
    if tensor.ndim != axes or not tensor.numel():
        raise AdapterError(
            f"{key} has shape {tuple(tensor.shape)}, a tensor with {axes} axes and at least one entry is needed"
        )
    return len(tensor)


def parts_of(theirs: str, rule: Rule, parts: Mapping[str, list[int]]) -> list[int] | None:
    """The numbers that a file of ours gives for the modules stacked in one of theirs, or None; AdapterError for
    misfits."""
    given = parts.get(theirs)
    if given is not None and (
        not isinstance(given, list)
        or len(given) != len(rule.ours)
        or not all(isinstance(n, int) and n >= 0 for n in given)
        or not any(given)
    ):
        raise AdapterError(
            f"the file's header says {given!r} for {theirs}, which stacks {len(rule.ours)} modules; "
            "save the adapter again"
        )
    return given
