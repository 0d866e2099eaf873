"""How a config of peft names modules: lists of names or of their ends, expressions, and patterns with a number."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from effzoo.convert.peft_files.expressions import Expression, Steps
from effzoo.errors import AdapterError

NUMBERED = ("rank_pattern", "alpha_pattern")


class Numbers:
    """{regular expression: number}: which number a module has."""

    def __init__(self, pattern: Mapping[str, Any], steps: Steps):
        self.numbers = [(Expression(text, steps), number) for text, number in pattern.items()]

    def of(self, theirs: str, default: Any) -> Any:
        """The number of the first expression that is the module's path or its end after a dot, or the default."""
        starts = [0, *(at + 1 for at, one in enumerate(theirs) if one == ".")]
        for expression, number in self.numbers:
            if any(len(theirs) in expression.ends(theirs, start) for start in starts):
                return number
        return default


def compiled(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with `Numbers` in the place of patterns with numbers."""
    steps = Steps()
    return {**config, **{name: Numbers(config.get(name) or {}, steps) for name in NUMBERED}}


def matched(config: Mapping[str, Any], known: Iterable[str]) -> set[str]:
    """The known modules that `target_modules` names, less `exclude_modules` and other layers than
    `layers_to_transform`."""
    targets, steps = config.get("target_modules"), Steps()
    # the first leaves the choice to peft's own tables, the second is never saved after training
    if targets is None or targets == "all-linear":
        return set()
    wanted, excluded = _Names(targets, steps), _Names(config.get("exclude_modules") or [], steps)
    named = {theirs for theirs in known if wanted.has(theirs) and not excluded.has(theirs)}
    layers = config.get("layers_to_transform")
    if layers is None or layers == [] or isinstance(targets, str):
        return named
    numbers = {layers} if isinstance(layers, int) else set(layers)
    given = config.get("layers_pattern") or []
    expressions = [Expression(text, steps) for text in ([given] if isinstance(given, str) else given)]
    if open_ended := [expression.text for expression in expressions if expression.alternatives]:
        raise AdapterError(
            f"layers_pattern {open_ended[0]!r} of the file has alternatives without brackets; name "
            "the modules in a list instead"
        )
    return {theirs for theirs in named if theirs in targets or _layer(expressions, theirs) in numbers}


class _Names:
    """A regular expression of the whole path, or a list of paths and of their ends."""

    def __init__(self, given: str | Iterable[str], steps: Steps):
        self.expression = Expression(given, steps) if isinstance(given, str) else None
        self.names = () if isinstance(given, str) else tuple(given)

    def has(self, theirs: str) -> bool:
        if self.expression is not None:
            return self.expression.matches(theirs)
        return any(theirs == name or theirs.endswith(f".{name}") for name in self.names)


def ends_with(given: str | Iterable[str], known: Iterable[str]) -> set[str]:
    """The known modules that an expression is, or that end as a list says: so (IA)3 of peft names its feed-forward."""
    if isinstance(given, str):
        expression = Expression(given, Steps())
        return {theirs for theirs in known if expression.matches(theirs)}
    return {theirs for theirs in known if theirs.endswith(tuple(given))}


def _layer(expressions: list[Expression], theirs: str) -> int | None:
    """The first number in the path, or the one after `layers_pattern`."""
    if not expressions:
        hit = re.match(r".*?\.[^.]*\.(\d+)\.", theirs)
        return int(hit.group(1)) if hit else None
    for expression in expressions:
        for start in [0, *(at + 1 for at, one in enumerate(theirs) if one == ".")]:
            hits = {
                hit.group(1)
                for end in expression.ends(theirs, start)
                if (hit := re.compile(r"\.(\d+)\.").match(theirs, end))
            }
            if len(hits) > 1:
                raise AdapterError(
                    f"layers_pattern {expression.text!r} of the file names several layers in {theirs}; give the name "
                    "before the number"
                )
            if hits:
                return int(hits.pop())
    return None


def neutral(config: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """AdapterError for an option that asks for something, is not among the known ones, and so would be ignored."""
    for name, value in config.items():
        if name not in known and value not in (None, False, "", [], {}, 0):
            raise AdapterError(
                f"{where}: {config.get('peft_type')} with {name}={value!r} has no counterpart in effzoo; merge the "
                "adapter in peft instead"
            )
