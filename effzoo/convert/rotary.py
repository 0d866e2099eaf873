"""Rotary positions: our base, scaling and share of a head, and the `rope_parameters` of transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from effzoo.errors import ConversionError

_ORIGINAL = "original_max_position_embeddings"
_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": ("factor", _ORIGINAL),
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor", _ORIGINAL),
}
TYPES = tuple(_NUMBERS)


def read(
    parameters: Mapping[str, Any], theirs: Any, *, whose: str = "", types: Sequence[str] = TYPES, partial: bool = False
) -> dict[str, Any]:
    """Their parameters as our rotary_theta, rotary_scaling and rotary_fraction.

    theirs: their config, which says the longest text. Of dynamic scaling it is the original length, and max_length is
        the length that the factor is for.
    types: those that this layout of theirs computes.
    partial: whether it turns a part of each head.

    Raises ConversionError for a type that we do not have.
    """
    kind, whose = parameters.get("rope_type", "default"), whose or theirs.model_type
    if kind not in types:
        raise ConversionError(
            f"{whose} with rotary positions of type {kind!r} has no counterpart in effzoo, which has {', '.join(types)}"
        )
    fraction = parameters.get("partial_rotary_factor", 1.0)
    if fraction != 1.0 and not partial:
        raise ConversionError(
            f"{whose} with partial_rotary_factor={fraction} turns a part of each head, and this layout whole heads only"
        )
    scaling = {"type": kind} | {name: parameters.get(name) for name in _NUMBERS[kind]}
    fields: dict[str, Any] = {
        "rotary_theta": float(parameters["rope_theta"]),
        "rotary_scaling": None if kind == "default" else scaling,
        "rotary_fraction": float(fraction),
    }
    longest = theirs.max_position_embeddings
    if kind == "dynamic":
        scaling[_ORIGINAL] = longest
        fields["max_length"] = int(scaling["factor"] * longest)
    if kind in ("yarn", "longrope"):
        factor, attention = parameters.get("factor"), parameters.get("attention_factor")
        scaling["factor"] = longest / scaling[_ORIGINAL] if factor is None else factor
        if kind == "yarn":
            attention = _attention_factor(parameters, scaling["factor"]) if attention is None else attention
            given = {name: parameters.get(name) for name in ("beta_fast", "beta_slow")}
            scaling |= {name: value for name, value in given.items() if value}  # theirs takes 0 for the default
            scaling |= {} if parameters.get("truncate", True) else {"truncate": False}
        scaling |= {} if attention is None else {"attention_factor": float(attention)}
    return fields


def _attention_factor(parameters: Mapping[str, Any], factor: float) -> float | None:
    """YaRN's factor on cos and sin where two numbers say it (DeepSeek); None where it follows from the factor."""
    above, below = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if not (above and below):
        return None
    stretch = 0.1 * math.log(factor) if factor > 1 else 0.0
    return (stretch * above + 1) / (stretch * below + 1)


def write(theta: float, scaling: Mapping[str, Any] | None, fraction: float = 1.0) -> dict[str, Any]:
    """Ours as their parameters."""
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in (scaling or {}).items()}
    kind = given.pop("type", "default")
    if kind == "dynamic":
        given.pop(_ORIGINAL)  # which is their max_position_embeddings, see `longest`
    return {"rope_type": kind, "rope_theta": theta, **given} | (
        {} if fraction == 1 else {"partial_rotary_factor": fraction}
    )


def longest(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """Their max_position_embeddings where it is no limit but a number of the scaling."""
    dynamic = scaling is not None and scaling.get("type") == "dynamic"
    return {"max_position_embeddings": int(scaling[_ORIGINAL])} if dynamic and scaling is not None else {}
