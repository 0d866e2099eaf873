"""The methods that both libraries have: which modules of ours are which `peft_type`, and who writes and reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from effzoo.annotations import Count, Few, Positive, Probability, Seed, Whole
from effzoo.convert.peft_files import kronecker, low_rank, memory, prompts, single, tokens, vectors, whole_modules
from effzoo.convert.peft_files.twin import Config, Modules, Twin, Wanted, Written
from effzoo.peft import Method, PeftModule

Names = str | Sequence[str] | None
# fields of a config: which type each has; Any where no value means anything once the training is over
Fields = Mapping[str, Any]

NAMED: Fields = {"target_modules": Names, "exclude_modules": Names}
SELECTION: Fields = {**NAMED, "layers_to_transform": int | Sequence[int] | None, "layers_pattern": Names}
SIZES: Fields = {"num_virtual_tokens": Count, "token_dim": Count, "num_attention_heads": Count, "num_layers": Count}
EVERYWHERE: Fields = {
    "peft_type": str, "modules_to_save": Names, "task_type": Any, "auto_mapping": Any, "peft_version": Any,
    "base_model_name_or_path": Any, "revision": Any, "inference_mode": Any,
}  # fmt: skip


@dataclass(frozen=True)
class Counterpart:
    """A method in both libraries.

    peft_types: theirs.
    classes: our modules.
    marks: what the last part of a tensor's key begins with.
    fields: of the config, with their types: those that are read, or that concern only how they begin, or drop out, in
        training; any other that asks for something is refused.
    write, read: who does it.
    """

    peft_types: tuple[str, ...]
    classes: tuple[type[PeftModule], ...]
    marks: tuple[str, ...]
    fields: Fields
    write: Callable[[Twin, Modules, Sequence[Method]], Written]
    read: Callable[[Twin, Config, Mapping[str, Tensor], Mapping[str, list[int]]], dict[str, Wanted]]


def _single(form: single.Form, fields: Fields) -> Counterpart:
    """A method on single linear layers."""
    return Counterpart(
        (form.peft_type,), form.classes, form.marks,
        {**SELECTION, "init_weights": Any, "fan_in_fan_out": bool, "bias": Literal["none"], **fields},
        form.write, form.read,
    )  # fmt: skip


def _norms(twin: Twin, modules: Modules, methods: Sequence[Method]) -> Written:
    return whole_modules.write_norms(twin, modules)


COUNTERPARTS = (
    Counterpart(
        ("LORA",),
        low_rank.CLASSES,
        ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
        {
            **SELECTION, "r": Count, "lora_alpha": float, "rank_pattern": Mapping[str, Count],
            "alpha_pattern": Mapping[str, float],
            "use_rslora": bool, "use_dora": bool, "lora_dropout": Probability, "fan_in_fan_out": bool,
            "bias": Literal["none", "all", "lora_only"],
            "trainable_token_indices": Sequence[int] | Mapping[str, Sequence[int]], "ensure_weight_tying": bool,
            "init_lora_weights": bool | str, "alora_invocation_tokens": Sequence[Whole],
            "megatron_core": Any, "qalora_group_size": Any, "eva_config": Any, "loftq_config": Any,
        },
        low_rank.write,
        low_rank.read,
    ),
    Counterpart(
        ("IA3",), vectors.CLASSES, ("ia3_l",),
        {**NAMED, "feedforward_modules": Names, "fan_in_fan_out": bool, "init_ia3_weights": Any},
        vectors.write, vectors.read,
    ),
    Counterpart(
        ("LOKR",),
        kronecker.CLASSES,
        ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        {
            **SELECTION, "r": Count, "alpha": float, "rank_pattern": Mapping[str, Count],
            "alpha_pattern": Mapping[str, float], "decompose_both": Any,
            "decompose_factor": Any, "init_weights": Any, "use_effective_conv2d": Any,
        },
        kronecker.write,
        kronecker.read,
    ),
    Counterpart(
        ("PROMPT_TUNING", "P_TUNING"),
        prompts.CLASSES,
        (prompts.KEY,),
        {
            **SIZES, "prompt_tuning_init": Any, "prompt_tuning_init_text": Any, "tokenizer_name_or_path": Any,
            "tokenizer_kwargs": Any,
            "encoder_hidden_size": Any, "encoder_reparameterization_type": Any, "encoder_num_layers": Any,
            "encoder_dropout": Any,
        },
        prompts.write,
        prompts.read,
    ),
    Counterpart(
        ("PREFIX_TUNING",), memory.PREFIX_CLASSES, (prompts.KEY,),
        {**SIZES, "encoder_hidden_size": Any, "prefix_projection": Any, "init_weights": Any},
        memory.write_prefix, memory.read_prefix,
    ),
    Counterpart(
        ("ADAPTION_PROMPT",), memory.GATED_CLASSES, ("adaption_prompt", "adaption_gate"),
        {"target_modules": str, "adapter_len": Count, "adapter_layers": Count}, memory.write_gated, memory.read_gated,
    ),
    Counterpart(
        ("TRAINABLE_TOKENS",), tokens.CLASSES, (tokens.KEY,),
        {"target_modules": Names, "token_indices": Sequence[int], "init_weights": Any}, tokens.write, tokens.read,
    ),
    _single(
        single.LOHA,
        {
            "r": Count, "alpha": float, "rank_pattern": Mapping[str, Count], "alpha_pattern": Mapping[str, float],
            "use_effective_conv2d": Any,
        },
    ),
    _single(
        single.VERA,
        {"r": Count, "projection_prng_key": Seed, "save_projection": Literal[False], "d_initial": Any,
         "vera_dropout": Probability},
    ),
    _single(
        single.FOURIER,
        {"n_frequency": Count, "n_frequency_pattern": Mapping[str, Any] | None, "scaling": float,
         "random_loc_seed": Seed, "init_weights": Any},
    ),
    _single(
        single.OFT,
        {"r": Whole, "oft_block_size": Whole, "coft": bool, "block_share": bool, "use_cayley_neumann": bool, "eps": Any,
         "num_cayley_neumann_terms": Any},
    ),
    _single(
        single.BOFT,
        {"boft_block_size": Whole, "boft_block_num": Whole, "boft_n_butterfly_factor": Few,
         "boft_dropout": Probability},
    ),
    _single(single.HRA, {"r": Count, "apply_GS": bool}),
    _single(single.MISS, {"r": Count, "mini_r": Any, "miss_dropout": Probability}),
    _single(
        single.VBLORA,
        {"r": Count, "num_vectors": Count, "vector_length": Count, "topk": Count,
         "save_only_topk_weights": Literal[False], "vblora_dropout": Probability, "init_vector_bank_bound": Any,
         "init_logits_std": Any},
    ),
    _single(
        single.ADALORA,
        {"init_r": Count, "lora_alpha": Positive, "rank_pattern": Mapping[str, Sequence[bool]] | None,
         "lora_dropout": Probability, "init_lora_weights": bool | str, "r": Any, "target_r": Any,
         "tinit": Any, "tfinal": Any, "deltaT": Any, "beta1": Any, "beta2": Any, "orth_reg_weight": Any,
         "total_step": Any, "megatron_core": Any, "qalora_group_size": Any},
    ),
    Counterpart(
        ("LN_TUNING",), (), ("ln_tuning_layers",), NAMED, _norms, whole_modules.read_norms,
    ),
)  # fmt: skip
