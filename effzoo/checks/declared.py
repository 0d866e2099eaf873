"""What a registered class says about itself: its options, its documentation, and small options for quick checks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from effzoo.annotations import describe, fits
from effzoo.checks import facts
from effzoo.checks.runner import Failed
from effzoo.errors import OptionError
from effzoo.registry import View
from effzoo.spec import Spec, parse_one

# the size that checks use where an entry's default is larger: a window of 512 is everything in a sequence of 31
SMALL = 8


def small(view: View[Any], spec: Spec) -> Spec:
    """The spec with every whole-number option that was not given and is larger than `SMALL` set to `SMALL`, and with
    those of `facts.SMALL_OPTIONS`."""
    shrunk = {
        o.name: SMALL
        for o in view.options(spec.name)
        if type(o.default) is int and o.default > SMALL and o.name not in spec.options
    }
    known = facts.SMALL_OPTIONS.get(view.get(spec.name).name, {})
    own = known if view.kind == "attention" and not spec.options.keys() & known.keys() else {}
    return Spec(spec.name, {**spec.options, **shrunk, **own})


def suitable(view: View[Any], given: str, build: Callable[[Spec], object]) -> Spec:
    """The small spec, or the given one when `build` refuses the small sizes.

    Options that were given and are refused raise OptionError; any other error is left to the checks, which say where it
    came from.
    """
    spec = parse_one(given)
    for candidate in (small(view, spec), spec):
        try:
            build(candidate)
            return candidate
        except OptionError:
            if candidate == spec and spec.options:
                raise
        except Exception:
            return candidate
    return spec


def check_options(view: View[Any], cls: type[Any], leading: int) -> None:
    """Fail unless options are keyword-only, after `leading` arguments, with a type, a default, and a default of that
    type."""
    positional = [p.name for p in inspect.signature(cls).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    if len(positional) > leading:
        raise Failed(
            f"the constructor of {cls.__qualname__} takes {positional[leading]!r} by position, so no spec "
            "can set it; write '*' before it"
        )
    for option in view.options(cls.name):
        if option.required:
            raise Failed(f"option {option.name!r} has no default; give it one, so that the bare name can be used")
        if option.annotation is inspect.Parameter.empty:
            raise Failed(
                f"option {option.name!r} has no type; write one, so that a wrong value is refused with a sentence"
            )
        if not fits(option.default, option.annotation):
            raise Failed(
                f"option {option.name!r} takes {describe(option.annotation)}, but its default is "
                f"{option.default!r}; change one of the two"
            )


def check_docstring(cls: type) -> None:
    """Fail unless the class has a docstring of its own."""
    if not (cls.__dict__.get("__doc__") or "").strip():
        raise Failed(f"{cls.__qualname__} has no docstring; say in one line what it computes, `effzoo show` prints it")


def check_signature(cls: type, method: str) -> None:
    """Fail when a method of the class takes **keywords, in which a misspelt argument would vanish."""
    if next(parent for parent in cls.__mro__ if method in vars(parent)).__module__ == "effzoo.attention.core":
        return
    for parameter in inspect.signature(getattr(cls, method)).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            raise Failed(
                f"{cls.__qualname__}.{method} takes **{parameter.name}, which swallows arguments unseen; "
                "name what it takes"
            )
