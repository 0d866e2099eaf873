"""How much of its attention a head gives to a prefix: the gate of the unified view (He et al. 2022, arXiv:2110.04366,
equation 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effzoo.architectures import Transformer
from effzoo.attention import kernel
from effzoo.attention.core import AttentionCore
from effzoo.attention.part import Part
from effzoo.blocks import Attention
from effzoo.errors import IncompatibleError

Heard = list[tuple[tuple[Part, ...], Tensor | None]]  # the parts of each softmax, and its log-sum-exp


@torch.no_grad()
def prefix_gates(model: Transformer, **inputs: Tensor) -> list[Tensor]:
    """The share of the softmax that falls on the prefix, lambda(x) [batch, heads, n], of every layer that has one.

        lambda(x) = sum_i exp(q P_k,i) / (sum_i exp(q P_k,i) + sum_j exp(q k_j)) = exp(lse_prefix - lse)

    It is read from the log-sum-exps of the layers as they run. Positions of padding are there too, and mean nothing.

    inputs: of the model.

    Raises IncompatibleError where no layer has a prefix, or an attention kind computes its output in several softmaxes.
    """
    layers = [block.attn for block in model.blocks if isinstance(block.attn, Attention)]
    has_prefix: list[bool] = [False] * len(layers)  # whether the layer's memory site gave rows
    heard: list[Heard] = [[] for _ in layers]
    hooks = [layer.memory.register_forward_hook(_noting(has_prefix, number)) for number, layer in enumerate(layers)]
    for layer, into in zip(layers, heard, strict=True):
        layer.core.attended = _listening(layer.core, into)  # type: ignore[method-assign]
    mode = model.training
    try:
        model.eval()(**inputs)
    finally:
        model.train(mode)
        for layer, hook in zip(layers, hooks, strict=True):
            hook.remove()
            del layer.core.attended
    if not any(has_prefix):
        raise IncompatibleError(
            "no layer of this model has a prefix in the softmax of its tokens; attach one: "
            "effzoo.attach(model, 'prefix')"
        )
    return [_gate(layer.core, parts) for layer, parts, has in zip(layers, heard, has_prefix, strict=True) if has]


def _noting(has_prefix: list[bool], number: int) -> Any:
    def noting(site: nn.Module, seen: Any, gave: Any) -> None:
        joining, _ = gave
        has_prefix[number] = joining is not None

    return noting


def _listening(core: AttentionCore, into: Heard) -> Any:
    attended = core.attended

    def listening(*parts: Part | None) -> tuple[Tensor, Tensor | None]:
        out, lse = attended(*parts)
        into.append((tuple(part for part in parts if part is not None), lse))
        return out, lse

    return listening


def _gate(core: AttentionCore, heard: Heard) -> Tensor:
    if len(heard) != 1 or heard[0][1] is None:
        swap = "swap it: effzoo.swap_attention(model, 'full')"
        raise IncompatibleError(f"attention {core.name!r} does not tell the share of a prefix in one softmax; {swap}")
    parts, whole = heard[0]
    prefix = kernel.attended(parts[-1], backend="reference")[1]  # cores put the memory last
    assert whole is not None and prefix is not None
    return (prefix - whole).exp().squeeze(-1)
