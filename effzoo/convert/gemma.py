"""Gemma 2 and Gemma 3 (its texts) as transformers lays them out: Llama with norms before and after each sub-layer that
multiply by 1 + w, embeddings times sqrt(dim), scores divided by a number of their own, and windows in some layers.

Gemma 2: Gemma Team 2024, arXiv:2408.00118, section 2: scores and logits are capped.
Gemma 3: Gemma Team 2025, arXiv:2503.19786, section 2: queries and keys are normalised head by head, and layers with a
window have rotary positions of another base; of the others transformers reads a scaling.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from effzoo.architectures import Config
from effzoo.convert import llama, rotary
from effzoo.convert.keymap import same
from effzoo.convert.llama import (
    HEAD_NORMS,
    HEADS,
    LLAMA,
    READS,
    SIZES,
    SLIDING,
    SLOTS,
    TRANSLATED,
    biases,
    read_heads,
    read_windows,
    write_biases,
    write_windows,
)
from effzoo.errors import ConversionError

FULL = "full_attention"
THETAS = {SLIDING: 10_000.0, FULL: 1_000_000.0}  # of Gemma 3, where no layer of a kind says another
TYPES = ("default", "linear", "llama3", "yarn")
BODY = tuple(rule for rule in LLAMA.body if rule.ours[0] != "blocks.{i}.mlp_norm") + same(
    {
        "blocks.{i}.attn_out_norm": "{base}layers.{i}.post_attention_layernorm",
        "blocks.{i}.mlp_norm": "{base}layers.{i}.pre_feedforward_layernorm",
        "blocks.{i}.mlp_out_norm": "{base}layers.{i}.post_feedforward_layernorm",
    }
)
CAPS = {"score_cap": "attn_logit_softcapping", "logit_cap": "final_logit_softcapping"}


def read_scores(theirs: Any, *caps: str) -> dict[str, Any]:
    """What scores are divided by, and the caps of scores and logits."""
    given = {ours: getattr(theirs, CAPS[ours]) for ours in caps}
    if any(value == 0 for value in given.values()):
        raise ConversionError(f"{theirs.model_type} divides by its caps, got {given}; None is for no cap")
    head_dim = theirs.head_dim or theirs.hidden_size // theirs.num_attention_heads
    score_dim = 0.0 if theirs.query_pre_attn_scalar == head_dim else float(theirs.query_pre_attn_scalar)
    return {"score_dim": score_dim} | {ours: float(value or 0.0) for ours, value in given.items()}


def write_scores(config: Config, *caps: str) -> dict[str, Any]:
    score_dim = config.score_dim or config.head_dim or config.dim // config.heads
    if isinstance(score_dim, tuple):
        raise ConversionError(f"{config.layout} of transformers has one score_dim for all layers, got {score_dim}")
    if score_dim != int(score_dim):
        raise ConversionError(f"{config.layout} of transformers has a whole score_dim, got {score_dim}")
    given = {"query_pre_attn_scalar": int(score_dim)} | {CAPS[ours]: getattr(config, ours) or None for ours in caps}
    return given | ({"hidden_activation": "gelu_pytorch_tanh"} if config.activation == "gelu_tanh" else {})


def write_gemma_windows(config: Config) -> dict[str, Any]:
    """Theirs makes the mask of a window even where no layer has one, so its own default stays there."""
    windows = write_windows(config)
    return {name: value for name, value in windows.items() if value is not None}


def read_gemma2(theirs: Any) -> dict[str, Any]:
    return llama.read(theirs) | read_windows(theirs) | biases(theirs) | read_scores(theirs, *CAPS)


def write_gemma2(config: Config) -> dict[str, Any]:
    return llama.write(config) | write_gemma_windows(config) | write_biases(config) | write_scores(config, *CAPS)


def read_gemma3(theirs: Any) -> dict[str, Any]:
    """Bases and scalings by kind of layer."""
    turned = {}
    for kind in set(theirs.layer_types):
        # of a dict per kind of layer transformers never reads it
        given = {name: value for name, value in theirs.rope_parameters[kind].items() if name != "truncate"}
        turned[kind] = rotary.read(given, theirs, whose=f"{theirs.model_type}'s {kind}", types=TYPES)
    return {
        **read_heads(theirs),
        **read_windows(theirs),
        **biases(theirs),
        **read_scores(theirs, "logit_cap"),
        "rotary_theta": tuple(turned[kind]["rotary_theta"] for kind in theirs.layer_types),
        "rotary_scaling": tuple(turned[kind]["rotary_scaling"] or {} for kind in theirs.layer_types),
    }


def write_gemma3(config: Config) -> dict[str, Any]:
    windows = write_gemma_windows(config)
    turned: dict[str, tuple[Any, Any]] = {}
    said: tuple[Any, ...] = config.rotary_theta, config.rotary_scaling
    for layer, kind in enumerate(windows["layer_types"]):
        theta, scaling = (given[layer] if isinstance(given, tuple) else given for given in said)
        scaling = scaling or {"type": "default"}
        if turned.setdefault(kind, (theta, scaling)) != (theta, scaling):
            raise ConversionError(
                f"transformers' Gemma 3 turns all layers with a window alike, and all others, got {turned[kind]} and "
                f"{theta, scaling} in {kind}"
            )
        if scaling["type"] not in TYPES or scaling.get("truncate") is False:
            raise ConversionError(
                f"transformers' Gemma 3 is converted with scalings of type {', '.join(TYPES)}, got {scaling}"
            )
    plain = dataclasses.replace(config, rotary_theta=1.0, rotary_scaling=None)
    parameters = {kind: rotary.write(*turned.get(kind, (theta, None))) for kind, theta in THETAS.items()}
    others = windows | write_biases(config) | write_scores(config, "logit_cap")
    return llama.write(plain) | others | {"rope_parameters": parameters}


GEMMA2 = dataclasses.replace(
    LLAMA,
    name="gemma2",
    prefixes={},
    attention=("full", "longformer"),
    classes={
        task: name.replace("Llama", "Gemma2") for task, name in LLAMA.classes.items() if task != "question_answering"
    },
    heads={task: rules for task, rules in HEADS.items() if task != "question_answering"},
    body=BODY,
    fields=SIZES | {"attn_bias": "attention_bias"},
    activation="hidden_activation",
    slots=SLOTS | {"norm": "sandwich", "norm_kind": "rms_plus_one", "scale_embeddings": True, "mlp_bias": False},
    read=read_gemma2,
    write=write_gemma2,
    translated=TRANSLATED | {"attn_out_bias", "score_dim", *CAPS},
    reads=READS | {"layer_types", "query_pre_attn_scalar", "sliding_window", *CAPS.values()},
    # what published files say of caches, or say twice
    inert=frozenset({"cache_implementation", "hidden_act", "sliding_window_size", "sliding_window_pattern"}),
    mixed=True,
)
GEMMA3 = dataclasses.replace(
    GEMMA2,
    name="gemma3_text",
    classes={
        "features": "Gemma3TextModel",
        "classification": "Gemma3TextForSequenceClassification",
        "causal_lm": "Gemma3ForCausalLM",
    },
    heads={task: HEADS[task] for task in ("features", "classification", "causal_lm")},
    body=BODY + HEAD_NORMS,
    slots={**GEMMA2.slots, "qk_norm": True},
    read=read_gemma3,
    write=write_gemma3,
    translated=TRANSLATED | {"attn_out_bias", "score_dim", "logit_cap"},
    reads=GEMMA2.reads - {CAPS["score_cap"]},
)
