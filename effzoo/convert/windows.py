"""Sliding windows: our attention specs, and the numbers that configurations of transformers hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effzoo.architectures import Config
from effzoo.architectures.transformer import attention_specs
from effzoo.errors import ConversionError
from effzoo.registry import attention as registry
from effzoo.spec import Spec


def attention_of(windows: Sequence[int | None]) -> str | tuple[str, ...]:
    """The spec for a window per layer (None: full attention), without global projections; one where all agree."""
    specs = [
        str(Spec("longformer", {"window": window, "global_projections": False})) if window is not None else "full"
        for window in windows
    ]
    return specs[0] if len(set(specs)) == 1 else tuple(specs)


def windows_of(config: Config, whose: str, **fixed: Any) -> list[int | None]:
    """The window of each layer, None where attention is full.

    fixed: options of our kind with the value that transformers has, where it is not our default. ConversionError for
        another one.
    """
    windows: list[int | None] = []
    for layer, spec in enumerate(attention_specs(config)):
        if registry.get(spec.name).name == "full":
            windows.append(None)
            continue
        options = {option.name: option.default for option in registry.options(spec.name)}
        wanted = options | fixed
        options |= spec.options
        for given in (options, wanted):
            if given.get("global_projections", False) is None:
                given["global_projections"] = not config.causal
        for name, value in options.items():
            if name not in ("window", "max_globals") and value != wanted[name]:
                raise ConversionError(
                    f"transformers' {whose} has no counterpart for {name}={value!r} of attention "
                    f"{spec}: it has {wanted[name]!r}"
                )
        window = options["window"]
        windows.append(window if isinstance(window, int) else window[layer])
    return windows
