"""ModernBERT as transformers lays it out (Warner et al. 2024, arXiv:2412.13663): every few layers are global, the
others have a window.

q, k and v are one projection, and so are the gate and the inner layer of the feed-forward. Block 0 has no norm before
its attention: the norm of the embeddings stands there. All heads share one dense layer with activation and norm. While
training, transformers drops out inside the feed-forward where ours drops out its output, and what attention adds with
the probability of its weights.
"""

from __future__ import annotations

from typing import Any

from effzoo.architectures import Config
from effzoo.architectures.function import WITH_HEAD
from effzoo.convert import rotary
from effzoo.convert.keymap import Rule, same
from effzoo.convert.layout import ACTIVATIONS, THEIR_ACTIVATION, Layout
from effzoo.convert.windows import attention_of, windows_of
from effzoo.errors import ConversionError, listing

BODY = (
    *same(
        {
            "embeddings.token": "{base}embeddings.tok_embeddings",
            "embeddings.norm": "{base}embeddings.norm",
            "blocks.{i}.attn.o": "{base}layers.{i}.attn.Wo",
            "blocks.{i}.mlp_norm": "{base}layers.{i}.mlp_norm",
            "blocks.{i}.mlp.down": "{base}layers.{i}.mlp.Wo",
            "final_norm": "{base}final_norm",
        }
    ),
    Rule(("blocks.{i}.attn_norm",), "{base}layers.{i}.attn_norm", first=1),
    Rule(("blocks.{i}.attn.q", "blocks.{i}.attn.k", "blocks.{i}.attn.v"), "{base}layers.{i}.attn.Wqkv"),
    Rule(("blocks.{i}.mlp.gate", "blocks.{i}.mlp.up"), "{base}layers.{i}.mlp.Wi"),
)
HEAD = {"head.dense": "head.dense", "head.norm": "head.norm"}
HEADS = {
    "features": (),
    "classification": same(HEAD | {"head.out": "classifier"}),
    "token_classification": same(HEAD | {"head.out": "classifier"}),
    "question_answering": same(HEAD | {"head.out": "classifier"}),
    "masked_lm": same(HEAD | {"head.out": "decoder"}),
}
POOLING = {"cls": "first", "mean": "mean"}
TYPES = ("default", "linear", "llama3")  # of rotary scaling
KINDS = {True: "sliding_attention", False: "full_attention"}


def read(theirs: Any) -> dict[str, Any]:
    """Windows and rotary positions by kind of layer, biases, and the head."""
    if theirs.classifier_activation != theirs.hidden_activation:
        raise ConversionError(
            f"modernbert with classifier_activation={theirs.classifier_activation!r} beside "
            f"hidden_activation={theirs.hidden_activation!r} has no "
            "counterpart in effzoo, which has one activation for both"
        )
    reach = theirs.local_attention // 2
    if reach < 1:
        raise ConversionError(
            f"modernbert with local_attention={theirs.local_attention} shows each position itself "
            "alone; windows start at 2"
        )
    turned = {
        kind: rotary.read(theirs.rope_parameters[kind], theirs, whose=f"modernbert's {kind}", types=TYPES)
        for kind in set(theirs.layer_types)
    }
    scalings = [of_kind["rotary_scaling"] for of_kind in turned.values()]
    if any(scaling != scalings[0] for scaling in scalings):
        raise ConversionError(
            "modernbert scales its rotary positions differently in local and global layers, "
            f"{scalings}; effzoo has one scaling"
        )
    return {
        "attention": attention_of([2 * reach if kind == KINDS[True] else None for kind in theirs.layer_types]),
        "rotary_theta": tuple(turned[kind]["rotary_theta"] for kind in theirs.layer_types),
        "rotary_scaling": scalings[0],
        "attn_out_bias": theirs.attention_bias,
        "lm_bias": None if theirs.decoder_bias else False,
        "pooling": POOLING[theirs.classifier_pooling],
        "head_activation": ACTIVATIONS.get(theirs.classifier_activation),
    }


