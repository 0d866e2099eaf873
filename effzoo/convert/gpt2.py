"""GPT-2 as transformers lays it out (Radford et al. 2019): one fused q, k, v projection, and weights stored as [in,
out].

While training, our classification head has a dropout before its last layer where GPT2ForSequenceClassification has
none.
"""

from __future__ import annotations

from typing import Any

from effzoo.architectures import Config
from effzoo.convert.keymap import Rule, same
from effzoo.convert.layout import Layout
from effzoo.convert.llama import causal

BODY = (
    *same(
        {
            "embeddings.token": "{base}wte",
            "embeddings.position": "{base}wpe",
            "blocks.{i}.attn_norm": "{base}h.{i}.ln_1",
            "blocks.{i}.mlp_norm": "{base}h.{i}.ln_2",
            "final_norm": "{base}ln_f",
        }
    ),
    Rule(("blocks.{i}.attn.q", "blocks.{i}.attn.k", "blocks.{i}.attn.v"), "{base}h.{i}.attn.c_attn", transposed=True),
    Rule(("blocks.{i}.attn.o",), "{base}h.{i}.attn.c_proj", transposed=True),
    Rule(("blocks.{i}.mlp.up",), "{base}h.{i}.mlp.c_fc", transposed=True),
    Rule(("blocks.{i}.mlp.down",), "{base}h.{i}.mlp.c_proj", transposed=True),
)
HEADS = {
    "features": (),
    "classification": same({"head.out": "score"}),
    "token_classification": same({"head.out": "classifier"}),
    "question_answering": same({"head.out": "qa_outputs"}),
    "causal_lm": (),
}


def read(theirs: Any) -> dict[str, Any]:
    """The inner width is four times the width where it is not given."""
    return {"mlp": theirs.n_inner or 4 * theirs.n_embd, "architecture": "decoder" if causal(theirs) else "encoder"}


def write(config: Config) -> dict[str, Any]:
    return {"embd_pdrop": config.dropout, "classifier_dropout": config.dropout} | (
        {} if config.causal else {"is_causal": False}
    )


def dropouts(theirs: Any, task: str) -> dict[str, float | None]:
    """Embeddings have a dropout of their own, and so has the token classifier: 0.1 where the config does not say."""
    probabilities = {"embd_pdrop": theirs.embd_pdrop}
    if task == "token_classification":
        classifier = getattr(theirs, "classifier_dropout", None)
        hidden = getattr(theirs, "hidden_dropout", None)
        probabilities["classifier_dropout"] = (
            classifier if classifier is not None else hidden if hidden is not None else 0.1
        )
    return probabilities


GPT2 = Layout(
    name="gpt2",
    prefix="transformer",
    classes={
        "features": "GPT2Model",
        "classification": "GPT2ForSequenceClassification",
        "token_classification": "GPT2ForTokenClassification",
        "question_answering": "GPT2ForQuestionAnswering",
        "causal_lm": "GPT2LMHeadModel",
    },
    body=BODY,
    heads=HEADS,
    tied={"lm_head.weight": "{base}wte.weight"},
    fields={
        "vocab": "vocab_size",
        "dim": "n_embd",
        "layers": "n_layer",
        "heads": "n_head",
        "mlp": "n_inner",
        "eps": "layer_norm_epsilon",
        "dropout": "resid_pdrop",
        "attention_dropout": "attn_pdrop",
        "pad_token": "pad_token_id",
    },
    positions="n_positions",
    activation="activation_function",
    slots={
        "norm": "pre", "types": 0, "pooling": "last", "head_dense": False, "head_bias": False, "pooler": False,
        "lm_transform": False,
    },
    required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
    "add_cross_attention": False}, dropouts=dropouts,
    translated=frozenset({"architecture"}),
    read=read,
    write=write,
    reads=frozenset({"classifier_dropout", "embd_pdrop", "hidden_dropout", "is_causal", "tie_word_embeddings"}),
    inert=frozenset({"n_ctx", "predict_special_tokens", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type",
                     "summary_use_proj"}),
)  # fmt: skip
