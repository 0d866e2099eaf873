"""How a config of peft names modules: lists of names or of their ends, regular expressions, and patterns with a number."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from effzoo.errors import AdapterError


def number_for(pattern: Mapping[str, Any], theirs: str, default: Any) -> Any:
    """The number of the first expression that is the module's path or its end after a dot, or the default."""
    for expression, number in pattern.items():
        if re.match(rf"(.*\.)?({expression})$", theirs):
            return number
    return default


def matched(config: Mapping[str, Any], known: Iterable[str]) -> set[str]:
    """The known modules that `target_modules` names, without those of `exclude_modules` and of other layers than `layers_to_transform`."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if targets is None or targets == "all-linear":  # the first leaves the choice to peft's own tables, the second is never saved after training
        return set()
    found = {theirs for theirs in known if _names(targets, theirs) and not (excluded and _names(excluded, theirs))}
    layers = config.get("layers_to_transform")
    if layers is None or layers == [] or isinstance(targets, str):
        return found
    wanted = {layers} if isinstance(layers, int) else set(layers)
    return {theirs for theirs in found if theirs in targets or _layer(config, theirs) in wanted}


def _names(given: str | Iterable[str], theirs: str) -> bool:
    if isinstance(given, str):
        return re.fullmatch(given, theirs) is not None
    return any(theirs == name or theirs.endswith(f".{name}") for name in given)


def _layer(config: Mapping[str, Any], theirs: str) -> int | None:
    """The first number in the path, or the one after `layers_pattern`."""
    given = config.get("layers_pattern") or []
    expressions = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in ([given] if isinstance(given, str) else given)] or [r".*?\.[^.]*\.(\d+)\."]
    hits = [hit for expression in expressions if (hit := re.match(expression, theirs))]
    return int(hits[0].group(1)) if hits else None


def neutral(config: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """AdapterError for an option that asks for something, is not among the known ones, and so would be ignored."""
    for name, value in config.items():
        if name not in known and value not in (None, False, "", [], {}, 0):
            raise AdapterError(
                f"{where}: {config.get('peft_type')} with {name}={value!r} has no counterpart in effzoo; merge the adapter in peft instead"
            )
