"""Llama, Mistral, Qwen2, Qwen3 and Phi-3 as transformers lays them out.

Qwen2 (and 2.5) has biases at queries, keys and values; Qwen3 none, and normalises the heads of queries and keys. Phi-3
stacks queries, keys and values in one projection, and the gate and the inner layer of the feed-forward in another.

Llama: Touvron et al. 2023, arXiv:2302.13971.
Mistral: Jiang et al. 2023, arXiv:2310.06825.
Qwen2: Yang et al. 2024, arXiv:2407.10671.
Phi-3: Abdin et al. 2024, arXiv:2404.14219.
Qwen3: Yang et al. 2025, arXiv:2505.09388.

Theirs drops out attention weights alone, so our dropout, and that of the token classifier, has to be 0. A window of W
in theirs shows query i the keys i - W < j <= i; ours of width w shows i - w / 2 <= j <= i, so w = 2 (W - 1). With
`is_causal=False` the model is an encoder: theirs shows |i - j| <= W, as ours does with w = 2 W.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from effzoo.architectures import Config
from effzoo.convert import rotary
from effzoo.convert.keymap import Rule, same
from effzoo.convert.layout import Layout
from effzoo.convert.windows import attention_of, windows_of
from effzoo.errors import ConversionError

BODY = same(
    {
        "embeddings.token": "{base}embed_tokens",
        "blocks.{i}.attn_norm": "{base}layers.{i}.input_layernorm",
        "blocks.{i}.attn.q": "{base}layers.{i}.self_attn.q_proj",
        "blocks.{i}.attn.k": "{base}layers.{i}.self_attn.k_proj",
        "blocks.{i}.attn.v": "{base}layers.{i}.self_attn.v_proj",
        "blocks.{i}.attn.o": "{base}layers.{i}.self_attn.o_proj",
        "blocks.{i}.mlp_norm": "{base}layers.{i}.post_attention_layernorm",
        "blocks.{i}.mlp.gate": "{base}layers.{i}.mlp.gate_proj",
        "blocks.{i}.mlp.up": "{base}layers.{i}.mlp.up_proj",
        "blocks.{i}.mlp.down": "{base}layers.{i}.mlp.down_proj",
        "final_norm": "{base}norm",
    }
)
HEAD_NORMS = same(
    {
        "blocks.{i}.attn.norms.q": "{base}layers.{i}.self_attn.q_norm",
        "blocks.{i}.attn.norms.k": "{base}layers.{i}.self_attn.k_norm",
    }
)
_STACKED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
PHI3_BODY = (
    *(rule for rule in BODY if not rule.theirs.endswith(_STACKED)),
    Rule(
        ("blocks.{i}.attn.q", "blocks.{i}.attn.k", "blocks.{i}.attn.v"),
        "{base}layers.{i}.self_attn.qkv_proj",
        square=True,
    ),
    Rule(("blocks.{i}.mlp.gate", "blocks.{i}.mlp.up"), "{base}layers.{i}.mlp.gate_up_proj"),
)
HEADS = {
    "features": (),
    "classification": same({"head.out": "score"}),
    "token_classification": same({"head.out": "score"}),
    "question_answering": same({"head.out": "qa_outputs"}),
    "causal_lm": same({"head.out": "lm_head"}),
}
SIZES = {
    "vocab": "vocab_size",
    "dim": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp": "intermediate_size",
    "eps": "rms_norm_eps",
    "attention_dropout": "attention_dropout",
    "pad_token": "pad_token_id",
    "tied": "tie_word_embeddings",
}
SLOTS = {
    "norm": "pre", "norm_kind": "rms", "gated": True, "positions": "rotary", "types": 0, "dropout": 0.0,
    "pooling": "last", "head_dense": False, "head_bias": False, "pooler": False, "lm_transform": False,
}  # fmt: skip
NO_BIAS = {"attn_bias": False, "attn_out_bias": False, "mlp_bias": False}
READS = frozenset(
    {"classifier_dropout", "head_dim", "hidden_dropout", "is_causal", "num_key_value_heads", "rope_parameters"}
)
TRANSLATED = frozenset({"architecture", "kv_heads", "head_dim", "rotary_theta", "rotary_scaling", "rotary_fraction"})
SLIDING = "sliding_attention"  # the layers with a window
PARTIAL = ("phi3",)  # turn a part of each head


def read(theirs: Any) -> dict[str, Any]:
    """Sizes of heads and rotary positions."""
    return read_heads(theirs) | rotary.read(theirs.rope_parameters, theirs, partial=theirs.model_type in PARTIAL)


def read_heads(theirs: Any) -> dict[str, Any]:
    """Sizes of heads, 0 where they follow from the others, and whether they see later positions."""
    heads = theirs.num_attention_heads
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // heads
    return {
        "architecture": "decoder" if causal(theirs) else "encoder",
        "head_dim": 0 if head_dim * heads == theirs.hidden_size else head_dim,
        "kv_heads": 0 if theirs.num_key_value_heads == heads else theirs.num_key_value_heads,
    }


def causal(theirs: Any) -> bool:
    """Whether positions see earlier ones only; `is_causal=False` makes an encoder of the same weights."""
    given = getattr(theirs, "is_causal", True)
    if not isinstance(given, bool):
        raise ConversionError(f"is_causal is true or false, got {given!r}")
    return given


def one_for_all(config: Config, name: str) -> Any:
    """A field that is the same in all layers. ConversionError where it is said per layer."""
    if isinstance(given := getattr(config, name), tuple):
        raise ConversionError(f"{config.layout} of transformers has one {name} for all layers, got {given}")
    return given


def write(config: Config) -> dict[str, Any]:
    turned = [one_for_all(config, name) for name in ("rotary_theta", "rotary_scaling", "rotary_fraction")]
    theta, scaling, fraction = turned
    if fraction != 1 and config.layout not in PARTIAL:
        raise ConversionError(f"{config.layout} of transformers turns whole heads, got rotary_fraction={fraction}")
    return {
        "head_dim": config.head_dim or config.dim // config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "rope_parameters": rotary.write(theta, scaling, fraction),
        **rotary.longest(scaling),
        "classifier_dropout": config.dropout,
        **({} if config.causal else {"is_causal": False}),
    }


def dropouts(theirs: Any, task: str) -> dict[str, float | None]:
    """The token classifier has a dropout of its own: 0.1 where the config does not say."""
    if task != "token_classification":
        return {}
    classifier, hidden = getattr(theirs, "classifier_dropout", None), getattr(theirs, "hidden_dropout", None)
    return {"classifier_dropout": classifier if classifier is not None else hidden if hidden is not None else 0.1}


def biases(theirs: Any) -> dict[str, Any]:
    return {"attn_out_bias": theirs.attention_bias}


def write_biases(config: Config) -> dict[str, Any]:
    """One switch of theirs for all four projections."""
    if config.attn_bias != config.attn_out_bias:
        raise ConversionError(
            f"{config.layout} of transformers has biases in all projections or in none, got "
            f"attn_bias={config.attn_bias} and "
            f"attn_out_bias={config.attn_out_bias}"
        )
    return {"attention_bias": config.attn_bias}


def reach(window: int | None, theirs: Any) -> int | None:
    """Their window as our width: W positions that end with the query, or W before and W after it in an encoder."""
    if window is None:
        return None
    one_side = window - 1 if causal(theirs) else window
    if one_side < 1:
        raise ConversionError(
            f"{theirs.model_type} with sliding_window={window} shows each position itself alone; "
            "effzoo's windows start at 2"
        )
    return 2 * one_side


def window_of(width: int | None, config: Config) -> int | None:
    """Our width as their window."""
    return None if width is None else width // 2 + config.causal


def read_mistral(theirs: Any) -> dict[str, Any]:
    """One window for all layers, or none."""
    return read(theirs) | {"attention": attention_of([reach(theirs.sliding_window, theirs)] * theirs.num_hidden_layers)}


def write_mistral(config: Config) -> dict[str, Any]:
    widths = windows_of(config, config.layout.capitalize(), global_projections=False)
    if len(set(widths)) > 1:
        raise ConversionError(
            f"transformers' {config.layout.capitalize()} has one sliding window for all layers, got widths {widths}"
        )
    return write(config) | {"sliding_window": window_of(widths[0], config)}


def read_windows(theirs: Any) -> dict[str, Any]:
    """A window in the layers that `layer_types` names."""
    width = reach(theirs.sliding_window, theirs)
    return {"attention": attention_of([width if kind == SLIDING else None for kind in theirs.layer_types])}


def read_layer_types(theirs: Any) -> dict[str, Any]:
    return read(theirs) | read_windows(theirs)


def write_windows(config: Config) -> dict[str, Any]:
    name = config.layout.capitalize()
    widths = windows_of(config, name, global_projections=False)
    used = {width for width in widths if width is not None}
    if len(used) > 1:
        raise ConversionError(
            f"transformers' {name} has one sliding window for the layers that have any, got widths {widths}"
        )
    return {
        "layer_types": ["full_attention" if width is None else SLIDING for width in widths],
        "sliding_window": window_of(used.pop() if used else None, config),
    }


def write_layer_types(config: Config) -> dict[str, Any]:
    windows = write_windows(config)
    return write(config) | windows | {"use_sliding_window": windows["sliding_window"] is not None}


def whole_heads(config: Config, given: dict[str, Any]) -> dict[str, Any]:
    """Without `head_dim`, which they do not have. ConversionError where it is not dim / heads."""
    if given.pop("head_dim") * config.heads != config.dim:
        raise ConversionError(
            f"{config.layout} of transformers has heads of dim / heads = {config.dim} / {config.heads}, got "
            f"head_dim={config.head_dim}"
        )
    return given


def write_phi3(config: Config) -> dict[str, Any]:
    """One window for all layers, or none; dropouts of the embeddings and of what sublayers add; longrope."""
    scaling = config.rotary_scaling
    if scaling is not None and (isinstance(scaling, tuple) or scaling["type"] != "longrope"):
        raise ConversionError(f"Phi-3 of transformers scales rotary positions by longrope or not at all, got {scaling}")
    given = write_mistral(config)
    if scaling is not None:
        given["original_max_position_embeddings"] = int(scaling["original_max_position_embeddings"])
    return whole_heads(config, given) | {"resid_pdrop": config.dropout, "embd_pdrop": config.dropout}


def dropouts_phi3(theirs: Any, task: str) -> dict[str, float | None]:
    return {"resid_pdrop": theirs.resid_pdrop, "embd_pdrop": theirs.embd_pdrop, **dropouts(theirs, task)}


LLAMA = Layout(
    name="llama",
    prefix="model",
    prefixes={"question_answering": "transformer"},
    classes={
        "features": "LlamaModel",
        "classification": "LlamaForSequenceClassification",
        "token_classification": "LlamaForTokenClassification",
        "question_answering": "LlamaForQuestionAnswering",
        "causal_lm": "LlamaForCausalLM",
    },
    body=BODY,
    heads=HEADS,
    tied={"lm_head.weight": "{base}embed_tokens.weight"},
    fields=SIZES | {"attn_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    positions="max_position_embeddings",
    activation="hidden_act",
    slots=SLOTS,
    required={},
    dropouts=dropouts,
    read=lambda theirs: read(theirs) | biases(theirs),
    write=lambda config: write(config) | write_biases(config),
    translated=TRANSLATED | {"attn_out_bias"},
    reads=READS,
    inert=frozenset({"pretraining_tp"}),
)
MISTRAL = dataclasses.replace(
    LLAMA,
    name="mistral",
    prefixes={},
    relative="llama",
    attention=("full", "longformer"),
    classes={task: name.replace("Llama", "Mistral") for task, name in LLAMA.classes.items()},
    fields=SIZES,
    slots=SLOTS | NO_BIAS,
    read=read_mistral,
    write=write_mistral,
    reads=READS | {"sliding_window"},
    translated=TRANSLATED,
)
QWEN3 = dataclasses.replace(
    LLAMA,
    name="qwen3",
    attention=("full", "longformer"),
    classes={task: name.replace("Llama", "Qwen3") for task, name in LLAMA.classes.items()},
    body=BODY + HEAD_NORMS,
    fields=SIZES | {"attn_bias": "attention_bias"},
    slots=SLOTS | {"qk_norm": True, "mlp_bias": False},
    read=lambda theirs: read_layer_types(theirs) | biases(theirs),
    write=lambda config: write_layer_types(config) | write_biases(config),
    reads=READS | {"layer_types", "max_window_layers", "sliding_window", "use_sliding_window"},
    mixed=True,
)
QWEN2 = dataclasses.replace(
    LLAMA,
    name="qwen2",
    attention=("full", "longformer"),
    classes={task: name.replace("Llama", "Qwen2") for task, name in LLAMA.classes.items()},
    fields=SIZES,
    slots=SLOTS | NO_BIAS | {"attn_bias": True},
    read=read_layer_types,
    write=lambda config: whole_heads(config, write_layer_types(config)),
    translated=TRANSLATED,
    reads=QWEN3.reads,
    mixed=True,
)
PHI3 = dataclasses.replace(
    MISTRAL,
    name="phi3",
    relative=None,
    classes={
        task: name.replace("Llama", "Phi3") for task, name in LLAMA.classes.items() if task != "question_answering"
    },
    body=PHI3_BODY,
    heads={task: rules for task, rules in HEADS.items() if task != "question_answering"},
    dropouts=dropouts_phi3,
    write=write_phi3,
    reads=MISTRAL.reads | {"resid_pdrop", "embd_pdrop"},
    inert=frozenset({"original_max_position_embeddings"}),
)
