"""What of a configuration changes what is computed in evaluation, and what only names things or acts in training.

Every field has to be decided here; one that is not counts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from effzoo.architectures.config import Config
from effzoo.architectures.encoder_decoder_config import EncoderDecoderConfig
from effzoo.architectures.perceiver_config import PerceiverConfig
from effzoo.registry import attention, router
from effzoo.spec import Spec, parse_one

WITHOUT_EFFECT = {
    "name": "a label", "paper": "a label", "hub": "where weights come from",
    "package": "what registers the parts, which are named themselves",
    "layout": "the names of transformers", "dropout": "in training only", "attention_dropout": "in training only",
    "activation_dropout": "in training only", "final_dropout": "in training only",
    "bos_token": "for generate", "eos_token": "for generate", "generation": "for generate",
    "backend": "the same result by another way", "mlp_chunk": "the same result, fewer positions at a time",
}  # fmt: skip
SEPARATE = ("attention", "decoder_attention", "router")  # specs: with all their options, see `function_of`
COUNTS = (
    "architecture", "vocab", "dim", "layers", "heads", "mlp", "max_length", "share_layers", "embedding_dim",
    "head_dim", "kv_heads", "qk_norm", "attn_bias", "attn_out_bias", "mlp_bias", "mlp_out_bias", "gated", "experts",
    "expert_mlp", "expert_every", "norm", "norm_kind", "norm_bias", "first_norm", "residual", "eps", "activation",
    "positions", "axial_shape", "axial_dims", "rotary_theta", "rotary_scaling", "rotary_fraction", "score_dim",
    "score_cap", "logit_cap", "scale_embeddings", "types", "position_offset", "pad_token", "embed_norm", "tied",
    "lm_bias", "pooling", "head_dense", "head_norm", "head_activation", "head_bias", "token_dense", "pooler",
    "lm_transform", "transform_bias", "channels", "latents", "value_dim", "cross_attends", "blocks_per_cross",
    "share_cross", "share_blocks", "cross_heads", "cross_head_dim", "cross_value_dim", "cross_mlp", "cross_residual",
    "grid", "position_dim", "bands", "query_dim", "decoder_heads", "decoder_head_dim", "decoder_value_dim",
    "decoder_mlp", "decoder_residual", "causal", "final_norm", "decoder_layers", "decoder_max_length",
    "decoder_start_token", "relative_buckets", "relative_distance", "scaled_logits",
)  # fmt: skip
MEANT: dict[str, Callable[[Any], Any]] = {  # what a default stands for, so that it is equal to the same given in words
    "head_dim": lambda config: config.head_dim or config.dim // config.heads,
    "kv_heads": lambda config: config.kv_heads or config.heads,
    "mlp_out_bias": lambda config: config.mlp_bias if config.mlp_out_bias is None else config.mlp_out_bias,
    "expert_mlp": lambda config: config.expert_mlp or config.mlp,
    "score_dim": lambda config: config.score_dim or config.head_dim or config.dim // config.heads,
    "share_layers": lambda config: config.blocks,
    "decoder_layers": lambda config: config.decoder_layers or config.layers,
    "decoder_heads": lambda config: config.decoder_heads or config.heads,
    "decoder_mlp": lambda config: config.decoder_mlp or config.mlp,
    "decoder_max_length": lambda config: config.decoder_max_length or config.max_length,
    "embed_norm": lambda config: config.norm == "post" if config.embed_norm is None else config.embed_norm,
    "lm_bias": lambda config: not config.causal if config.lm_bias is None else config.lm_bias,
}
WITH_HEAD = ("classification", "token_classification", "question_answering")
# fields that mean nothing in other models; of those that a release has added, what files of earlier ones do not have
READ_IF: dict[str, Callable[[Config, str], bool]] = {
    "expert_every": lambda config, task: bool(config.experts),
    "expert_mlp": lambda config, task: bool(config.experts and config.expert_mlp),
    "axial_shape": lambda config, task: config.positions == "axial",
    "axial_dims": lambda config, task: config.positions == "axial",
    "rotary_theta": lambda config, task: config.positions == "rotary",
    "rotary_scaling": lambda config, task: config.positions == "rotary",
    "rotary_fraction": lambda config, task: config.positions == "rotary" and config.rotary_fraction != 1,
    "mlp_out_bias": lambda config, task: config.mlp_out_bias not in (None, config.mlp_bias),
    "score_dim": lambda config, task: config.score_dim != 0,
    "score_cap": lambda config, task: config.score_cap != 0,
    "logit_cap": lambda config, task: task.endswith("_lm") and config.logit_cap != 0,
    "scale_embeddings": lambda config, task: config.scale_embeddings,
    "pad_token": lambda config, task: (
        bool(config.position_offset) or (task == "classification" and config.causal and config.pooling == "last")
    ),
    "relative_buckets": lambda config, task: str(config.positions) == "relative",
    "relative_distance": lambda config, task: str(config.positions) == "relative",
    "scaled_logits": lambda config, task: task.endswith("_lm"),
    "max_length": lambda config, task: config.positions in ("learned", "axial") or not _any_length(config),
    "decoder_max_length": lambda config, task: config.decoder_max_length not in (0, config.max_length),
    "tied": lambda config, task: task.endswith("_lm"),
    "lm_bias": lambda config, task: task.endswith("_lm"),
    "lm_transform": lambda config, task: task == "masked_lm",
    "pooler": lambda config, task: task == "features" and not config.causal,
    "pooling": lambda config, task: task == "classification",
    "head_dense": lambda config, task: task == "classification",
    "head_bias": lambda config, task: task == "classification",
    "token_dense": lambda config, task: task in ("token_classification", "question_answering"),
    "head_norm": lambda config, task: task in WITH_HEAD,
    "head_activation": lambda config, task: task in WITH_HEAD,
    "transform_bias": lambda config, task: task != "features",
}
SAME_RESULT = {"longformer": ("max_globals",), "bigbird": ("max_globals",)}  # options that say how much is allowed
ADDED = {"top_k": ("normalise", "balance")}  # options that files of earlier releases do not have
# kinds for which max_length is a limit and nothing else; others may derive sizes from it
ANY_LENGTH = ("full", "local", "longformer", "streaming", "dilated")


def function_of(config: Config | PerceiverConfig, task: str, num_labels: int) -> dict[str, Any]:
    """Name -> value of everything outside the tensors that decides what a model of this configuration computes."""
    function: dict[str, Any] = {"task": task}
    if task.endswith("classification"):
        function["num_labels"] = num_labels
    transformer = isinstance(config, Config)
    for name in (field.name for field in fields(config)):
        if name in WITHOUT_EFFECT or name in SEPARATE:
            continue
        if isinstance(config, Config) and not READ_IF.get(name, _always)(config, task):
            continue
        # files of earlier releases say the width; that there is a projection, its module says
        is_width = name == "embedding_dim" and isinstance(config, Config)
        function[name] = config.embed_dim if is_width else meant(config, name)
    for layer, spec in enumerate(_specs(config)):
        function |= _options(f"attention of layer {layer}", attention, spec)
        causal = config.causal or layer >= config.layers  # of an encoder-decoder
        if function.get(name := f"attention of layer {layer}, global_projections", False) is None:
            function[name] = transformer and not causal  # where global tokens are, see Longformer
    if isinstance(config, Config) and config.experts:
        function |= _options("router", router, parse_one(config.router))
    return function


def meant(config: Config | PerceiverConfig, name: str) -> Any:
    """The value of a field, with what a default stands for in its place: `kv_heads=0` is as many as `heads`."""
    has_default = name in MEANT and (isinstance(config, Config) or name == "lm_bias")
    return MEANT[name](config) if has_default else getattr(config, name)


def _always(config: Config, task: str) -> bool:
    return True


def _any_length(config: Config) -> bool:
    return all(attention.get(spec.name).name in ANY_LENGTH for spec in _specs(config))


def _specs(config: Config | PerceiverConfig) -> Sequence[Spec]:
    """One attention spec per layer with weights of its own."""
    config = config if isinstance(config, Config) else config.latent_transformer()
    given = config.attention
    specs = (
        [parse_one(spec) for spec in given] if isinstance(given, (tuple, list)) else [parse_one(given)] * config.layers
    )
    return [*specs, *_specs(config.decoder())] if isinstance(config, EncoderDecoderConfig) else specs


def _options(what: str, view: Any, spec: Spec) -> dict[str, Any]:
    """A spec with all its options, those that were not given too."""
    kind = view.get(spec.name).name
    options = {option.name: spec.options.get(option.name, option.default) for option in view.options(kind)}
    added = {option.name: option.default for option in view.options(kind) if option.name in ADDED.get(kind, ())}
    options = {name: value for name, value in options.items() if name not in added or value != added[name]}
    return {what: kind} | {
        f"{what}, {name}": value
        for name, value in options.items()
        if value is not inspect.Parameter.empty and name not in SAME_RESULT.get(kind, ())
    }
