"""Prefixes and LLaMA-Adapter in the files of peft.

A prefix is one tensor `prompt_embeddings` [length, layers * 2 * heads * head_dim]: for each of `length` positions the
keys and values of layer 0, then those of layer 1, and so on; the heads are those of keys and values. peft hands it over
as a cache of `length` earlier positions, so its tokens begin at position `length`, and its position ids cannot be
changed; ours begin at 0.

With rotary positions the difference is made up for exactly: queries are rotated by `length` positions more there, so
keys are written rotated by as many, and rotated back when read. With learned positions nothing can make up for it: both
compute the same when ours is called with position_ids that begin at `length` (a warning says so).

LLaMA-Adapter is `adaption_prompt` [1, length, dim] and `adaption_gate` [1] in the uppermost layers: one gate for all
heads, and no tanh. So ours is written as tanh(gate) if the gates of all heads agree, and theirs is read as the inverse
tanh, the same for all heads, if it is in (-1, 1).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from effzoo.blocks.positions import Rotary, rotate
from effzoo.convert.peft_files.prompts import KEY, check_attention, check_sizes, only, sizes
from effzoo.convert.peft_files.twin import Config, Modules, Twin, Wanted, Written, first_axis, shaped
from effzoo.errors import AdapterError
from effzoo.peft import Method
from effzoo.peft.input.llama_adapter import GatedPromptTokens
from effzoo.peft.input.prefix import PrefixMemory
from effzoo.sites import MemorySite

log = logging.getLogger("effzoo.convert")
PREFIX_CLASSES, GATED_CLASSES = (PrefixMemory,), (GatedPromptTokens,)
GATED_LAYOUTS = ("llama", "mistral")


def _layers(twin: Twin) -> list[str]:
    """The memory sites, from the lowest layer up."""
    by_layer = {
        site.layer: path for path, site in twin.sites.items() if isinstance(site, MemorySite) and site.layer is not None
    }
    return [by_layer[layer] for layer in sorted(by_layer)]


def _rotary(twin: Twin, path: str) -> Rotary | None:
    attention: Any = twin.model.get_submodule(path.rpartition(".")[0])
    rotary: Rotary | None = attention.rotary
    return rotary


def rotated(keys: Tensor, rotary: Rotary | None, positions: int) -> Tensor:
    """Keys [heads, length, head_dim] rotated by a number of positions, which may be negative."""
    if rotary is None:
        return keys
    cos, sin = rotary.angles(torch.tensor([[abs(positions)]], device=keys.device))
    return rotate(keys, cos[0], sin[0] if positions > 0 else -sin[0])


def check_decoder(twin: Twin) -> None:
    """AdapterError for models that peft gives no prefix, or another one; a warning where positions differ."""
    if not twin.model.config.causal:
        raise AdapterError(
            f"peft hands a prefix over as a cache, which {twin.model.config.name} has none of, being "
            "an encoder; use lora or ia3"
        )
    check_attention(twin)
    if twin.model.config.positions not in ("rotary", "none"):
        log.warning(
            "%s: in peft the tokens behind a prefix begin at position `length`; for the same results here give "
            "position_ids that begin there",
            twin.model.config.name,
        )


def write_prefix(twin: Twin, modules: Modules, methods: Sequence[Method]) -> Written:
    check_decoder(twin)
    layers, both = _layers(twin), []
    for path in layers:
        module, site = modules.get(path), twin.sites[path]
        if not isinstance(module, PrefixMemory) or not isinstance(site, MemorySite):
            raise AdapterError(
                f"prefix: peft has one in every layer, this adapter has none in {path}; attach it to all layers"
            )
        if module.gate is not None:
            raise AdapterError(
                "prefix[softmax=own]: peft's prefix shares the softmax of the tokens; use softmax='joint'"
            )
        if site.value_dim != site.head_dim:
            raise AdapterError(
                f"prefix: peft has keys and values of one width, {path} has {site.head_dim} and {site.value_dim}"
            )
        keys, values = module.pair()
        both += [rotated(keys, _rotary(twin, path), keys.shape[1]), values]
    if len({part.shape for part in both}) > 1:
        raise AdapterError("prefix: peft has one length for all layers, this adapter has several; attach it with one")
    table = rearrange(both, "(l two) h n d -> n (l two h d)", two=2)
    heads, length, width = both[0].shape
    config: Config = {"peft_type": "PREFIX_TUNING", "prefix_projection": False, "encoder_hidden_size": heads * width}
    return Written(config | sizes(twin, length, heads * width, heads), {KEY: table})


def read_prefix(
    twin: Twin, config: Config, tensors: Mapping[str, Tensor], parts: Mapping[str, list[int]]
) -> dict[str, Wanted]:
    check_decoder(twin)
    layers, table = _layers(twin), only(tensors, KEY)
    site = twin.sites[layers[0]]
    assert isinstance(site, MemorySite)
    check_sizes(config, sizes(twin, first_axis(KEY, table), site.heads * site.head_dim, site.heads))
    shaped(KEY, table, len(table), len(layers) * 2 * site.heads * site.head_dim)
    of_layers = rearrange(table, "n (l two h d) -> l two h n d", two=2, h=site.heads, l=len(layers))
    return {
        path: Wanted(
            "prefix",
            {"length": len(table)},
            {"keys": rotated(keys, _rotary(twin, path), -len(table)), "values": values},
        )
        for path, (keys, values) in zip(layers, of_layers, strict=True)
    }


def check_gated(twin: Twin) -> None:
    """AdapterError for models on which LLaMA-Adapter of peft computes something else, or nothing."""
    config = twin.model.config
    if twin.layout.name not in GATED_LAYOUTS:
        extra = (
            " (there peft adds the heads' result without the output projection)" if twin.layout.name == "gpt2" else ""
        )
        raise AdapterError(
            f"llama_adapter: peft computes the same for {' and '.join(GATED_LAYOUTS)} only, not for "
            f"{twin.layout.name}{extra}"
        )
    if config.attn_out_bias:
        raise AdapterError(
            "llama_adapter: peft applies the output projection twice, so that its bias counts twice; this model has one"
        )


def write_gated(twin: Twin, modules: Modules, methods: Sequence[Method]) -> Written:
    check_gated(twin)
    layers, out = _layers(twin), Written()
    hung = [path for path in layers if path in modules]
    if layers[-len(hung) :] != hung:
        raise AdapterError(
            f"llama_adapter: peft adapts the uppermost layers, this adapter hangs on {', '.join(hung)} of {len(layers)}"
        )
    lengths = set()
    for path in hung:
        module = modules[path]
        assert isinstance(module, GatedPromptTokens)
        if (module.gate != module.gate[0]).any():
            raise AdapterError(
                f"llama_adapter: {path} has a gate for each head ({module.gate.min():.3g} to {module.gate.max():.3g}), "
                "peft has one for all; no file can hold several. Keep effzoo's own format"
            )
        lengths.add(len(module.tokens))
        theirs = _attention(twin, path)
        out.tensors |= {
            f"{theirs}.adaption_prompt": module.tokens[None],
            f"{theirs}.adaption_gate": module.gate[:1].tanh(),
        }
    if len(lengths) > 1:
        raise AdapterError(f"llama_adapter: peft has one length for all layers, this adapter has {sorted(lengths)}")
    name = _attention(twin, hung[0]).rpartition(".")[2]
    out.config = {
        "peft_type": "ADAPTION_PROMPT", "target_modules": name, "adapter_len": lengths.pop(),
        "adapter_layers": len(hung),
    }  # fmt: skip
    return out


def _attention(twin: Twin, path: str) -> str:
    """Their attention module, for one of our memory sites."""
    return twin.rule(f"{path.rpartition('.')[0]}.q").theirs.rpartition(".")[0]


def read_gated(
    twin: Twin, config: Config, tensors: Mapping[str, Tensor], parts: Mapping[str, list[int]]
) -> dict[str, Wanted]:
    check_gated(twin)
    left, wanted = dict(tensors), {}
    name = _attention(twin, _layers(twin)[0]).rpartition(".")[2]
    if config.get("target_modules") not in (None, name):
        raise AdapterError(
            f"target_modules is {config['target_modules']!r} in the config of the file; the attention "
            f"of this model is {name!r}"
        )
    for path in _layers(twin)[-int(config.get("adapter_layers") or 0) :]:
        theirs = _attention(twin, path)
        keys = f"{theirs}.adaption_prompt", f"{theirs}.adaption_gate"
        for key in keys:
            if key not in left:
                raise AdapterError(
                    f"{key} is missing in the file, whose config says {config.get('adapter_layers')} "
                    "layers; copy the whole adapter"
                )
        prompt, gate = (left.pop(key) for key in keys)
        first_axis(keys[0], prompt, axes=3)
        shaped(keys[0], prompt, 1, int(config.get("adapter_len") or prompt.shape[1]), twin.model.config.dim)
        shaped(keys[1], gate, 1)
        if gate.abs() >= 1:
            raise AdapterError(
                f"{keys[1]} is {gate.item():.3g}; our gates are tanh(g), below 1 in absolute value, "
                "so this one has no g"
            )
        wanted[path] = Wanted(
            "llama_adapter",
            {"length": prompt.shape[1], "skip": 0},
            {"tokens": prompt[0], "gate": gate.double().atanh().expand(twin.model.config.heads)},
        )
    if left:
        raise AdapterError(
            f"{next(iter(left))} is one too many in the file: it is in none of the uppermost "
            f"{config.get('adapter_layers')} layers"
        )
    return wanted
