"""ALBERT as transformers lays it out (Lan et al. 2020, arXiv:1909.11942): BERT with narrow embeddings, and layers that
share blocks.

While training, transformers drops out nothing of what a feed-forward adds, which ours does; the published models have a
dropout of 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from effzoo.convert.bert import BERT, FIELDS, REQUIRED
from effzoo.convert.keymap import same

_LAYER = "{base}encoder.albert_layer_groups.{i}.albert_layers.0"
BODY = same(
    {
        "embeddings.token": "{base}embeddings.word_embeddings",
        "embeddings.position": "{base}embeddings.position_embeddings",
        "embeddings.token_type": "{base}embeddings.token_type_embeddings",
        "embeddings.norm": "{base}embeddings.LayerNorm",
        "embeddings.project": "{base}encoder.embedding_hidden_mapping_in",
        "blocks.{i}.attn.q": f"{_LAYER}.attention.query",
        "blocks.{i}.attn.k": f"{_LAYER}.attention.key",
        "blocks.{i}.attn.v": f"{_LAYER}.attention.value",
        "blocks.{i}.attn.o": f"{_LAYER}.attention.dense",
        "blocks.{i}.attn_norm": f"{_LAYER}.attention.LayerNorm",
        "blocks.{i}.mlp.up": f"{_LAYER}.ffn",
        "blocks.{i}.mlp.down": f"{_LAYER}.ffn_output",
        "blocks.{i}.mlp_norm": f"{_LAYER}.full_layer_layer_norm",
    }
)
HEADS = {
    "features": same({"head.pooler": "{base}pooler"}),
    "classification": same({"head.dense": "{base}pooler", "head.out": "classifier"}),
    "token_classification": same({"head.out": "classifier"}),
    "question_answering": same({"head.out": "qa_outputs"}),
    "masked_lm": same(
        {"head.dense": "predictions.dense", "head.norm": "predictions.LayerNorm", "head.out": "predictions"}
    ),
}


def dropouts(theirs: Any, task: str) -> dict[str, float | None]:
    """The classifier has a dropout of its own."""
    return (
        {"classifier_dropout_prob": theirs.classifier_dropout_prob}
        if task in ("classification", "token_classification")
        else {}
    )


def _write(config: Any) -> dict[str, Any]:
    return {
        "classifier_dropout_prob": config.dropout,
        "num_hidden_groups": config.blocks,  # a block per layer is a group per layer
        "embedding_size": config.embed_dim,
    }


ALBERT = dataclasses.replace(
    BERT,
    name="albert",
    prefix="albert",
    classes={task: name.replace("Bert", "Albert") for task, name in BERT.classes.items()},
    body=BODY,
    heads=HEADS,
    tied={
        "predictions.decoder.weight": "{base}embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    },
    fields={**FIELDS, "embedding_dim": "embedding_size", "share_layers": "num_hidden_groups"},
    required={**REQUIRED, "inner_group_num": 1},
    dropouts=dropouts,
    write=_write,
    reads=frozenset({"classifier_dropout_prob", "tie_word_embeddings"}),
    inert=frozenset({"down_scale_factor", "gap_size", "net_structure_type", "num_memory_blocks"}),
)
