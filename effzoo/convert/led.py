"""LED as transformers lays it out (Beltagy et al. 2020, arXiv:2004.05150, section 7): BART, whose encoder has windows
and global projections, and whose positions start at 0, with a table of its own length for each stack.

The encoder alone is a layout, too, for the tasks of encoders. It is written as an `LEDEncoder`; put into an LEDModel
with `led.encoder.load_state_dict(encoder.state_dict())`. Its eps is that of torch, 1e-5, whatever the config says.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from effzoo.architectures import Config, EncoderDecoderConfig
from effzoo.convert import bart
from effzoo.convert.keymap import same
from effzoo.convert.layout import Layout
from effzoo.convert.longformer import read
from effzoo.convert.windows import windows_of
from effzoo.spec import Spec

ENCODER = {
    "embeddings.token": "{base}embed_tokens",
    "embeddings.position": "{base}embed_positions",
    "embeddings.norm": "{base}layernorm_embedding",
    "blocks.{i}.attn.q": "{base}layers.{i}.self_attn.longformer_self_attn.query",
    "blocks.{i}.attn.k": "{base}layers.{i}.self_attn.longformer_self_attn.key",
    "blocks.{i}.attn.v": "{base}layers.{i}.self_attn.longformer_self_attn.value",
    "blocks.{i}.attn.q_global": "{base}layers.{i}.self_attn.longformer_self_attn.query_global",
    "blocks.{i}.attn.k_global": "{base}layers.{i}.self_attn.longformer_self_attn.key_global",
    "blocks.{i}.attn.v_global": "{base}layers.{i}.self_attn.longformer_self_attn.value_global",
    "blocks.{i}.attn.o": "{base}layers.{i}.self_attn.output",
    "blocks.{i}.attn_norm": "{base}layers.{i}.self_attn_layer_norm",
    "blocks.{i}.mlp.up": "{base}layers.{i}.fc1",
    "blocks.{i}.mlp.down": "{base}layers.{i}.fc2",
    "blocks.{i}.mlp_norm": "{base}layers.{i}.final_layer_norm",
}
STACKS = {
    f"encoder.{ours}": theirs.replace("{base}", "{base}encoder.")
    for ours, theirs in ENCODER.items()
    if ours != "embeddings.token"
} | bart.DECODER

DECODER = (  # fields of the part that is left out
    "classif_dropout", "classifier_dropout", "decoder_attention_heads", "decoder_ffn_dim", "decoder_layerdrop",
    "decoder_layers", "init_std", "max_decoder_position_embeddings", "tie_word_embeddings",
)  # fmt: skip


def write(config: Config) -> dict[str, Any]:
    """Windows, and sizes of the decoder that their config wants but an encoder does not use."""
    return {"attention_window": windows_of(config, "LED"), "decoder_attention_heads": config.heads}


def dropouts(theirs: Any, task: str) -> dict[str, float | None]:
    return {}


LED = Layout(
    name="led",
    attention=("longformer",),
    prefix="led.encoder",
    classes={"features": "LEDEncoder"},
    body=same(ENCODER),
    heads={"features": ()},
    tied={},
    fields={
        "vocab": "vocab_size",
        "dim": "d_model",
        "layers": "encoder_layers",
        "heads": "encoder_attention_heads",
        "mlp": "encoder_ffn_dim",
        "dropout": "dropout",
        "attention_dropout": "attention_dropout",
        "pad_token": "pad_token_id",
    },
    positions="max_encoder_position_embeddings",
    activation="activation_function",
    slots={"architecture": "encoder", "norm": "post", "eps": 1e-5, "types": 0, "pooler": False},
    required={"activation_dropout": 0.0, "encoder_layerdrop": 0.0},
    dropouts=dropouts,
    read=read,
    write=write,
    reads=frozenset({"attention_window"}),
    inert=frozenset({*DECODER, "force_bos_token_to_be_generated"}),
    module="transformers.models.led.modeling_led",
    parts={"LEDModel": "encoder", "LEDForConditionalGeneration": "led.encoder"},
    whole="led_seq2seq",
)


def read_whole(theirs: Any) -> dict[str, Any]:
    """A spec for each layer of the encoder, as layers are numbered through both stacks."""
    given = theirs.attention_window
    windows = [given] if isinstance(given, int) else given
    specs = tuple(str(Spec("longformer", {"window": window})) for window in windows)
    return {"attention": specs[0] if len(set(specs)) == 1 else specs}


def write_whole(config: Config) -> dict[str, Any]:
    assert isinstance(config, EncoderDecoderConfig)
    return {"attention_window": windows_of(config.encoder(), "LED")}


LED_SEQ2SEQ = dataclasses.replace(
    bart.BART,
    name="led_seq2seq",
    attention=("longformer",),
    prefix="led",
    classes={"features": "LEDModel", "seq2seq_lm": "LEDForConditionalGeneration"},
    body=same(bart.TOKENS | STACKS),
    fields={**bart.BART.fields, "decoder_max_length": "max_decoder_position_embeddings"},
    positions="max_encoder_position_embeddings",
    offset=0,
    read=read_whole,
    write=write_whole,
    reads=frozenset({"attention_window"}),
)
