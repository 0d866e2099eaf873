"""ELECTRA as transformers lays it out (Clark et al. 2020, arXiv:2003.10555): BERT without a pooler, with embeddings as
narrow as its config says and a classification head of its own, dense with gelu.

Discriminators are models of every task but the language model, which is the generator. While training, transformers
also drops out the input of the classification head's dense layer, which ours does not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from effzoo.architectures import Config
from effzoo.convert.bert import BERT, BODY
from effzoo.convert.keymap import Rule, same
from effzoo.errors import ConversionError

HEADS = {
    "features": (),
    "classification": same({"head.dense": "classifier.dense", "head.out": "classifier.out_proj"}),
    "token_classification": same({"head.out": "classifier"}),
    "question_answering": same({"head.out": "qa_outputs"}),
    "masked_lm": same(
        {
            "head.dense": "generator_predictions.dense",
            "head.norm": "generator_predictions.LayerNorm",
            "head.out": "generator_lm_head",
        }
    ),
}


def read(theirs: Any) -> dict[str, Any]:
    return {"embedding_dim": 0 if theirs.embedding_size == theirs.hidden_size else theirs.embedding_size}


def write(config: Config) -> dict[str, Any]:
    if config.embedding_dim == config.dim:
        raise ConversionError(
            f"ELECTRA of transformers has no linear layer between embeddings and hidden states of one width; this "
            f"model has one, with embedding_dim={config.embedding_dim}"
        )
    return {"embedding_size": config.embed_dim, "classifier_dropout": config.dropout}


ELECTRA = dataclasses.replace(
    BERT,
    name="electra",
    prefix="electra",
    classes={task: name.replace("Bert", "Electra") for task, name in BERT.classes.items()},
    body=(*BODY, Rule(("embeddings.project",), "{base}embeddings_project", optional=True)),
    heads=HEADS,
    tied={"generator_lm_head.weight": "{base}embeddings.word_embeddings.weight"},
    slots={**BERT.slots, "head_activation": "gelu", "pooler": False},
    lm_activation="gelu",
    read=read,
    write=write,
    translated=frozenset({"embedding_dim"}),
    reads=frozenset({"classifier_dropout", "embedding_size", "tie_word_embeddings"}),
    # of the head for multiple choice
    inert=frozenset({"summary_activation", "summary_last_dropout", "summary_type", "summary_use_proj"}),
)
