"""GPT-2 as transformers lays it out (Radford et al. 2019): one fused q, k, v projection, and weights stored as [in,
out].

While training, our classification head has a dropout before its last layer where GPT2ForSequenceClassification has
none.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from effzoo.architectures import Config
from effzoo.convert.keymap import Rule, same
from effzoo.convert.layout import Layout
from effzoo.convert.llama import causal
from effzoo.errors import ConversionError

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

SCALES = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx")


def read(theirs: Any) -> dict[str, Any]:
    """The inner width is four times the width where it is not given."""
    width = theirs.n_embd // theirs.n_head
    scales = score_dims(width, theirs.n_layer, *(getattr(theirs, switch) for switch in SCALES))
    return {
        "mlp": theirs.n_inner or 4 * theirs.n_embd,
        "architecture": "decoder" if causal(theirs) else "encoder",
        "score_dim": 0.0 if set(scales) == {float(width)} else scales,
    }


def score_dims(width: int, layers: int, by_width: bool, by_layer: bool) -> tuple[float, ...]:
    """Our score_dim of each layer: theirs divides scores by the root of the head's width, by the layer's number, which
    counts from 1, by both or by neither."""
    return tuple((width if by_width else 1.0) * (layer + 1 if by_layer else 1.0) ** 2 for layer in range(layers))


def write(config: Config) -> dict[str, Any]:
    """Raises ConversionError for scores that theirs cannot divide so."""
    width = config.dim // config.heads
    given = config.score_dim if isinstance(config.score_dim, tuple) else (config.score_dim or width,) * config.layers
    ways = [way for way in product((True, False), (False, True)) if score_dims(width, config.layers, *way) == given]
    if not ways:
        raise ConversionError(
            f"GPT-2 of transformers divides scores by the root of the head's width {width} or not, and by the number "
            f"of the layer or not, which is not score_dim={config.score_dim}"
        )
    scales = dict(zip(SCALES, ways[0], strict=True))
    return (
        scales
        | {"embd_pdrop": config.dropout, "classifier_dropout": config.dropout}
        | ({} if config.causal else {"is_causal": False})
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
    required={"add_cross_attention": False}, dropouts=dropouts,
    translated=frozenset({"architecture", "score_dim"}),
    read=read,
    write=write,
    reads=frozenset({
        *SCALES, "classifier_dropout", "embd_pdrop", "hidden_dropout", "is_causal", "tie_word_embeddings",
    }),
    # reorder_and_upcast_attn: the same scores in another order and precision
    inert=frozenset({
        "n_ctx", "predict_special_tokens", "reorder_and_upcast_attn", "summary_activation", "summary_first_dropout",
        "summary_proj_to_labels", "summary_type", "summary_use_proj",
    }),
)  # fmt: skip
