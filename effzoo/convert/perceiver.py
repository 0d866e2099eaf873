"""The Perceiver as transformers lays it out: Perceiver IO with one cross-attention, on bytes, arrays or ImageNet
(arXiv:2107.14795).

The norms have the eps of torch, 1e-5, whatever the config says, and only attention weights are dropped out. The text
decoder has 8 heads with keys 32 wide, one query per position and no query residual; the classification decoder one
query as wide as a latent, in one head.
Theirs decodes every position there is; ours as many as the input has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effzoo.architectures import PerceiverConfig
from effzoo.convert.layout import ACTIVATIONS, THEIR_ACTIVATION
from effzoo.errors import ConversionError, listing

CLASSES = {
    "PerceiverForMaskedLM": ("masked_lm", "tokens"),
    "PerceiverForSequenceClassification": ("classification", "tokens"),
    "PerceiverForImageClassificationFourier": ("classification", "pixels"),
    "PerceiverModel": ("features", "tokens"),  # or "array", without the preprocessor of text
}
INPUTS: dict[str, dict[str, Any]] = {  # what the kinds of input mean in our config
    "tokens": {"positions": "learned"},
    "array": {"positions": "none", "vocab": 0},
    "pixels": {"positions": "fourier", "vocab": 0, "channels": 3, "grid": (224, 224), "bands": 64},
}
_FIELDS = {
    "channels": "d_model", "latents": "num_latents", "dim": "d_latents", "layers": "num_self_attends_per_block",
    "heads": "num_self_attention_heads",
    "blocks_per_cross": "num_blocks", "cross_heads": "num_cross_attention_heads",
    "cross_residual": "use_query_residual", "vocab": "vocab_size",
    "max_length": "max_position_embeddings", "attention_dropout": "attention_probs_dropout_prob",
}  # fmt: skip
READS = frozenset(
    {"hidden_act", "self_attention_widening_factor", "cross_attention_widening_factor", "pad_token_id", "qk_channels",
    "v_channels",
     "cross_attention_shape_for_attention", *_FIELDS.values()}
)  # fmt: skip
INERT = frozenset(  # of images, sound and video, for which other classes stand; the norms have the eps of torch
    {
        "audio_samples_per_frame", "image_size", "layer_norm_eps", "num_frames", "output_num_channels", "output_shape",
        "samples_per_patch", "tie_word_embeddings", "train_size",
    }
)  # fmt: skip
_FIXED: dict[str, Any] = {
    "attention": "full", "cross_attends": 1, "position_dim": 0, "causal": False, "final_norm": False,
    "head_norm": False, "gated": False,
    "attn_bias": True, "attn_out_bias": True, "mlp_bias": True, "eps": 1e-5, "dropout": 0.0,
}  # fmt: skip
_CROSS = {
    "norm": "attention.self.layernorm1", "source_norm": "attention.self.layernorm2", "attn.q": "attention.self.query",
    "attn.k": "attention.self.key",
    "attn.v": "attention.self.value", "attn.o": "attention.output.dense", "mlp_norm": "layernorm",
    "mlp.up": "mlp.dense1", "mlp.down": "mlp.dense2",
}  # fmt: skip
_BLOCK = {"attn_norm" if ours == "norm" else ours: theirs for ours, theirs in _CROSS.items() if ours != "source_norm"}


def names(config: PerceiverConfig, task: str) -> dict[str, str]:
    """{our key: their key} of every tensor of a model of this task."""
    base = "" if task == "features" else "perceiver."
    keys = {"latents.weight": f"{base}embeddings.latents"}
    if config.vocab:
        keys["embeddings.token.weight"] = f"{base}input_preprocessor.embeddings.weight"
        keys["embeddings.position.weight"] = f"{base}input_preprocessor.position_embeddings.weight"
    keys |= _both("cross.0", f"{base}encoder.cross_attention", _CROSS)
    for layer in range(config.layers):
        keys |= _both(f"blocks.{layer}", f"{base}encoder.self_attends.{layer}", _BLOCK)
    if task == "features":
        return keys
    decoder = f"{base}decoder.decoder" if task == "classification" else f"{base}decoder"
    keys |= _both("decoder.cross", f"{decoder}.decoding_cross_attention", _CROSS)
    keys["decoder.queries.weight"] = f"{decoder}.output_position_encodings.position_embeddings"
    if task == "masked_lm":
        return keys | {"head.out.bias": "embedding_decoder.bias"}
    return keys | _both("head", decoder, {"out": "final_layer"})


def _both(ours: str, theirs: str, modules: Mapping[str, str]) -> dict[str, str]:
    return {
        f"{ours}.{here}.{name}": f"{theirs}.{there}.{name}"
        for here, there in modules.items()
        for name in ("weight", "bias")
    }


def read(theirs: Any, kind: str) -> PerceiverConfig:
    """Our config for theirs and a kind of input; ConversionError for a feature that we do not have."""
    if theirs.hidden_act not in ACTIVATIONS:
        raise ConversionError(
            f"activation {theirs.hidden_act!r} has no counterpart in effzoo; it has {listing(ACTIVATIONS)}"
        )
    values = {ours: getattr(theirs, name) for ours, name in _FIELDS.items()} | INPUTS[kind]
    if kind == "pixels":
        del values["max_length"]
    sizes = PerceiverConfig(
        name="perceiver", architecture="perceiver", layout="perceiver",
        mlp=theirs.self_attention_widening_factor * theirs.d_latents,
        activation=ACTIVATIONS[theirs.hidden_act], pooling="query",
        cross_mlp=theirs.cross_attention_widening_factor * theirs.d_latents,
        pad_token=getattr(theirs, "pad_token_id", None), cross_head_dim=1, **_decoder(values["channels"], kind),
        **_FIXED, **values,
    )  # fmt: skip
    keys, cross_keys, of_values, cross_values = _widths(
        sizes, theirs.qk_channels, theirs.v_channels, theirs.cross_attention_shape_for_attention
    )
    latent_widths = {"head_dim": keys // sizes.heads, "value_dim": of_values // sizes.heads}
    cross = {"cross_head_dim": cross_keys // sizes.cross_heads, "cross_value_dim": cross_values // sizes.cross_heads}
    given = {f: getattr(sizes, f) for f in sizes.__dataclass_fields__}
    return PerceiverConfig(**given | latent_widths | cross)


def _decoder(channels: int, kind: str) -> dict[str, Any]:
    """The output queries of their masked language model."""
    if kind == "pixels" or channels % 8:
        return {}
    return {
        "query_dim": channels,
        "decoder_heads": 8,
        "decoder_head_dim": 32,
        "decoder_value_dim": channels // 8,
        "decoder_residual": False,
    }


def _widths(config: PerceiverConfig, qk: int | None, v: int | None, shape: str) -> tuple[int, int, int, int]:
    """Widths of all heads together, as theirs derive them: (keys, cross keys, values, cross values)."""
    cross = qk or (config.width if shape == "kv" else config.dim)
    keys = qk or config.dim
    return keys, cross, v or keys, v or cross


def write(config: PerceiverConfig, task: str) -> tuple[str, dict[str, Any]]:
    """Their class and the fields of their config that say what ours says; ConversionError when there are none."""
    kind = next(
        (
            kind
            for kind, slots in INPUTS.items()
            if all(getattr(config, name) == value for name, value in slots.items())
        ),
        None,
    )
    name = next(
        (
            name
            for name, (known, its) in CLASSES.items()
            if known == task and (its == kind or (task, kind) == ("features", "array"))
        ),
        None,
    )
    if kind is None or name is None or bool(config.vocab) != (kind == "tokens"):
        raise ConversionError(
            f"transformers has no Perceiver for task {task!r} with vocab={config.vocab}, "
            f"positions={config.positions!r} and grid={config.grid}; "
            f"it has {listing(CLASSES)}"
        )
    fixed = _FIXED | ({"share_blocks": "all"} if config.blocks_per_cross > 1 else {})
    if task == "classification":
        fixed |= {"pooling": "query"}
    if task == "masked_lm":
        fixed |= {
            **_decoder(config.channels, kind),
            "query_dim": config.channels,
            "decoder_mlp": config.channels,
            "tied": True,
        }
    for field, value in fixed.items():
        if getattr(config, field) != value:
            raise ConversionError(
                f"{name} of transformers has no counterpart for {field}={getattr(config, field)!r}: it has {value!r}"
            )
    if task == "masked_lm" and config.lm_bias is False:
        raise ConversionError(f"{name} of transformers has no counterpart for lm_bias=False: it has a bias")
    for field in ("mlp", "cross_mlp"):
        if getattr(config, field) % config.dim:
            raise ConversionError(
                f"{name} of transformers has a {field} that dim {config.dim} divides, got {getattr(config, field)}"
            )
    skipped = {"tokens": (), "array": ("vocab",), "pixels": ("vocab", "max_length", "channels")}[kind]
    fields = {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items() if ours not in skipped}
    keys, values = config.heads * config.head_dim, config.heads * config.value_dim
    wanted = (keys, config.cross_heads * config.cross_head_dim, values, config.cross_heads * config.cross_value_dim)
    choices = [(None, None, "kv"), (None, None, "q"), (keys, None, "kv"), (keys, values, "kv"), (None, values, "kv")]
    for choice in [*choices, (None, values, "q")]:
        if _widths(config, *choice) == wanted and values == config.dim:
            fields |= dict(
                zip(("qk_channels", "v_channels", "cross_attention_shape_for_attention"), choice, strict=True)
            )
            break
    else:
        raise ConversionError(
            f"{name} of transformers has one width of queries and one of values for both attentions, and values as "
            "wide as the latents, "
            f"{config.dim}; ours are {wanted[0]} and {wanted[1]}, {wanted[2]} and {wanted[3]}"
        )
    return name, fields | {
        "hidden_act": THEIR_ACTIVATION[config.activation], "self_attention_widening_factor": config.mlp // config.dim,
        "cross_attention_widening_factor": config.cross_mlp // config.dim, "pad_token_id": config.pad_token,
    }  # fmt: skip
