"""Mixtral and Qwen3-MoE as transformers lays them out: Mistral and Qwen3 with experts, of which a router takes the best
k for each token; theirs stacks the weights of all experts of a layer in one tensor.

Mixtral: Jiang et al. 2024, arXiv:2401.04088, section 2.1.
Qwen3-MoE: Yang et al. 2025, arXiv:2505.09388, section 2.

With `output_router_logits` theirs adds the loss that balances the experts to that of a language-model head, in
evaluation too; ours adds it in training, with every head.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from effzoo.architectures import Config
from effzoo.convert.keymap import Rule
from effzoo.convert.llama import (
    HEAD_NORMS,
    LLAMA,
    MISTRAL,
    NO_BIAS,
    SIZES,
    SLOTS,
    biases,
    read_mistral,
    write_biases,
    write_mistral,
)
from effzoo.errors import ConversionError
from effzoo.registry import router as registry
from effzoo.spec import Spec, parse_one

_MLP = "{base}layers.{i}.mlp"
_OF_ROUTER = {"noise": False, "importance": 0.0, "load": 0.0}
DENSE = tuple(
    dataclasses.replace(rule, optional=True) if ".mlp." in rule.ours[0] else rule
    for rule in LLAMA.body
    # a layer has them, or experts
)
EXPERTS = (
    Rule(
        ("blocks.{i}.mlp.experts.{e}.gate", "blocks.{i}.mlp.experts.{e}.up"),
        f"{_MLP}.experts.gate_up_proj",
        parameters=("weight",),
        optional=True,
    ),
    Rule(("blocks.{i}.mlp.experts.{e}.down",), f"{_MLP}.experts.down_proj", parameters=("weight",), optional=True),
    Rule(("blocks.{i}.mlp.router.scores",), f"{_MLP}.gate", parameters=("weight",), optional=True),
)


def read_router(theirs: Any, normalise: bool) -> dict[str, Any]:
    """The best k of a softmax, and the weight of the loss where theirs computes one."""
    balance = float(theirs.router_aux_loss_coef) if theirs.output_router_logits else 0.0
    options: dict[str, Any] = {"k": theirs.num_experts_per_tok, **_OF_ROUTER}
    options |= {} if normalise else {"normalise": False}
    options |= {"balance": balance} if balance else {}
    return {"router": str(Spec("top_k", options))}


def router_of(config: Config) -> dict[str, Any]:
    """The options of our router; ConversionError for one that theirs does not have."""
    spec = parse_one(config.router)
    kind = registry.get(spec.name).name
    options = {option.name: spec.options.get(option.name, option.default) for option in registry.options(kind)}
    if kind != "top_k" or any(options[name] != value for name, value in _OF_ROUTER.items()):
        raise ConversionError(
            f"{config.layout} of transformers routes by top_k[noise=false, importance=0, load=0] with k, normalise and "
            f"balance, got router={config.router!r}"
        )
    return options


def write_router(options: dict[str, Any]) -> dict[str, Any]:
    balance = options["balance"]
    weight = {"router_aux_loss_coef": balance} if balance else {}
    return {"num_experts_per_tok": options["k"], "output_router_logits": balance > 0} | weight


def write_mixtral(config: Config) -> dict[str, Any]:
    options = router_of(config)
    if not options["normalise"] or config.expert_mlp not in (0, config.mlp):
        raise ConversionError(
            "Mixtral of transformers has weights that add up to 1 and one width of the feed-forward, got "
            f"router={config.router!r} and expert_mlp={config.expert_mlp}"
        )
    return write_mistral(config) | write_router(options)


def read_qwen3(theirs: Any) -> dict[str, Any]:
    if theirs.mlp_only_layers:
        raise ConversionError(
            f"qwen3_moe with mlp_only_layers={theirs.mlp_only_layers} has no counterpart in effzoo, where every "
            "expert_every-th layer has experts (decoder_sparse_step)"
        )
    return read_mistral(theirs) | biases(theirs) | read_router(theirs, theirs.norm_topk_prob)


def write_qwen3(config: Config) -> dict[str, Any]:
    options = router_of(config)
    given = write_mistral(config) | write_biases(config) | write_router(options)
    return given | {
        "moe_intermediate_size": config.expert_mlp or config.mlp,
        "norm_topk_prob": options["normalise"],
        "use_sliding_window": given["sliding_window"] is not None,
    }


READ = frozenset({"num_experts_per_tok", "output_router_logits", "router_aux_loss_coef"})
MIXTRAL = dataclasses.replace(
    MISTRAL,
    name="mixtral",
    relative=None,
    classes={task: name.replace("Llama", "Mixtral") for task, name in LLAMA.classes.items()},
    body=DENSE + EXPERTS,
    fields=SIZES | {"experts": "num_local_experts"},
    slots=SLOTS | NO_BIAS,
    read=lambda theirs: read_mistral(theirs) | read_router(theirs, True),
    write=write_mixtral,
    reads=MISTRAL.reads | READ,
    translated=MISTRAL.translated | {"router", "expert_mlp"},
    routes=True,
)
QWEN3_MOE = dataclasses.replace(
    MIXTRAL,
    name="qwen3_moe",
    prefixes=LLAMA.prefixes,
    classes={task: name.replace("Llama", "Qwen3Moe") for task, name in LLAMA.classes.items()},
    body=DENSE + EXPERTS + HEAD_NORMS,
    fields=SIZES
    | {
        "experts": "num_experts",
        "expert_every": "decoder_sparse_step",
        "expert_mlp": "moe_intermediate_size",
        "attn_bias": "attention_bias",
    },
    slots=SLOTS | {"qk_norm": True, "mlp_bias": False},
    read=read_qwen3,
    write=write_qwen3,
    reads=MIXTRAL.reads | {"mlp_only_layers", "norm_topk_prob", "num_local_experts", "use_sliding_window"},
    translated=MIXTRAL.translated | {"attn_out_bias"},
)