def write(config: Config) -> dict[str, Any]:
    windows = windows_of(config, "ModernBERT", global_projections=False)
    scaling = config.rotary_scaling or {"type": "default"}
    if isinstance(scaling, tuple) or scaling["type"] not in TYPES:
        raise ConversionError(
            f"ModernBERT is converted with one scaling of rotary positions, of type {listing(TYPES)}, got {scaling}"
        )
    thetas = config.rotary_theta if isinstance(config.rotary_theta, tuple) else (config.rotary_theta,) * config.layers
    of_kind: dict[str, set[Any]] = {kind: set() for kind in KINDS.values()}
    for window, theta in zip(windows, thetas, strict=True):
        of_kind[KINDS[window is not None]].add((window, theta))
    if any(len(found) > 1 for found in of_kind.values()):
        raise ConversionError(
            f"transformers' ModernBERT has one window, and one rotary_theta for each kind of layer, got {of_kind}"
        )
    for name, one, other in (
        ("attn_bias", config.attn_bias, config.attn_out_bias), ("dropout", config.dropout, config.attention_dropout),
        ("activation", config.activation, config.head_activation),
    ):  # fmt: skip
        if one != other:
            raise ConversionError(f"transformers' ModernBERT has one {name} where this model has {one!r} and {other!r}")
    pooling = {ours: theirs for theirs, ours in POOLING.items()}
    if config.pooling not in pooling:
        raise ConversionError(
            f"transformers' ModernBERT has no counterpart for pooling={config.pooling!r}; it has {listing(pooling)}"
        )
    local, whole = (next(iter(of_kind[KINDS[kind]]), (None, None)) for kind in (True, False))
    return {
        "layer_types": [KINDS[window is not None] for window in windows],
        "rope_parameters": {
            kind: rotary.write(default if theta is None else theta, scaling)
            for kind, theta, default in ((KINDS[True], local[1], 10_000.0), (KINDS[False], whole[1], 160_000.0))
        },
        "attention_bias": config.attn_bias,
        "decoder_bias": config.lm_bias is not False,
        "classifier_pooling": pooling[config.pooling],
        "classifier_activation": THEIR_ACTIVATION[config.head_activation],
        "mlp_dropout": config.dropout,
        "classifier_dropout": config.dropout,
    } | ({} if local[0] is None else {"local_attention": local[0]})  # fmt: skip


def dropouts(theirs: Any, task: str) -> dict[str, float | None]:
    """In the feed-forward, on what attention adds, and in a classification head."""
    probabilities = {"mlp_dropout": theirs.mlp_dropout, "attention_dropout": theirs.attention_dropout}
    return probabilities | ({"classifier_dropout": theirs.classifier_dropout} if task in WITH_HEAD else {})


MODERNBERT = Layout(
    name="modernbert",
    attention=("full", "longformer"),
    prefix="model",
    classes={
        "features": "ModernBertModel",
        "classification": "ModernBertForSequenceClassification",
        "token_classification": "ModernBertForTokenClassification",
        "question_answering": "ModernBertForQuestionAnswering",
        "masked_lm": "ModernBertForMaskedLM",
    },
    body=BODY,
    heads=HEADS,
    tied={"decoder.weight": "{base}embeddings.tok_embeddings.weight"},
    fields={
        "vocab": "vocab_size",
        "dim": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "mlp": "intermediate_size",
        "eps": "norm_eps",
        "norm_bias": "norm_bias",
        "attn_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
        "transform_bias": "classifier_bias",
        "dropout": "embedding_dropout",
        "attention_dropout": "attention_dropout",
        "pad_token": "pad_token_id",
        "tied": "tie_word_embeddings",
    },
    positions="max_position_embeddings",
    activation="hidden_activation",
    slots={
        "architecture": "encoder", "norm": "pre", "first_norm": False, "embed_norm": True, "gated": True,
        "positions": "rotary", "types": 0,
        "head_dense": True, "head_norm": True, "head_bias": True, "token_dense": True, "pooler": False,
        "lm_transform": True,
    },
    required={},
    dropouts=dropouts,
    read=read,
    write=write,
    translated=frozenset({"rotary_theta", "rotary_scaling", "attn_out_bias", "lm_bias", "pooling", "head_activation"}),
    shared=frozenset(HEAD.values()),
    reads=frozenset({
        "classifier_activation", "classifier_dropout", "classifier_pooling", "decoder_bias", "layer_types",
        "local_attention", "mlp_dropout", "rope_parameters",
    }),
    inert=frozenset({
        "deterministic_flash_attn", "global_attn_every_n_layers", "initializer_cutoff_factor", "layer_norm_eps",
        "reference_compile", "repad_logits_with_grad", "sparse_pred_ignore_index",
    }),
    mixed=True,
)  # fmt: skip
