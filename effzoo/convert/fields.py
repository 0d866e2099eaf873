"""A field of a configuration of transformers is understood, or known to change nothing that is computed, or refused:
never ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from effzoo.errors import ConversionError

_INERT = frozenset(
    {
        # which files, classes, numbers and outputs there are
        "architectures", "dtype", "finetuning_task", "id2label", "label2id", "model_type", "output_attentions",
        "output_hidden_states", "output_past",
        "problem_type", "return_dict", "tie_last_hidden_states", "transformers_version",
        # text: special tokens, and options of `generate`
        "bos_token_id", "cls_token_id", "decoder_start_token_id", "eos_token_id", "mask_token_id", "prefix",
        "sep_token_id", "task_specific_params", "tokenizer_class", "unk_token_id", "use_cache",
        # how memory is spent, and how weights start
        "chunk_size_feed_forward", "gradient_checkpointing", "initializer_range",
        # which devices hold what
        "base_model_ep_plan", "base_model_pp_plan", "base_model_tp_plan",
        # what other programs write into published files: who wrote them, how long a tokenizer's texts are, and what is
        # done with the outputs
        "is_llama_config", "max_sequence_length", "model_max_length", "sbert_ce_default_activation_function",
        "sentence_transformers",
        "tokenizer_model_max_length", "transformers.js_config", "unsloth_fixed", "unsloth_version", "xla_device",
    }
)  # fmt: skip
# of configurations that older versions wrote: present in files, without a field today
_ONLY: dict[str, Any] = {
    "add_cross_attention": False, "cross_attention_hidden_size": None, "is_decoder": False, "is_encoder_decoder": False,
    "pruned_heads": {}, "tie_encoder_decoder": False, "torchscript": False, "use_bfloat16": False,
    # names of what other families or programs may do: published files say that it is not done
    "add_bias_logits": False, "add_final_layer_norm": False, "alibi": False, "extra_pos_embeddings": 2,
    "normalize_before": False,
    "normalize_embedding": True, "position_embedding_type": "absolute", "rope_interleaved": False,
    "scale_embedding": False,
    "sinusoidal_pos_embds": False, "sparse_prediction": False, "static_position_embeddings": False, "use_mrope": False,
}  # fmt: skip


def check_fields(theirs: Any, cls: type, name: str, read: Iterable[str], inert: Iterable[str]) -> None:
    """Refuse every field of `theirs` that is neither read nor inert, unless it has its default.

    cls: the class of transformers' configurations, whose defaults these are.
    name: of the layout.
    read: the fields that are understood.
    inert: those of this layout that change nothing that is computed.

    Raises ConversionError with the field and its value.
    """
    if type(theirs) is not cls:
        raise ConversionError(
            f"{name} has a configuration of class {type(theirs).__name__}, which may mean "
            f"something else; give a {cls.__name__}"
        )
    known = {*read, *inert, *_INERT}
    defaults = {f.name: _default(f) for f in dataclasses.fields(cls)}
    for key, value in vars(theirs).items():
        if key.startswith("_") or key in known:
            continue
        if key == "quantization_config":
            raise ConversionError(
                f"{name} is quantised ({_short(value)}); load it in its own dtype, or call dequantize() on the "
                "model, and convert that"
            )
        if key == "auto_map":
            check_code(value, name)
        elif key in defaults or key in _ONLY:
            only = defaults[key] if key in defaults else _ONLY[key]
            if _plain(value) != _plain(only):
                raise ConversionError(
                    f"{name} with {key}={_short(value)} has no counterpart in effzoo, which has "
                    f"{key}={_short(only)} only"
                )
        elif value is not None:
            raise ConversionError(
                f"{name} with {key}={_short(value)}: effzoo does not know this field of the configuration, which may "
                "change what is computed; "
                f"delete it (del config.{key}, or its line in config.json) if it changes nothing"
            )


def check_code(auto_map: Any, name: str) -> None:
    """Refuse a configuration that names code of its own for the model; code for a tokenizer is none of ours."""
    of_model = {
        key: code for key, code in dict(auto_map or {}).items() if key.startswith("AutoModel") or key == "AutoConfig"
    }
    if of_model:
        raise ConversionError(
            f"{name} names code of its own in auto_map ({_short(of_model)}), which may compute something else; "
            "delete auto_map from the "
            "configuration if the model of transformers computes the same"
        )


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _plain(value: Any) -> Any:
    """Lists and tuples compare by what they hold."""
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
