"""From transformers to effzoo."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import nn

from effzoo.annotations import describe, fits
from effzoo.architectures import AnyModel, Config, EncoderDecoder, Perceiver, made
from effzoo.convert import texts
from effzoo.convert.exporting import check_dense
from effzoo.convert.filling import Fresh, device_of
from effzoo.convert.genuine import bare
from effzoo.convert.perceiver_transfer import from_perceiver, load_perceiver, recognises
from effzoo.convert.source import Source, encodes, open_source
from effzoo.convert.transfer import transfer
from effzoo.errors import ConversionError, OptionError, did_you_mean, listing
from effzoo.sharding import all_processes, together
from effzoo.sites import unwrap
from effzoo.sites.dtypes import floating

_NOT_OVERRIDDEN = ("name", "layout", "paper", "hub", "package")


def from_transformers(
    source: Any,
    *,
    task: str | None = None,
    num_labels: int | None = None,
    dtype: torch.dtype | str | None = None,
    shard: Literal["full"] | None = None,
    **overrides: Any,
) -> Any:
    """A model of ours with the configuration and the weights of a model of transformers.

    source: a live model, a local folder, or a hub id; BERT, DistilBERT, ELECTRA, ALBERT, RoBERTa, XLM-RoBERTa,
        CamemBERT, NomicBERT, GTE, Jina's third embeddings, EuroBERT, Longformer, BigBird, ModernBERT, GPT-2, Llama,
        Mistral, Qwen2, Qwen3, Phi-3, SmolLM3, OLMo 2, Gemma 2, Gemma 3 (its texts), Mixtral, Qwen3-MoE or Reformer
        with any head that we have, BART, LED, T5, mT5, or a Perceiver.
    task: another than the source's, with a new head.
    num_labels: of a new classification head; None for the source's.
    dtype: of all tensors; None or "auto" for the source's, tensor by tensor where they differ (of a folder those of its
        files).
    shard: "full" splits the model over all processes as `effzoo.build` does, each of which reads its rows.
    overrides: fields of the config, such as `attention="longformer[window=256]"`, `max_length=4096`, `dropout=0.0`; of
        an LED, `architecture="encoder"` takes the encoder alone, as a task that an encoder-decoder does not have does.

    The result has the source's device and training mode; names of labels are not kept. A tensor is trainable
    (requires_grad) where the one that it is made from is: parts of one (GPT-2's q, k and v), copies (an attention's new
    projections). What is new is trainable.

    Safetensors files are read tensor by tensor into place, so loading takes no memory beside the model's. Pickled
    files, and those that transformers translates (names of older versions), it loads first as a whole.

    Raises ConversionError for a feature that we do not have, a mismatch, or weights that cannot be loaded.
    """
    mesh = all_processes(shard)
    with together(mesh):
        return converted(source, task, num_labels, wanted_dtype(dtype) or "auto", mesh, overrides)


def converted(
    source: Any,
    task: str | None,
    num_labels: int | None,
    dtype: torch.dtype | str,
    mesh: Any,
    overrides: dict[str, Any],
    coding: Callable[[nn.Module], Callable[[str], None]] | None = None,
) -> Any:
    """`from_transformers` over a mesh; coding(model) is what each key is given to as soon as its tensor is there."""
    source = bare(source)
    if recognises(source):
        return from_perceiver(source, task, num_labels, dtype, mesh, overrides, coding)
    opened = open_source(source, task, encoder=overrides.get("architecture") == "encoder" or encodes(task))
    task = task or opened.task
    config = opened.config
    known = [field.name for field in dataclasses.fields(config) if field.name not in _NOT_OVERRIDDEN]
    annotations = typing.get_type_hints(type(config))
    if task == "causal_lm" and not config.causal:
        raise ConversionError(
            f"{opened.label} sees later positions (is_causal=False or is_decoder=False), so a head that predicts the "
            "next token has seen it; take the "
            "body with task='features', 'classification', 'token_classification', 'question_answering' or 'masked_lm'"
        )
    if "dropout" not in overrides:
        opened.layout.check_dropouts(opened.model.config, task)
    if task == "features" and not config.causal and not _has_pooler(opened):
        config = dataclasses.replace(config, pooler=False)
    for key, value in overrides.items():
        if key not in known:
            raise OptionError(
                f"from_transformers has no option {key!r}{did_you_mean(key, known)} Options: task, "
                f"num_labels, {listing(known)}."
            )
        if not fits(value, annotations[key]):
            raise OptionError(f"{key!r} takes {describe(annotations[key])}, got {value!r} ({type(value).__name__})")
    config = dataclasses.replace(config, **overrides)
    fresh = Fresh(dtype=dtype, device=device_of(opened.state), mesh=mesh)
    if num_labels is None:
        num_labels = 2 if task == "question_answering" else opened.model.config.num_labels
    with fresh.undrawn:
        model = made(config, task, num_labels)
    if coding is not None:
        fresh = dataclasses.replace(fresh, done=coding(model))
    transfer(model, opened, learn=True, fresh=fresh)
    _name_labels(model, opened.model.config, opened.task)
    return model.train(opened.model.training)


def _name_labels(model: AnyModel, theirs: Any, task: str) -> None:
    """Names of the labels and what they are, where the head is that of the source."""
    if not task.endswith("classification") or model.task != task or model.num_labels != theirs.num_labels:
        return
    names = tuple(str(theirs.id2label.get(number, "")) for number in range(model.num_labels))
    if len({*names}) == len(names) and any(name != f"LABEL_{number}" for number, name in enumerate(names)):
        model.label_names = names
    model.problem_type = theirs.problem_type if task == "classification" else None


def load_pretrained(model: Any, source: Any) -> Any:
    """Copy the weights of a source into a model, and return the model.

    Its dtype, device, training mode and what is trainable stay. INFO records of the logger "effzoo.convert" list what
    was copied, new and unused.

    source: a live model of transformers, a local folder or a hub id, of the same architecture and sizes.

    The model may have another attention (new projections start as those that are queries, keys or values there, other
    new tensors stay as they are), another max_length (positions are repeated, or cut) and another task (its head stays
    as it is; BERT's pooler is part of the classification head).

    Raises ConversionError, and changes nothing, for the first mismatch in a number.
    """
    load(unwrap(model), source)
    return model


def load(model: Any, source: Any, fresh: Fresh | None = None) -> None:
    """`load_pretrained`, also into a fresh model, where each file is read once."""
    if isinstance(model, Perceiver):
        check_dense(model)
        load_perceiver(model, bare(source), fresh)
        return
    if not isinstance(model, AnyModel):
        raise ConversionError(f"weights can be loaded into a model of effzoo, got {type(model).__name__}")
    check_dense(model)
    with torch.no_grad():
        opened = open_source(bare(source), model.task, encoder=not isinstance(model, EncoderDecoder))
        transfer(cast(Any, model), opened, fresh=fresh)
    model.config = _with_texts(cast(Any, model.config), opened.config)


def wanted_dtype(given: torch.dtype | str | None) -> torch.dtype | str | None:
    """A dtype of a fresh model's weights: "auto" stands for that of the source. OptionError for what is none."""
    return given if given == "auto" else floating(given)


def _with_texts(ours: Config, theirs: Config) -> Config:
    """Our config with the source's tokens and settings of generation, and its padding token where ours has none."""
    taken = {name: getattr(theirs, name) for name in texts.FIELDS if getattr(theirs, name) is not None}
    pad = theirs.pad_token if ours.pad_token is None else ours.pad_token
    return dataclasses.replace(ours, pad_token=pad, **taken)


def _has_pooler(source: Source) -> bool:
    base = source.layout.base(source.task)
    return any(f"{base}{pooler}.weight" in source.state for pooler in ("pooler.dense", "pooler"))
