"""The encoder of LED as transformers lays it out (Beltagy et al. 2020, arXiv:2004.05150, section 7): BART's with
windows and global projections.

Our models are an encoder or a decoder, so only the encoder of an LEDModel is read, and written as an `LEDEncoder`; put
into an LEDModel with `led.encoder.load_state_dict(encoder.state_dict())`. Its eps is that of torch, 1e-5, whatever the
config says.
"""

from __future__ import annotations

from typing import Any

from effzoo.architectures import Config
from effzoo.convert.keymap import same
from effzoo.convert.layout import Layout
from effzoo.convert.longformer import read
from effzoo.convert.windows import windows_of

BODY = same(
    {
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
)

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
    body=BODY,
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
)
