"""A layout of transformers as data: class names, key map, and how its configuration and ours say the same thing."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from effzoo.architectures import Config, config_class
from effzoo.architectures.function import WITH_HEAD, meant
from effzoo.convert import texts
from effzoo.convert.fields import check_fields
from effzoo.convert.keymap import Rule, expand
from effzoo.errors import ConversionError, OptionError, listing

ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu",
    "swish": "silu",
}  # fmt: skip
THEIR_ACTIVATION = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}
_LM = ("masked_lm", "causal_lm", "seq2seq_lm")
_ONLY_FOR = {
    "pooling": ("classification",), "head_dense": ("classification",), "head_bias": ("classification",),
    "head_norm": ("classification",),
    "head_activation": WITH_HEAD, "token_dense": ("token_classification", "question_answering"),
    "lm_transform": ("masked_lm",),
    "lm_bias": _LM, "tied": _LM, "logit_cap": _LM, "transform_bias": (*WITH_HEAD, "masked_lm"),
}  # fmt: skip
_FREE = {
    "name", "layout", "paper", "hub", "package", "backend", "attention", "max_length", "activation", "position_offset",
    "pooler", "mlp_chunk", *texts.FIELDS,
}  # fmt: skip


def no_fields(_: Any) -> dict[str, Any]:
    return {}


def no_dropouts(_: Any, task: str) -> dict[str, float | None]:
    return {}


@dataclass(frozen=True)
class Layout:
    """One family of transformers' models.

    classes: task -> class name.
    attention: the kinds that it computes.
    relative: the layout whose weights it has but for those of the attention; a model of either is written in the one
        that has its attention kind.
    prefix: of the body inside a model with a head.
    body, heads: key map, heads by task.
    tied: their keys that hold the same values as another of theirs, in models whose head is tied.
    same: those that do in every model.
    untied: their weight of a language-model head that may differ from the embedding, whatever the config says.
    fields: our config field -> theirs.
    positions, activation: their names for max_length (empty: it has none, and `read` says ours) and the activation.
    slots: our fields that the layout fixes.
    required: their fields, each with the only value that we have.
    counts_from_pad: positions start at pad_token + 1.
    offset: rows of their table of positions in front of the first, which `positions` does not count.
    lm_activation: what the language-model head uses whatever the config says.
    read, write: further fields of ours from their config, and of theirs from ours.
    translated: our fields that `read` and `write` speak of.
    dropouts: their further dropout probabilities in a task, which must equal our one.
    shared: their modules outside the body that several heads have.
    prefixes: `prefix` by task, where it is another.
    mixed: layers may have different attention kinds.
    routes: feed-forwards are experts.
    module: where the classes are.
    parts: larger classes of theirs that hold a model of this layout, with its path in them; only that part is taken.
    whole: the layout of these larger classes.
    finish: gives a model of ours what their config says besides weights and sizes.
    built: their fields that only a model of ours says.
    reads: their fields that `read`, `dropouts` and `finish` look at.
    inert: their fields that change nothing that is computed. Every other field must have its default (`fields.py`).
    unread: their tensors that models with a head have and do not read; zeros in a model that is written.
    lost: tensors that resizing their vocabulary loses and their forward pass does not add, each with one that has as
        many entries.
    """

    name: str
    prefix: str
    classes: Mapping[str, str]
    body: tuple[Rule, ...]
    heads: Mapping[str, tuple[Rule, ...]]
    tied: Mapping[str, str]
    fields: Mapping[str, str]
    positions: str
    activation: str
    slots: Mapping[str, Any]
    required: Mapping[str, Any]
    dropouts: Callable[[Any, str], Mapping[str, float | None]]
    attention: tuple[str, ...] = ("full",)
    relative: str | None = None
    same: Mapping[str, str] = field(default_factory=dict)
    untied: str = ""
    counts_from_pad: bool = False
    offset: int = 0
    lm_activation: str | None = None
    read: Callable[[Any], dict[str, Any]] = field(default=no_fields)
    write: Callable[[Config], dict[str, Any]] = field(default=no_fields)
    translated: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    prefixes: Mapping[str, str] = field(default_factory=dict)
    mixed: bool = False
    routes: bool = False
    module: str = "transformers"
    parts: Mapping[str, str] = field(default_factory=dict)
    whole: str = ""
    finish: Callable[[Any, Any], None] | None = None
    built: Callable[[Any], dict[str, Any]] = field(default=no_fields)
    reads: frozenset[str] = frozenset()
    inert: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
    lost: Mapping[str, str] = field(default_factory=dict)

    @property
    def family(self) -> str:
        return self.relative or self.name

    def cls(self, task: str) -> Any:
        """The class for a task."""
        return getattr(importlib.import_module(self.module), self.classes[task])

    def base(self, task: str) -> str:
        prefix = "" if task == "features" else self.prefixes.get(task, self.prefix)
        return f"{prefix}." if prefix else ""

    def rules(self, config: Config, source_task: str, task: str) -> list[Rule]:
        """The key map from a model of `source_task` to one of `task`.

        Of another task's head it has only what lies in their body (BERT's pooler) or is shared by both heads (the dense
        layer and the norm of ModernBERT's).
        """
        common = self.shared & {rule.theirs for rule in self.heads[source_task]}
        head = [
            rule
            for rule in self.heads.get(task, ())
            if source_task == task or rule.theirs.startswith("{base}") or rule.theirs in common
        ]
        return list(expand([*self.body, *head], config.stacks, self.base(source_task), config.experts))

    def known(self, config: Config, task: str) -> Iterator[Rule]:
        """Every rule that a model of this task may have tensors for: its head's, and other heads' within the body."""
        for other in self.heads:
            yield from self.rules(config, task, other)

    def ties(self, config: Config, task: str) -> dict[str, str]:
        """{their key: their key with the same values}, as they are called in a model of this task."""
        base, known = self.base(task), {**self.same, **(self.tied if config.tied else {})}
        return {key.replace("{base}", base): other.replace("{base}", base) for key, other in known.items()}

    def config(self, theirs: Any, task: str) -> Config:
        """Our config for theirs; ConversionError for a feature that we do not have."""
        for name, value in self.required.items():
            given = getattr(theirs, name, value)
            if given != value:
                raise ConversionError(
                    f"{self.name} with {name}={given!r} has no counterpart in effzoo, which has {name}={value!r} only"
                )
        known = {*self.fields.values(), *self.required, *self.reads, self.positions, self.activation}
        check_fields(theirs, self.cls(task).config_class, self.name, known, self.inert)
        activation = getattr(theirs, self.activation)
        if activation not in ACTIVATIONS:
            raise ConversionError(
                f"activation {activation!r} has no counterpart in effzoo; it has {listing(ACTIVATIONS)}"
            )
        values = (
            {ours: getattr(theirs, name) for ours, name in self.fields.items()}
            | texts.tokens_of(theirs)
            | self.read(theirs)
        )
        if not self.counts_from_pad and (values.get("pad_token") or 0) < 0:
            values["pad_token"] = None  # some configs write -1 for none
        if self.counts_from_pad and values["pad_token"] is None:
            raise ConversionError(
                f"{self.name} counts positions from pad_token_id + 1, but pad_token_id is None; set it in the config"
            )
        offset = values["pad_token"] + 1 if self.counts_from_pad else self.offset
        longest = getattr(theirs, self.positions) - offset + self.offset if self.positions else None
        try:
            config = config_class(self.slots.get("architecture"))(
                **{"name": self.name, "layout": self.name, "max_length": longest, **self.slots, **values},
                activation=ACTIVATIONS[activation],
                position_offset=offset,
            )
        except OptionError as error:
            raise ConversionError(
                f"the configuration of this {self.name} of transformers has no counterpart in effzoo: {error}"
            ) from error
        self.check(config, task)
        check_problem(theirs, task)
        return config

    def check(self, config: Config, task: str) -> None:
        """Refuse a config of ours that this layout cannot express."""
        slots: dict[str, Any] = {
            entry.name: entry.default for entry in dataclasses.fields(config) if entry.name not in _FREE
        }
        slots.update(self.slots)
        slots["position_offset"] = (config.pad_token or 0) + 1 if self.counts_from_pad else self.offset
        if self.lm_activation and task == "masked_lm":
            slots["activation"] = self.lm_activation
        if isinstance(config.attention_dropout, tuple) and "attention_dropout" not in self.translated:
            raise ConversionError(
                f"{self.name} of transformers has one attention_dropout for all layers, got {config.attention_dropout}"
            )
        for name, value in slots.items():
            said = (
                name == "pooler"
                or name in self.fields
                or name in self.translated
                or task not in _ONLY_FOR.get(name, (task,))
            )
            if not said and getattr(config, name) != value:
                raise ConversionError(
                    f"{self.classes.get(task, self.name)} of transformers has no counterpart for "
                    f"{name}={getattr(config, name)!r}: it has {value!r}"
                )

    def their_fields(self, config: Config, task: str) -> dict[str, Any]:
        """The fields of their config that say what ours says."""
        self.check(config, task)
        fields = {
            name: meant(config, ours) if ours.startswith("decoder_") else getattr(config, ours)
            for ours, name in self.fields.items()
        }
        if self.positions:
            fields[self.positions] = config.max_length + config.position_offset - self.offset
        if config.activation not in THEIR_ACTIVATION:
            raise ConversionError(
                f"{self.name} of transformers has no counterpart for activation={config.activation!r}; it has "
                f"{listing(THEIR_ACTIVATION)}"
            )
        fields[self.activation] = THEIR_ACTIVATION[config.activation]
        return fields | self.write(config)

    def check_dropouts(self, theirs: Any, task: str) -> None:
        """Refuse several dropout probabilities where we have one."""
        named = self.fields.get("dropout")
        ours = getattr(theirs, named) if named else self.slots["dropout"]
        for name, value in self.dropouts(theirs, task).items():
            if value is not None and value != ours:
                other = f"{named}={ours}" if named else f"a dropout of {ours} elsewhere"
                raise ConversionError(
                    f"{name}={value} beside {other}: effzoo has one dropout for both; choose it, as in dropout={ours}"
                )


def check_problem(theirs: Any, task: str) -> None:
    problem = getattr(theirs, "problem_type", None)
    if task != "classification" or problem is None:
        return
    if (problem == "regression") != (theirs.num_labels == 1):
        raise ConversionError(
            f"problem_type={problem!r} with {theirs.num_labels} labels has no counterpart in effzoo, where the "
            "labels say which loss it is: one label means regression; set problem_type=None to accept that"
        )
