"""T5, T5 v1.1 and mT5 as transformers lays them out (Raffel et al. 2020, arXiv:1910.10683; Shazeer 2020,
arXiv:2002.05202; Xue et al. 2021, arXiv:2010.11934): RMSNorm in front of each sub-layer, no biases, relative positions,
scores without 1 / sqrt(d).

The feed-forward is W_down relu(W_up x), or gated; a tied head of T5 reads states divided by sqrt(dim), and v1.1 and mT5
do without. One dropout acts everywhere. The configuration has no length, as positions have none: `n_positions` of
published files is taken, or 512. A head whose weight differs from the embedding is read as an untied one; transformers
writes tied ones alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from effzoo.architectures import Config, EncoderDecoderConfig
from effzoo.convert.keymap import Rule, same
from effzoo.convert.layout import THEIR_ACTIVATION, Layout
from effzoo.errors import ConversionError

EVERYWHERE = ("attention_dropout", "activation_dropout", "final_dropout")


def _stack(name: str, letter: str, cross: bool) -> tuple[Rule, ...]:
    """The rules of an encoder or a decoder."""
    block, layer = f"{name}.blocks.{{{letter}}}", f"{{base}}{name}.block.{{{letter}}}.layer"
    last = 2 if cross else 1
    paths = {
        f"{name}.relative.table": f"{{base}}{name}.block.0.layer.0.SelfAttention.relative_attention_bias",
        f"{name}.final_norm": f"{{base}}{name}.final_layer_norm",
        f"{block}.attn_norm": f"{layer}.0.layer_norm",
        f"{block}.mlp_norm": f"{layer}.{last}.layer_norm",
        f"{block}.mlp.down": f"{layer}.{last}.DenseReluDense.wo",
    } | {f"{block}.attn.{part}": f"{layer}.0.SelfAttention.{part}" for part in "qkvo"}
    if cross:
        paths |= {f"{block}.cross.{part}": f"{layer}.1.EncDecAttention.{part}" for part in "qkvo"}
        paths |= {f"{block}.cross_norm": f"{layer}.1.layer_norm"}
    inner = {"wi": "up", "wi_0": "gate", "wi_1": "up"}  # the first alone, or the other two
    feed = [
        Rule((f"{block}.mlp.{ours}",), f"{layer}.{last}.DenseReluDense.{theirs}", optional=True)
        for theirs, ours in inner.items()
    ]
    return (*same(paths), *feed)


def read(theirs: Any) -> dict[str, Any]:
    """What they say in other words, and the one dropout."""
    return {
        "gated": theirs.is_gated_act, "scaled_logits": getattr(theirs, "scale_decoder_outputs", False),
        "decoder_start_token": getattr(theirs, "decoder_start_token_id", None),
        "max_length": getattr(theirs, "n_positions", None) or 512, **dict.fromkeys(EVERYWHERE, theirs.dropout_rate),
    }  # fmt: skip


def write(config: Config) -> dict[str, Any]:
    assert isinstance(config, EncoderDecoderConfig)
    for name in EVERYWHERE:
        if getattr(config, name) != config.dropout:
            raise ConversionError(
                f"T5 of transformers has one dropout, got dropout={config.dropout} and "
                f"{name}={getattr(config, name)}; build the model with one"
            )
    if not config.tied:
        raise ConversionError("transformers ties the head of a T5 to its embedding, and this model's is its own")
    activation = THEIR_ACTIVATION[config.activation]
    if config.gated and activation == "gelu":  # which they read as the approximation by tanh
        raise ConversionError("T5 of transformers has no gated exact gelu; it has activation='gelu_tanh'")
    named = "gelu" if config.gated and activation == "gelu_new" else activation
    return {
        "feed_forward_proj": f"gated-{named}" if config.gated else named,
        "decoder_start_token_id": config.decoder_start_token,
        **({} if config.scaled_logits else {"tie_word_embeddings": False}),
    }


def dropouts(theirs: Any, task: str) -> dict[str, float | None]:
    return {}


T5 = Layout(
    name="t5",
    prefix="",
    classes={"features": "T5Model", "seq2seq_lm": "T5ForConditionalGeneration"},
    body=(
        *same({"encoder.embeddings.token": "{base}shared"}),
        *_stack("encoder", "i", cross=False),
        *_stack("decoder", "j", cross=True),
    ),
    heads={"features": (), "seq2seq_lm": same({"head.out": "lm_head"})},
    same={"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"},
    tied={"lm_head.weight": "shared.weight"},
    untied="lm_head.weight",
    fields={
        "vocab": "vocab_size",
        "dim": "d_model",
        "layers": "num_layers",
        "decoder_layers": "num_decoder_layers",
        "heads": "num_heads",
        "head_dim": "d_kv",
        "mlp": "d_ff",
        "eps": "layer_norm_epsilon",
        "dropout": "dropout_rate",
        "pad_token": "pad_token_id",
        "relative_buckets": "relative_attention_num_buckets",
        "relative_distance": "relative_attention_max_distance",
    },
    positions="",
    activation="dense_act_fn",
    slots={
        "architecture": "encoder-decoder", "norm": "pre", "norm_kind": "rms", "attn_bias": False,
        "attn_out_bias": False, "mlp_bias": False, "positions": "relative", "score_dim": 1.0, "lm_bias": False,
    },
    required={},
    dropouts=dropouts,
    read=read,
    write=write,
    translated=frozenset({"gated", "scaled_logits", "decoder_start_token", "tied", *EVERYWHERE}),
    reads=frozenset({
        "is_gated_act", "feed_forward_proj", "scale_decoder_outputs", "n_positions", "decoder_start_token_id",
        "tie_word_embeddings",
    }),
    inert=frozenset({"classifier_dropout", "initializer_factor"}),
)  # fmt: skip
MT5 = dataclasses.replace(
    T5, name="mt5", classes={"features": "MT5Model", "seq2seq_lm": "MT5ForConditionalGeneration"},
    slots={**T5.slots, "scaled_logits": False}, translated=T5.translated - {"scaled_logits"},
)  # fmt: skip
