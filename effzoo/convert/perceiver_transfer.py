"""Perceivers from transformers and to it: opening a source, and copying every tensor or none."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effzoo.annotations import describe, fits
from effzoo.architectures import Perceiver, PerceiverConfig
from effzoo.architectures.perceiver_config import PER_TOKEN
from effzoo.convert.dtypes import load_state
from effzoo.convert.fields import check_code, check_fields
from effzoo.convert.filling import Fresh, Taken, device_of, fill, own_tensors
from effzoo.convert.genuine import check_class, check_genuine, check_ties
from effzoo.convert.keymap import trained
from effzoo.convert.layout import check_problem
from effzoo.convert.perceiver import CLASSES, INERT, READS, names, read, write
from effzoo.convert.pretrained import Pretrained, open_pretrained
from effzoo.convert.source import explained, local_or_hub, quiet
from effzoo.convert.transfer import copied_from, extended, say
from effzoo.errors import ConversionError, OptionError, did_you_mean, listing
from effzoo.peft import attached
from effzoo.tensors import StoredTensor

log = logging.getLogger("effzoo.convert")
_THEIRS = "transformers.models.perceiver.modeling_perceiver"
_TABLES = ("embeddings.position.weight", "decoder.queries.weight")  # one embedding per position
_NOT_OVERRIDDEN = ("name", "architecture", "layout", "paper", "hub", "package")
_MAY_DIFFER = {
    *_NOT_OVERRIDDEN, "backend", "attention", "max_length", "dropout", "attention_dropout", "pad_token", "share_cross",
    "share_blocks", "pooling", "head_norm", "tied", "lm_bias",
}  # fmt: skip
_OF_DECODER = ("query_dim", "decoder_heads", "decoder_head_dim", "decoder_value_dim", "decoder_mlp", "decoder_residual")


@dataclass(frozen=True)
class Source:
    """A Perceiver of transformers, its config as ours, and its tensors under our keys; `label` names it in messages.

    state: the tensors; where they are `stored` in files, on the device meta.
    """

    label: str
    model: Any
    task: str
    config: PerceiverConfig
    state: dict[str, Tensor]
    stored: dict[str, StoredTensor]


def recognises(source: Any) -> bool:
    """Whether a source is a Perceiver of transformers: a live model, or a folder or hub id that holds one."""
    if not isinstance(source, (str, Path)):
        return any(cls.__name__ in CLASSES for cls in type(source).__mro__) and hasattr(source, "base_model_prefix")
    return bool(_their_config(source).model_type == "perceiver")


def from_perceiver(
    source: Any,
    task: str | None,
    num_labels: int | None,
    dtype: torch.dtype | str,
    mesh: Any,
    overrides: dict[str, Any],
    coding: Callable[[nn.Module], Callable[[str], None]] | None,
) -> Perceiver:
    """`converted` for a Perceiver."""
    opened = _open(source)
    annotations = typing.get_type_hints(PerceiverConfig)
    known = [field.name for field in dataclasses.fields(PerceiverConfig) if field.name not in _NOT_OVERRIDDEN]
    for key, value in overrides.items():
        if key not in known:
            raise OptionError(
                f"from_transformers has no option {key!r}{did_you_mean(key, known)} Options: task, "
                f"num_labels, {listing(known)}."
            )
        if not fits(value, annotations[key]):
            raise OptionError(f"{key!r} takes {describe(annotations[key])}, got {value!r} ({type(value).__name__})")
    if "max_length" in overrides:
        overrides = {"grid": (), **overrides}
    elif "grid" in overrides:
        overrides = {"max_length": 0, **overrides}
    config = dataclasses.replace(opened.config, **overrides)
    labels = opened.model.config.num_labels if num_labels is None else num_labels
    fresh = Fresh(dtype=dtype, device=device_of(opened.state), mesh=mesh)
    with fresh.undrawn:
        model = Perceiver(config, task or opened.task, labels)
    if coding is not None:
        fresh = dataclasses.replace(fresh, done=coding(model))
    _transfer(model, opened, learn=True, fresh=fresh)
    return model.train(opened.model.training)


def load_perceiver(model: Perceiver, source: Any, fresh: Fresh | None) -> None:
    """`load_pretrained` for a Perceiver."""
    if not recognises(source):
        raise ConversionError(
            f"{source if isinstance(source, (str, Path)) else type(source).__name__} is no Perceiver; give one of "
            f"{listing(CLASSES)}"
        )
    _transfer(model, _open(source), fresh=fresh)


def to_perceiver(model: Perceiver) -> Any:
    """`to_transformers` for a Perceiver."""
    if adapters := attached(model):
        raise ConversionError(f"adapters are attached ({listing(adapters)}); merge or detach them first")
    if model.task not in {task for task, _ in CLASSES.values()}:
        raise ConversionError(f"transformers has no Perceiver for task {model.task!r}; it has {listing(CLASSES)}")
    name, fields = write(model.config, model.task)
    theirs_module = importlib.import_module(_THEIRS)
    special = {"bos_token_id": None, "eos_token_id": None}
    with torch.random.fork_rng(devices=[]):  # their random initialisation is overwritten, so it should leave no trace
        config = theirs_module.PerceiverConfig(**fields, **special, num_labels=model.own_labels)
        theirs = make(name, config, text=name == "PerceiverModel" and bool(model.config.vocab))
    ours = model.state_dict()
    like = ours["latents.weight"]
    known, learns = names(model.config, model.task), trained(model)
    state = {there: ours[here] for here, there in known.items()}
    load_state(
        theirs.to(device=like.device, dtype=like.dtype), state, {there: learns[here] for here, there in known.items()}
    )
    return theirs.train(model.training)


def _open(source: Any) -> Source:
    if not isinstance(source, (str, Path)):
        name = next(cls.__name__ for cls in type(source).__mro__ if cls.__name__ in CLASSES)
        check_class(source, getattr(importlib.import_module(_THEIRS), name))
        return _checked(type(source).__name__, Pretrained(source), name)
    config = _their_config(source)
    check_code(getattr(config, "auto_map", None), str(source))
    if not config.architectures:
        raise ConversionError(
            f'{source}: its config.json does not say of which class it was saved; add "architectures": [...] to it '
            "with the one that is true: "
            f"{listing(CLASSES)}"
        )
    name = config.architectures[0]
    if name not in CLASSES:
        raise ConversionError(
            f"{source} was saved from {name}, which has no counterpart in effzoo; it has {listing(CLASSES)}"
        )
    label, theirs = local_or_hub(source), importlib.import_module(_THEIRS)
    cls = getattr(theirs, name)
    with explained(label, source), quiet():
        text = {"input_preprocessor": theirs.PerceiverTextPreprocessor(config)} if name == "PerceiverModel" else {}
        opened = open_pretrained(cls, label, config, partial(make, name, text=bool(text)), **text)
        if any(key.startswith("input_preprocessor.") for key in opened.missing):  # it was saved without one
            opened = open_pretrained(cls, label, config)
    return _checked(label, opened, name)


def make(name: str, theirs: Any, text: bool) -> Any:
    """A model of this class; text: with the preprocessor of text, which classes with a head bring along."""
    module = importlib.import_module(_THEIRS)
    return getattr(module, name)(
        theirs, **{"input_preprocessor": module.PerceiverTextPreprocessor(theirs)} if text else {}
    )


def _their_config(source: str | Path) -> Any:
    import transformers

    label = local_or_hub(source)
    with explained(label, source), quiet():
        return transformers.AutoConfig.from_pretrained(label, trust_remote_code=False)


def _checked(label: str, opened: Pretrained, name: str) -> Source:
    """A source whose config we can express, and whose tensors are complete and all known."""
    model, missing = opened.model, opened.missing
    task, kind = CLASSES[name]
    if name == "PerceiverModel":
        parts = [
            type(part).__name__
            for part in (model.input_preprocessor, model.decoder, model.output_postprocessor)
            if part is not None
        ]
        if parts not in ([], ["PerceiverTextPreprocessor"]):
            raise ConversionError(
                f"{label} has {listing(parts)}; a PerceiverModel is read alone, or with a PerceiverTextPreprocessor"
            )
        kind = "tokens" if parts else "array"
    check_genuine(label, model, lambda theirs: make(name, theirs, text="tokens" in kind and name == "PerceiverModel"))
    check_ties(label, model, {})
    check_fields(model.config, type(model).config_class, "perceiver", READS, INERT)
    config = read(model.config, kind)
    check_problem(model.config, task)
    state = {key: value for key, value in opened.tensors(label).items() if key not in missing}
    wanted = names(config, task)
    for here, there in wanted.items():
        if there not in state:
            raise ConversionError(
                f"{label} has no tensor {there} (ours: {here}); the weights are incomplete, or adapters or "
                "quantisation changed them"
            )
    for key in state:
        if key not in wanted.values():
            raise ConversionError(
                f"{label} has the tensor {key}, which {name} does not have; merge or remove what was added"
            )
    stored = {here: opened.stored[there] for here, there in wanted.items() if there in opened.stored}
    return Source(label, model, task, config, {here: state[there] for here, there in wanted.items()}, stored)


def _transfer(model: Perceiver, source: Source, *, learn: bool = False, fresh: Fresh | None = None) -> None:
    """Write the source's tensors into the model, all or none; of another task, without the decoder and the head.

    learn: whether each tensor learns where that of the source does.
    fresh: of a model that is made for these weights.
    """
    decoder = source.task == model.task or {source.task, model.task} <= {*PER_TOKEN}
    _check_fit(model, source, decoder)
    given = {
        key: value
        for key, value in source.state.items()
        if (decoder or not key.startswith("decoder.")) and (source.task == model.task or not key.startswith("head."))
    }
    chosen: dict[str, Tensor] = {}
    repeated: dict[str, str] = {}
    new: list[str] = []
    taken: dict[str, list[Taken]] = {}
    for key, value in own_tensors(model).items():
        origin = key if key in given else copied_from(model, key)
        if origin in given:
            per_position = key == _TABLES[0] or (key == _TABLES[1] and model.task != "classification")
            make = (
                partial(extended, n=len(value), offset=0) if per_position and len(value) != len(given[origin]) else None
            )
            tensor = given[origin] if make is None else make(given[origin])
            if tensor.shape != value.shape:
                raise ConversionError(
                    f"{key} has shape {tuple(value.shape)} in the model and {tuple(tensor.shape)} in {source.label}"
                )
            chosen[key] = tensor
            taken.setdefault(origin, []).append((key, make))
            if origin != key:
                repeated[key] = origin
        elif key.startswith(("head.", "decoder.")) or (key.startswith("blocks.") and ".attn." in key):
            new.append(key)
        else:
            raise ConversionError(f"{source.label} has no tensor for {key}; build the model without it")
    theirs, there = trained(source.model), names(source.config, source.task)
    learns = {key: theirs[there[repeated.get(key, key)]] for key in chosen} if learn else {}
    fill(model, source.label, source.state, source.stored, taken, learns, fresh)
    log.info(
        "%s: %d tensors loaded, %d parameters",
        source.label,
        len(chosen),
        sum(tensor.numel() for tensor in chosen.values()),
    )
    before, now = source.config.max_length, model.config.max_length
    if now != before and _TABLES[0] in chosen:
        log.info("%s: positions %s from %d to %d", source.label, "repeated" if now > before else "cut", before, now)
    say(source, "copied beside", [f"{key} <- {origin}" for key, origin in repeated.items()])  # type: ignore[arg-type]
    say(source, "newly initialised", new)  # type: ignore[arg-type]
    say(source, "unused", [key for key in source.state if key not in {*chosen, *repeated.values()}])  # type: ignore[arg-type]


def _check_fit(model: Perceiver, source: Source, decoder: bool) -> None:
    ours, theirs = model.config, source.config
    free = _MAY_DIFFER | (set() if decoder and model.task != "classification" else set(_OF_DECODER))
    free |= set() if ours.positions == "fourier" else {"grid"}
    for name in (field.name for field in dataclasses.fields(PerceiverConfig) if field.name not in free):
        if getattr(ours, name) != getattr(theirs, name):
            raise ConversionError(
                f"{name} is {getattr(ours, name)!r} in the model and {getattr(theirs, name)!r} in {source.label}; "
                f"build the model with {name}={getattr(theirs, name)!r}"
            )
    if source.task == model.task == "classification":
        for name, own, other in (
            ("num_labels", model.own_labels, source.model.config.num_labels),
            ("pooling", ours.pooling, theirs.pooling),
        ):
            if own != other:
                raise ConversionError(
                    f"{name} is {own!r} in the model and {other!r} in {source.label}; build the "
                    f"model with {name}={other!r}"
                )
