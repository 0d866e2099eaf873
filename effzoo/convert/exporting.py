"""From effzoo to transformers."""

from __future__ import annotations

from typing import Any

import torch

from effzoo.architectures import AnyModel, EncoderDecoder, Perceiver, Transformer
from effzoo.architectures.heads import known_problem
from effzoo.convert import texts
from effzoo.convert.dtypes import load_state
from effzoo.convert.keymap import to_theirs, trained, trained_in_theirs
from effzoo.convert.layouts import layout_for
from effzoo.convert.perceiver_transfer import to_perceiver
from effzoo.errors import ConversionError, listing
from effzoo.peft import attached
from effzoo.sites import sites, unwrap


def check_dense(model: Any) -> None:
    """ConversionError for a model whose weights are quantised."""
    if quantised := [path for path, site in sites(model) if getattr(site, "bits", None)]:
        raise ConversionError(
            f"{len(quantised)} weights are quantised ({quantised[0]}, ...); call effzoo.dequantise(model) first"
        )


def to_transformers(model: AnyModel) -> Any:
    """The model of transformers (a `PreTrainedModel`) that computes the same, with a copy of the weights.

    Its dtype and what is trainable (tensor by tensor), device and training mode are the model's.
    Raises ConversionError for what transformers has no counterpart for: another attention or pooling, say, attached
        adapters, or a tensor of theirs of which one part is frozen and another is not.
    """
    model = unwrap(model)
    if isinstance(model, Perceiver):
        check_dense(model)
        return to_perceiver(model)
    if not isinstance(model, Transformer | EncoderDecoder):
        raise ConversionError(f"only a model of effzoo can be converted, got {type(model).__name__}")
    if adapters := attached(model):
        raise ConversionError(f"adapters are attached ({listing(adapters)}); merge or detach them first")
    check_dense(model)
    layout, config, task = layout_for(model), model.config, model.task
    if config.pad_token is not None and config.pad_token >= config.vocab:
        raise ConversionError(
            f"pad_token {config.pad_token} is not in a vocabulary of {config.vocab}; build the "
            "model with another pad_token"
        )
    cls = layout.cls(task)
    fields = (
        layout.their_fields(config, task)
        | texts.tokens(config)
        | {"num_labels": model.own_labels}
        | layout.built(model)
    )
    if getattr(config, "score_cap", 0):
        fields["attn_implementation"] = "eager"  # the others leave the cap out without a word in transformers 5.19
    named = {name: getattr(cls.config_class(), name, None) for name in ("cls_token_id", "sep_token_id")}
    special = {name: None for name, value in named.items() if value is not None and value not in range(config.vocab)}
    without_pooler = (
        {"add_pooling_layer": False} if task == "features" and layout.heads[task] and not config.pooler else {}
    )
    with torch.random.fork_rng(devices=[]):  # their random initialisation is overwritten, so it should leave no trace
        try:
            theirs = cls(cls.config_class(**special | fields), **without_pooler)
        except Exception as error:
            reason = (str(error).strip() or "no message").splitlines()[0]
            raise ConversionError(
                f"transformers makes no {cls.__name__} of this configuration: {type(error).__name__}: {reason}"
            ) from error
    ours = model.state_dict()
    rules = layout.rules(config, task, task)
    optional = {rule.key(parameter) for rule in rules for parameter in rule.parameters if rule.optional}
    state = to_theirs(rules, ours)
    learns = trained_in_theirs(rules, trained(model))
    state |= {key: state[other] for key, other in layout.ties(config, task).items() if key in theirs.state_dict()}
    wanted = set(theirs.state_dict())
    state |= {key: torch.zeros_like(theirs.state_dict()[key]) for key in layout.unread & (wanted - set(state))}
    state = {key: value for key, value in state.items() if key in wanted or key not in optional}
    if missing := sorted(wanted - set(state)):
        raise ConversionError(
            f"{cls.__name__} needs {missing[0]}, which this model does not have "
            f"(types={config.types}, pooler={config.pooler})"
        )
    for key, value in state.items():
        if key not in wanted or value.shape != theirs.state_dict()[key].shape:
            has = f"of shape {tuple(theirs.state_dict()[key].shape)}" if key in wanted else "not at all"
            raise ConversionError(
                f"{cls.__name__} has {key} {has}, and this model {tuple(value.shape)}: it has no "
                "counterpart in transformers"
            )
    like = model.embeddings.token.weight
    texts.write(theirs, config)
    _name_labels(theirs.config, model)
    load_state(theirs.to(device=like.device, dtype=like.dtype), state, learns)
    return theirs.train(model.training)


def _name_labels(theirs: Any, model: AnyModel) -> None:
    """Names of the labels and what they are, in a configuration of transformers."""
    if model.task.endswith("classification") and len(model.label_names) == model.num_labels:
        theirs.id2label = dict(enumerate(model.label_names))
        theirs.label2id = {name: number for number, name in enumerate(model.label_names)}
    if model.problem_type is not None and model.problem_type == known_problem(model):
        theirs.problem_type = model.problem_type
