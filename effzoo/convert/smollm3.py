"""SmolLM3 as transformers lays it out (Bakouch et al. 2025, huggingface.co/blog/smollm3): Llama, and every fourth layer
has no positions (NoPE: Yang et al. 2025, arXiv:2501.18795).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from effzoo.architectures import Config
from effzoo.convert.llama import (
    LLAMA,
    QWEN3,
    SIZES,
    SLOTS,
    biases,
    read_layer_types,
    whole_heads,
    write_biases,
    write_layer_types,
)
from effzoo.errors import ConversionError


def read(theirs: Any) -> dict[str, Any]:
    """Which layers have positions."""
    turned = tuple(float(bool(turns)) for turns in theirs.no_rope_layers[: theirs.num_hidden_layers])
    return read_layer_types(theirs) | biases(theirs) | {"rotary_fraction": turned}


def write(config: Config) -> dict[str, Any]:
    given = config.rotary_fraction
    turned = given if isinstance(given, tuple) else (given,) * config.layers
    if not set(turned) <= {0.0, 1.0}:
        raise ConversionError(
            f"SmolLM3 of transformers turns the heads of a layer whole or not at all, got rotary_fraction={given}"
        )
    other = write_layer_types(dataclasses.replace(config, rotary_fraction=1.0))
    return whole_heads(config, other) | write_biases(config) | {"no_rope_layers": [int(share) for share in turned]}


SMOLLM3 = dataclasses.replace(
    LLAMA,
    name="smollm3",
    attention=("full", "longformer"),
    classes={task: name.replace("Llama", "SmolLM3") for task, name in LLAMA.classes.items()},
    fields=SIZES | {"attn_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    slots=SLOTS,
    read=read,
    write=write,
    reads=QWEN3.reads | {"no_rope_layers"},
    inert=frozenset({"no_rope_layer_interval", "max_window_layers", "pretraining_tp"}),  # resolved into lists
    mixed=True,
)
