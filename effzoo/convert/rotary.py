"""Rotary positions: our base and scaling, and the `rope_parameters` of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effzoo.errors import ConversionError

_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read(parameters: Mapping[str, Any], whose: str) -> tuple[float, dict[str, Any] | None]:
    """Their parameters as our theta and scaling; ConversionError for a type that we do not have."""
    kind = parameters.get("rope_type", "default")
    if kind not in _TYPES:
        raise ConversionError(
            f"{whose} with rotary positions of type {kind!r} has no counterpart in effzoo, which "
            f"has {', '.join(_TYPES)}"
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConversionError(
            f"{whose} turns a part of each head, {parameters['partial_rotary_factor']}; effzoo turns whole heads only"
        )
    scaling = {"type": kind} | {name: parameters[name] for name in _TYPES[kind]}
    return float(parameters["rope_theta"]), None if kind == "default" else scaling


def write(theta: float, scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """Our theta and scaling as their parameters."""
    given = dict(scaling or {"type": "default"})
    return {"rope_type": given.pop("type"), "rope_theta": theta, **given}
