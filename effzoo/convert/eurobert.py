"""EuroBERT as transformers lays it out (Boizard et al. 2025, arXiv:2503.05500): a Llama that sees both sides.

Its classification head has a dense layer with gelu, by default on every token, of which it takes the mean
(`pooling="late"`). Nothing but attention weights is dropped out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from effzoo.architectures import Config
from effzoo.convert import llama
from effzoo.convert.keymap import same
from effzoo.convert.layout import no_dropouts
from effzoo.convert.llama import LLAMA
from effzoo.errors import ConversionError

POOLING = {"bos": "first", "mean": "mean", "late": "late"}


def read(theirs: Any) -> dict[str, Any]:
    if theirs.classifier_pooling not in POOLING:
        raise ConversionError(
            f"EuroBERT's classifier_pooling is one of {', '.join(POOLING)}, got {theirs.classifier_pooling!r}"
        )
    return LLAMA.read(theirs) | {
        "architecture": "encoder",
        "pooling": POOLING[theirs.classifier_pooling],
        "lm_bias": None if theirs.mlp_bias else False,
    }


def write(config: Config) -> dict[str, Any]:
    pooling = {ours: theirs for theirs, ours in POOLING.items()}
    if config.pooling not in pooling:
        raise ConversionError(
            f"EuroBERT of transformers has no counterpart for pooling={config.pooling!r}; it has {', '.join(pooling)}"
        )
    if (config.lm_bias is not False) != config.mlp_bias:
        raise ConversionError(
            "EuroBERT of transformers has biases in its feed-forwards and its language-model head or in neither, got "
            f"mlp_bias={config.mlp_bias} and lm_bias={config.lm_bias}"
        )
    written = LLAMA.write(config) | {"classifier_pooling": pooling[config.pooling]}
    return {name: value for name, value in written.items() if name not in ("is_causal", "classifier_dropout")}


EUROBERT = dataclasses.replace(
    LLAMA,
    name="eurobert",
    prefixes={},
    classes={
        "features": "EuroBertModel",
        "classification": "EuroBertForSequenceClassification",
        "token_classification": "EuroBertForTokenClassification",
        "masked_lm": "EuroBertForMaskedLM",
    },
    heads={
        "features": (),
        "classification": same({"head.dense": "dense", "head.out": "classifier"}),
        "token_classification": same({"head.out": "classifier"}),
        "masked_lm": same({"head.out": "lm_head"}),
    },
    slots=llama.SLOTS
    | {"architecture": "encoder", "head_dense": True, "head_activation": "gelu", "head_bias": True, "pooling": "late"},
    dropouts=no_dropouts,
    read=read,
    write=write,
    translated=LLAMA.translated | {"lm_bias", "pooling"},
    reads=frozenset({"classifier_pooling", "head_dim", "num_key_value_heads", "rope_parameters"}),
    inert=frozenset({"mask_token_id", "pretraining_tp"}),
)
