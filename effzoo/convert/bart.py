"""BART as transformers lays it out (Lewis et al. 2020, arXiv:1910.13461): an encoder-decoder after Vaswani et al., with
a norm behind the embeddings.

Their tables of positions have two rows in front that nothing reads. `final_logits_bias` is a buffer of theirs, so the
bias of our head is frozen where it comes from there. Its eps is that of torch, 1e-5, whatever the config says.
"""

from __future__ import annotations

from typing import Any

from effzoo.convert.keymap import Rule, same
from effzoo.convert.layout import Layout, no_dropouts


def _stack(ours: str, theirs: str, letter: str) -> dict[str, str]:
    """The paths of an encoder or a decoder."""
    block, layer = f"{ours}.blocks.{{{letter}}}", f"{{base}}{theirs}.layers.{{{letter}}}"
    return {
        f"{ours}.embeddings.position": f"{{base}}{theirs}.embed_positions",
        f"{ours}.embeddings.norm": f"{{base}}{theirs}.layernorm_embedding",
        f"{block}.attn.q": f"{layer}.self_attn.q_proj",
        f"{block}.attn.k": f"{layer}.self_attn.k_proj",
        f"{block}.attn.v": f"{layer}.self_attn.v_proj",
        f"{block}.attn.o": f"{layer}.self_attn.out_proj",
        f"{block}.attn_norm": f"{layer}.self_attn_layer_norm",
        f"{block}.mlp.up": f"{layer}.fc1",
        f"{block}.mlp.down": f"{layer}.fc2",
        f"{block}.mlp_norm": f"{layer}.final_layer_norm",
    }


TOKENS = {"encoder.embeddings.token": "{base}shared"}
DECODER = _stack("decoder", "decoder", "j") | {
    "decoder.blocks.{j}.cross.q": "{base}decoder.layers.{j}.encoder_attn.q_proj",
    "decoder.blocks.{j}.cross.k": "{base}decoder.layers.{j}.encoder_attn.k_proj",
    "decoder.blocks.{j}.cross.v": "{base}decoder.layers.{j}.encoder_attn.v_proj",
    "decoder.blocks.{j}.cross.o": "{base}decoder.layers.{j}.encoder_attn.out_proj",
    "decoder.blocks.{j}.cross_norm": "{base}decoder.layers.{j}.encoder_attn_layer_norm",
}
BODY = same(TOKENS | _stack("encoder", "encoder", "i") | DECODER)


def finish(model: Any, theirs: Any) -> None:
    """The bias of the logits, a buffer there, does not learn."""
    if model.task == "seq2seq_lm":
        model.head.out.bias.requires_grad_(False)


BART = Layout(
    name="bart",
    prefix="model",
    classes={"features": "BartModel", "seq2seq_lm": "BartForConditionalGeneration"},
    body=BODY,
    heads={"features": (), "seq2seq_lm": (Rule(("head.out",), "final_logits_bias", parameters=("bias",), row=True),)},
    same={
        "{base}encoder.embed_tokens.weight": "{base}shared.weight",
        "{base}decoder.embed_tokens.weight": "{base}shared.weight",
    },
    tied={"lm_head.weight": "{base}shared.weight"},
    fields={
        "vocab": "vocab_size",
        "dim": "d_model",
        "layers": "encoder_layers",
        "heads": "encoder_attention_heads",
        "mlp": "encoder_ffn_dim",
        "decoder_layers": "decoder_layers",
        "decoder_heads": "decoder_attention_heads",
        "decoder_mlp": "decoder_ffn_dim",
        "dropout": "dropout",
        "attention_dropout": "attention_dropout",
        "pad_token": "pad_token_id",
        "decoder_start_token": "decoder_start_token_id",
        "activation_dropout": "activation_dropout",
    },
    positions="max_position_embeddings",
    activation="activation_function",
    slots={"architecture": "encoder-decoder", "norm": "post", "eps": 1e-5, "lm_bias": True},
    required={"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "tie_word_embeddings": True},
    dropouts=no_dropouts,
    offset=2,
    finish=finish,
    inert=frozenset(
        {
            "classif_dropout",
            "classifier_dropout",
            "force_bos_token_to_be_generated",
            "forced_eos_token_id",  # for generate
            "init_std",
            "num_hidden_layers",
        }
    ),
)
