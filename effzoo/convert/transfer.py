"""Copying the weights of a source into a model of ours, which may have another attention, length or task.

Longer models repeat the pretrained positions, and projections that only the new attention has start as copies of those
that are queries, keys or values there: how Longformer was made from RoBERTa (Beltagy et al. 2020, arXiv:2004.05150,
section 5). Experts start as copies of the one feed-forward, and their router anew: sparse upcycling (Komatsuzaki et al.
2022, arXiv:2212.05055, section 2).
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from effzoo.architectures.function import meant
from effzoo.convert import texts
from effzoo.convert.filling import Fresh, Taken, fill, own_tensors
from effzoo.convert.keymap import Rule, to_ours, trained, trained_in_ours
from effzoo.convert.layouts import family
from effzoo.convert.source import Source
from effzoo.errors import ConversionError

log = logging.getLogger("effzoo.convert")
POSITIONS, TOKENS = "embeddings.position.weight", "embeddings.token.weight"  # a stack's may stand in front of them
_FIRST = (
    "architecture", "dim", "layers", "heads", "mlp", "vocab", "types", "position_offset", "norm", "eps", "activation",
)  # fmt: skip
_MAY_DIFFER = {
    "name", "layout", "paper", "hub", "package", "backend", "attention", "max_length", "dropout", "attention_dropout",
    "activation_dropout", "final_dropout",
    "decoder_attention", "decoder_start_token", "decoder_max_length",
    "pad_token", "pooling", "head_dense", "head_bias", "pooler", "lm_transform", "mlp_chunk",
    "experts", "router", "expert_every", *texts.FIELDS,
}  # fmt: skip


def transfer(model: Any, source: Source, *, learn: bool = False, fresh: Fresh | None = None) -> None:
    """Write the source's weights into the model, all or none, tensor by tensor where they are in files.

    INFO records of the logger "effzoo.convert" say what was copied, repeated, new and unused.

    learn: whether each tensor learns where that of the source does.
    fresh: of a model that is made for these weights.

    Raises ConversionError for the first number in which the two do not fit.
    """
    _check_fit(model, source)
    rules = source.layout.rules(model.config, source.task, model.task)
    given, learns = to_ours(rules, source.state), trained_in_ours(rules, trained(source.model))
    places = _places(rules, source)
    if _given_a_head(model, source):
        head, tokens = "head.out.weight", next(key for key in given if key.endswith(TOKENS))
        given[head], learns[head], places[head] = given[tokens], learns[tokens], places[tokens]
    if "head.out.weight" in given:
        _check_head(model, source)
    chosen: dict[str, Tensor] = {}
    repeated: dict[str, str] = {}
    new: list[str] = []
    taken: dict[str, list[Taken]] = {}
    for key, value in own_tensors(model).items():
        origin = key if key in given else copied_from(model, key)
        if origin in given:
            tensor, (their, make) = given[origin], places[origin]
            if key.endswith(POSITIONS) and len(value) != len(tensor):
                make = _extending(make, len(value), model.config.position_offset)
                tensor = extended(tensor, len(value), model.config.position_offset)
            if tensor.shape != value.shape:
                raise ConversionError(
                    f"{key} has shape {tuple(value.shape)} in the model and {tuple(tensor.shape)} in {source.label}"
                )
            chosen[key] = tensor
            taken.setdefault(their, []).append((key, make))
            if origin != key:
                repeated[key] = origin
        elif re.match(r"(encoder\.|decoder\.)?(head\.|blocks\.\d+\.(attn|mlp\.router)\.)", key):
            new.append(key)
        else:
            raise ConversionError(f"{source.label} has no tensor for {key}; build the model without it")
    origins = {key: repeated.get(key, key) for key in chosen} if learn else {}
    learning = {key: learns[origin] for key, origin in origins.items() if origin in learns}
    fill(model, source.label, source.state, source.stored, taken, learning, fresh)
    if source.layout.finish is not None:
        source.layout.finish(model, source.model.config)
    _report(model, source, chosen, repeated, new)


def _places(rules: list[Rule], source: Source) -> dict[str, Taken]:
    """{our key: (their key, what makes our tensor of theirs, None where it is theirs)}."""
    places: dict[str, Taken] = {}
    for rule in rules:
        for parameter in rule.parameters:
            if (their := rule.key(parameter)) in source.state:
                for number, path in enumerate(rule.ours):
                    make = None if rule.whole(parameter) else partial(_part, rule, parameter, number)
                    places[f"{path}.{parameter}"] = their, make
    return places


def _part(rule: Rule, parameter: str, number: int, theirs: Tensor) -> Tensor:
    return rule.split(parameter, theirs)[number]


def _extending(make: Callable[[Tensor], Tensor] | None, n: int, offset: int) -> Callable[[Tensor], Tensor]:
    return lambda theirs: extended(theirs if make is None else make(theirs), n, offset)


def extended(table: Tensor, n: int, offset: int) -> Tensor:
    """A table of n positions: the first `offset` special ones once, the others repeated in order, or cut."""
    index = torch.arange(n, device=table.device)
    return table[torch.where(index < offset, index, offset + (index - offset) % (len(table) - offset))]


def copied_from(model: Any, key: str) -> str:
    """The key that an expert, a projection of a new attention, or the norm of its heads, starts from, or ""."""
    if expert := re.fullmatch(r"(blocks\.\d+\.mlp)\.experts\.\d+(\..+)", key):
        return expert[1] + expert[2]
    match = re.fullmatch(r"((?:\w+\.)?blocks\.\d+\.attn)\.(norms\.)?(\w+)\.(weight|bias)", key)
    if match is None:
        return ""
    layer, norms, projection, parameter = match.groups(default="")
    origin, *_ = model.get_submodule(f"{layer}.core").starts_from(projection) or [""]
    return f"{layer}.{norms}{origin}.{parameter}" if origin else ""


def _check_fit(model: Any, source: Source) -> None:
    ours, theirs = model.config, source.config
    if family(ours) != family(theirs):
        raise ConversionError(
            f"the model has layout {ours.layout!r}, {source.label} has {theirs.layout!r}; build a "
            "model with that layout"
        )
    others = [f.name for f in dataclasses.fields(ours) if f.name not in _MAY_DIFFER and f.name not in _FIRST]
    for name in (*_FIRST, *others, *(("pad_token",) if ours.position_offset else ())):
        if meant(ours, name) != meant(theirs, name) and not (name == "tied" and _given_a_head(model, source)):
            raise ConversionError(
                f"{name} is {getattr(ours, name)!r} in the model and {getattr(theirs, name)!r} in {source.label}; "
                f"build the model with {name}={getattr(theirs, name)!r}"
            )


def _given_a_head(model: Any, source: Source) -> bool:
    """Whether the model's language-model head has its own weight, and the source's is its token embedding."""
    return source.config.tied and not model.config.tied and model.task == source.task and model.task.endswith("_lm")


def _check_head(model: Any, source: Source) -> None:
    ours, theirs = model.config, source.config
    fields = ("head_dense", "head_bias", "pooling") if model.task == "classification" else ()
    pairs = [(name, getattr(ours, name), getattr(theirs, name)) for name in fields]
    if model.task != "question_answering":  # which has two outputs, whatever their config says
        pairs.insert(0, ("num_labels", model.own_labels, source.model.config.num_labels))
    for name, own, other in pairs:
        if own != other:
            raise ConversionError(
                f"{name} is {own!r} in the model and {other!r} in {source.label}; build the model with "
                f"{name}={other!r}, or, for a new head, give the body alone: "
                "transformers.AutoModel.from_pretrained(...)"
            )


def _report(model: Any, source: Source, chosen: dict[str, Tensor], repeated: dict[str, str], new: list[str]) -> None:
    parameters = sum(tensor.numel() for tensor in chosen.values())
    log.info("%s: %d tensors loaded, %d parameters", source.label, len(chosen), parameters)
    before, now = source.config.max_length, model.config.max_length
    if now != before and any(key.endswith(POSITIONS) for key in chosen):
        log.info("%s: positions %s from %d to %d", source.label, "repeated" if now > before else "cut", before, now)
    used = {*chosen, *repeated.values()}
    places = {}
    for rule in source.layout.rules(model.config, source.task, model.task):
        for parameter in rule.parameters:
            places[rule.key(parameter)] = [f"{path}.{parameter}" for path in rule.ours]
    unused = [key for key in source.state if not used.intersection(places.get(key, ()))]
    say(source, "copied beside", [f"{key} <- {origin}" for key, origin in repeated.items()])
    say(source, "newly initialised", new)
    say(source, "unused", unused)


def say(source: Source, what: str, keys: list[str]) -> None:
    """One record, with the numbers of blocks folded together."""
    if keys:
        folded = dict.fromkeys(re.sub(r"(blocks|layers?|h)\.\d+\.", r"\1.*.", key) for key in keys)
        log.info("%s: %d tensors %s: %s", source.label, len(keys), what, ", ".join(folded))
