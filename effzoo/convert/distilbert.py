"""DistilBERT as transformers lays it out (Sanh et al. 2019, arXiv:1910.01108): BERT with half the layers, without token
types and without a pooler.

Its classification head has a dense layer with relu. While training, transformers drops out the input of each head with
a probability of its own, and inside the feed-forward where ours drops out its output.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from effzoo.architectures import Config
from effzoo.convert.bert import BERT
from effzoo.convert.keymap import same

BODY = same(
    {
        "embeddings.token": "{base}embeddings.word_embeddings",
        "embeddings.position": "{base}embeddings.position_embeddings",
        "embeddings.norm": "{base}embeddings.LayerNorm",
        "blocks.{i}.attn.q": "{base}transformer.layer.{i}.attention.q_lin",
        "blocks.{i}.attn.k": "{base}transformer.layer.{i}.attention.k_lin",
        "blocks.{i}.attn.v": "{base}transformer.layer.{i}.attention.v_lin",
        "blocks.{i}.attn.o": "{base}transformer.layer.{i}.attention.out_lin",
        "blocks.{i}.attn_norm": "{base}transformer.layer.{i}.sa_layer_norm",
        "blocks.{i}.mlp.up": "{base}transformer.layer.{i}.ffn.lin1",
        "blocks.{i}.mlp.down": "{base}transformer.layer.{i}.ffn.lin2",
        "blocks.{i}.mlp_norm": "{base}transformer.layer.{i}.output_layer_norm",
    }
)
HEADS = {
    "features": (),
    "classification": same({"head.dense": "pre_classifier", "head.out": "classifier"}),
    "token_classification": same({"head.out": "classifier"}),
    "question_answering": same({"head.out": "qa_outputs"}),
    "masked_lm": same(
        {"head.dense": "vocab_transform", "head.norm": "vocab_layer_norm", "head.out": "vocab_projector"}
    ),
}
OWN_DROPOUT = {"classification": "seq_classif_dropout", "question_answering": "qa_dropout"}


def dropouts(theirs: Any, task: str) -> dict[str, float | None]:
    """Two heads have a dropout of their own."""
    return {OWN_DROPOUT[task]: getattr(theirs, OWN_DROPOUT[task])} if task in OWN_DROPOUT else {}


def write(config: Config) -> dict[str, Any]:
    return dict.fromkeys(OWN_DROPOUT.values(), config.dropout)


DISTILBERT = dataclasses.replace(
    BERT,
    name="distilbert",
    prefix="distilbert",
    classes={task: name.replace("Bert", "DistilBert") for task, name in BERT.classes.items()},
    body=BODY,
    heads=HEADS,
    tied={"vocab_projector.weight": "{base}embeddings.word_embeddings.weight"},
    fields={
        "vocab": "vocab_size", "dim": "dim", "layers": "n_layers", "heads": "n_heads", "mlp": "hidden_dim",
        "dropout": "dropout", "attention_dropout": "attention_dropout", "pad_token": "pad_token_id",
    },
    activation="activation",
    slots={
        "architecture": "encoder", "norm": "post", "types": 0, "eps": 1e-12, "pooling": "first", "head_dense": True,
        "head_activation": "relu", "head_bias": True, "pooler": False, "lm_transform": True,
    },
    required={},
    dropouts=dropouts,
    write=write,
    reads=frozenset({"qa_dropout", "seq_classif_dropout", "tie_word_embeddings"}),
    inert=frozenset({"sinusoidal_pos_embds"}),  # how the table begins; it is in the file
)  # fmt: skip
