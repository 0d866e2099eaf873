"""The methods that both libraries have: which modules of ours are which `peft_type`, and who writes and reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from effzoo.convert.peft_files import kronecker, low_rank, memory, rows, vectors
from effzoo.convert.peft_files.twin import Config, Modules, Twin, Wanted, Written
from effzoo.peft import Method, PeftModule

SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
SIZES = ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers")
EVERYWHERE = ("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "modules_to_save")


@dataclass(frozen=True)
class Kind:
    """peft_types: theirs. classes: our modules. marks: what the last part of a tensor's key begins with. options: of the config that are read,
    or that concern only how they begin, or drop out, in training; any other that asks for something is refused."""

    peft_types: tuple[str, ...]
    classes: tuple[type[PeftModule], ...]
    marks: tuple[str, ...]
    options: tuple[str, ...]
    write: Callable[[Twin, Modules, Sequence[Method]], Written]
    read: Callable[[Twin, Config, Mapping[str, Tensor], Mapping[str, list[int]]], dict[str, Wanted]]


KINDS = (
    Kind(
        ("LORA",),
        low_rank.CLASSES,
        ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
        (
            *SELECTION, "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "fan_in_fan_out", "bias",
            "init_lora_weights", "megatron_core", "qalora_group_size", "eva_config", "loftq_config",
        ),
        low_rank.write,
        low_rank.read,
    ),
    Kind(
        ("IA3",), vectors.CLASSES, ("ia3_l",), (*SELECTION, "feedforward_modules", "fan_in_fan_out", "init_ia3_weights"),
        vectors.write, vectors.read,
    ),
    Kind(
        ("LOKR",),
        kronecker.CLASSES,
        ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        (*SELECTION, "r", "alpha", "rank_pattern", "alpha_pattern", "decompose_both", "decompose_factor", "init_weights", "use_effective_conv2d"),
        kronecker.write,
        kronecker.read,
    ),
    Kind(
        ("PROMPT_TUNING", "P_TUNING"),
        rows.CLASSES,
        (rows.KEY,),
        (
            *SIZES, "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "encoder_hidden_size",
            "encoder_reparameterization_type", "encoder_num_layers", "encoder_dropout",
        ),
        rows.write,
        rows.read,
    ),
    Kind(
        ("PREFIX_TUNING",), memory.PREFIX_CLASSES, (rows.KEY,), (*SIZES, "encoder_hidden_size", "prefix_projection", "init_weights"),
        memory.write_prefix, memory.read_prefix,
    ),
    Kind(
        ("ADAPTION_PROMPT",), memory.GATED_CLASSES, ("adaption_prompt", "adaption_gate"), ("target_modules", "adapter_len", "adapter_layers"),
        memory.write_gated, memory.read_gated,
    ),
)  # fmt: skip
