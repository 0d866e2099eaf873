"""BERT as transformers lays it out (Devlin et al. 2019, arXiv:1810.04805).

A classification head is the pooler followed by one linear layer, so the pooler of a model without a task becomes
`head.dense`.
"""

from __future__ import annotations

from typing import Any

from effzoo.convert.keymap import same
from effzoo.convert.layout import Layout

BODY = same(
    {
        "embeddings.token": "{base}embeddings.word_embeddings",
        "embeddings.position": "{base}embeddings.position_embeddings",
        "embeddings.token_type": "{base}embeddings.token_type_embeddings",
        "embeddings.norm": "{base}embeddings.LayerNorm",
        "blocks.{i}.attn.q": "{base}encoder.layer.{i}.attention.self.query",
        "blocks.{i}.attn.k": "{base}encoder.layer.{i}.attention.self.key",
        "blocks.{i}.attn.v": "{base}encoder.layer.{i}.attention.self.value",
        "blocks.{i}.attn.o": "{base}encoder.layer.{i}.attention.output.dense",
        "blocks.{i}.attn_norm": "{base}encoder.layer.{i}.attention.output.LayerNorm",
        "blocks.{i}.mlp.up": "{base}encoder.layer.{i}.intermediate.dense",
        "blocks.{i}.mlp.down": "{base}encoder.layer.{i}.output.dense",
        "blocks.{i}.mlp_norm": "{base}encoder.layer.{i}.output.LayerNorm",
    }
)
HEADS = {
    "features": same({"head.pooler": "{base}pooler.dense"}),
    "classification": same({"head.dense": "{base}pooler.dense", "head.out": "classifier"}),
    "token_classification": same({"head.out": "classifier"}),
    "question_answering": same({"head.out": "qa_outputs"}),
    "masked_lm": same(
        {
            "head.dense": "cls.predictions.transform.dense",
            "head.norm": "cls.predictions.transform.LayerNorm",
            "head.out": "cls.predictions",
        }
    ),
}
FIELDS = {
    "vocab": "vocab_size",
    "dim": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp": "intermediate_size",
    "eps": "layer_norm_eps",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "types": "type_vocab_size",
    "pad_token": "pad_token_id",
}
SLOTS = {
    "architecture": "encoder",
    "norm": "post",
    "pooling": "first",
    "head_dense": True,
    "head_bias": True,
    "pooler": True,
    "lm_transform": True,
}
REQUIRED = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}


def dropouts(theirs: Any, task: str) -> dict[str, float | None]:
    """The classifier may have a dropout of its own; None means that it has the common one."""
    return (
        {"classifier_dropout": getattr(theirs, "classifier_dropout", None)}
        if task in ("classification", "token_classification")
        else {}
    )


BERT = Layout(
    name="bert",
    prefix="bert",
    classes={
        "features": "BertModel",
        "classification": "BertForSequenceClassification",
        "token_classification": "BertForTokenClassification",
        "question_answering": "BertForQuestionAnswering",
        "masked_lm": "BertForMaskedLM",
    },
    body=BODY,
    heads=HEADS,
    tied={
        "cls.predictions.decoder.weight": "{base}embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    fields=FIELDS,
    positions="max_position_embeddings",
    activation="hidden_act",
    slots=SLOTS,
    required=REQUIRED,
    dropouts=dropouts,
    reads=frozenset({"classifier_dropout", "tie_word_embeddings"}),  # an untied head is found by its tensors
    inert=frozenset(
        {
            "directionality",
            "pooler_fc_size",
            "pooler_num_attention_heads",
            "pooler_num_fc_layers",
            "pooler_size_per_head",
            "pooler_type",
        }
    ),
)
