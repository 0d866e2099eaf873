"""BERT with rotary positions in place of learned ones: encoders of long texts for retrieval, as transformers lays them
out.

NomicBERT (Nussbaum et al. 2024, arXiv:2402.01613) has a gated feed-forward and no biases in its linear layers, GTE
(Zhang et al. 2024, arXiv:2407.19669) a gated feed-forward with a bias at its end alone, and the third version of Jina's
embeddings (Sturua et al. 2024, arXiv:2409.10173) BERT's layers and RoBERTa's heads.

While training, GTE of transformers drops out inside the feed-forward too, and Jina's the input of the classification
head's dense layer; ours does neither. The adapters of Jina's tasks are no part of its layout.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from effzoo.architectures import Config
from effzoo.convert import bert, roberta, rotary
from effzoo.convert.bert import BERT
from effzoo.convert.keymap import same
from effzoo.convert.llama import one_for_all
from effzoo.errors import ConversionError, listing

ENDS = {
    "embeddings.token": "{base}embeddings.word_embeddings",
    "embeddings.token_type": "{base}embeddings.token_type_embeddings",
    "embeddings.norm": "{base}embeddings.LayerNorm",
    "blocks.{i}.attn.q": "{base}layers.{i}.self_attn.q_proj",
    "blocks.{i}.attn.k": "{base}layers.{i}.self_attn.k_proj",
    "blocks.{i}.attn.v": "{base}layers.{i}.self_attn.v_proj",
    "blocks.{i}.attn.o": "{base}layers.{i}.self_attn.o_proj",
    "blocks.{i}.attn_norm": "{base}layers.{i}.post_attention_layernorm",
    "blocks.{i}.mlp_norm": "{base}layers.{i}.post_mlp_layernorm",
}
GATED = {
    "blocks.{i}.mlp.gate": "{base}layers.{i}.mlp.gate_proj",
    "blocks.{i}.mlp.up": "{base}layers.{i}.mlp.up_proj",
    "blocks.{i}.mlp.down": "{base}layers.{i}.mlp.down_proj",
}
PLAIN = {"blocks.{i}.mlp.up": "{base}layers.{i}.mlp.fc1", "blocks.{i}.mlp.down": "{base}layers.{i}.mlp.fc2"}
SLOTS = {**BERT.slots, "positions": "rotary"}
TYPES = ("default", "linear", "llama3", "yarn")  # of rotary scaling


def read(theirs: Any) -> dict[str, Any]:
    given = getattr(theirs, "head_dim", None)
    whole = given is None or given * theirs.num_attention_heads == theirs.hidden_size
    turned = rotary.read(theirs.rope_parameters, theirs, types=TYPES)
    return {"head_dim": 0 if whole else given, **turned}


def write(config: Config) -> dict[str, Any]:
    theta, scaling = (one_for_all(config, name) for name in ("rotary_theta", "rotary_scaling"))
    if scaling is not None and scaling["type"] not in TYPES:
        raise ConversionError(
            f"{config.layout} is converted with rotary_scaling of type {listing(TYPES)}, got {scaling}"
        )
    return {"rope_parameters": rotary.write(theta, scaling), "classifier_dropout": config.dropout}


def write_nomic(config: Config) -> dict[str, Any]:
    return write(config) | {"head_dim": config.head_dim or config.dim // config.heads}


NOMIC_BERT = dataclasses.replace(
    BERT,
    name="nomic_bert",
    prefix="nomic_bert",
    classes={
        task: name.replace("Bert", "NomicBert") for task, name in BERT.classes.items() if task != "question_answering"
    },
    body=same(ENDS | GATED),
    heads={
        **{task: rules for task, rules in bert.HEADS.items() if task != "question_answering"},
        "masked_lm": same(
            {
                "head.dense": "cls.predictions.transform.dense",
                "head.norm": "cls.predictions.transform.layer_norm",
                "head.out": "cls.predictions",
            }
        ),
    },
    slots={**SLOTS, "gated": True, "attn_bias": False, "attn_out_bias": False, "mlp_bias": False, "pooler": False},
    required={},
    read=read,
    write=write_nomic,
    translated=frozenset({"head_dim", "rotary_theta", "rotary_scaling"}),
    reads=frozenset({"classifier_dropout", "head_dim", "rope_parameters", "tie_word_embeddings"}),
    inert=frozenset(),
)
GTE = dataclasses.replace(
    NOMIC_BERT,
    name="gte",
    prefix="gte",
    classes={task: name.replace("NomicBert", "Gte") for task, name in NOMIC_BERT.classes.items()},
    heads={
        **NOMIC_BERT.heads,
        "masked_lm": same(
            {"head.dense": "lm_head.dense", "head.norm": "lm_head.layer_norm", "head.out": "lm_head.decoder"}
        ),
    },
    tied={"lm_head.decoder.weight": "{base}embeddings.word_embeddings.weight"},
    slots={**SLOTS, "gated": True, "mlp_bias": False, "mlp_out_bias": True, "pooler": False},
    lm_activation="gelu",
    write=write,
    translated=frozenset({"rotary_theta", "rotary_scaling"}),
    reads=frozenset({"classifier_dropout", "rope_parameters", "tie_word_embeddings"}),
)
JINA = dataclasses.replace(
    GTE,
    name="jina_embeddings_v3",
    prefix="roberta",
    classes={task: name.replace("Bert", "JinaEmbeddingsV3") for task, name in BERT.classes.items()},
    body=same(ENDS | PLAIN),
    heads=roberta.HEADS,
    tied=roberta.ROBERTA.tied,
    slots=SLOTS,
)
