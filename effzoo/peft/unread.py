"""Which projections no batch reads, as far as the structure of a model shows it before training."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from effzoo.sites import Model, prompt_length

MARKED = "read only for batches with a global_attention_mask"
PROMPT = "read only for prompt tokens, whose last states nothing reads, and for batches with a global_attention_mask"
FIRST = "not read, as the head takes the first token alone, which is global unless a batch marks others"


def unread(model: nn.Module) -> dict[str, str]:
    """{path of a projection: why}, for the attention of blocks whose kind has projections for global tokens.

    By default the first token of an encoder with a classification head is global, and no token elsewhere
    (`Transformer.forward`); prompt tokens are.
    """
    if isinstance(encoder := getattr(model, "encoder", None), Model):  # tokens of a decoder are not global
        return {f"encoder.{path}": why for path, why in unread(encoder).items()} | {
            f"decoder.blocks.{number}.attn.{name}": MARKED
            for number, block in enumerate(cast(Any, model).decoder.blocks)
            for name in block.attn.core.for_globals()
        }
    task, config, blocks = getattr(model, "task", ""), getattr(model, "config", None), getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not hasattr(model, "embeddings"):  # a network of one's own
        return {}
    prompt = prompt_length(model)
    first_is_global = task == "classification" and not cast(Any, config).causal
    reasons: dict[str, str] = {}
    for number, block in enumerate(blocks):
        core: Any = getattr(getattr(block, "attn", None), "core", None)
        waiting = core.for_globals() if hasattr(core, "for_globals") else ()
        if waiting and not first_is_global and (not prompt or block is blocks[-1]):
            reasons |= {f"blocks.{number}.attn.{name}": PROMPT if prompt else MARKED for name in waiting}
        elif waiting and first_is_global and block is blocks[-1] and cast(Any, config).pooling == "first":
            reasons |= {f"blocks.{number}.attn.{name}": FIRST for name in core.projections if name not in waiting}
    return reasons


def trained_unread(model: nn.Module) -> dict[str, tuple[str, int]]:
    """{trainable tensor: (why it may get no gradient, its numbers)}, for the tensors at those projections."""
    paths = unread(model)
    return {
        key: (paths[path], parameter.numel())
        for key, parameter in (model.named_parameters() if paths else ())
        if parameter.requires_grad and (path := _projection(key)) in paths
    }


def _projection(key: str) -> str:
    """The path of the projection that a tensor is of."""
    parts = key.split(".")
    return ".".join(parts[: 4 if parts[0] == "blocks" else 5])
