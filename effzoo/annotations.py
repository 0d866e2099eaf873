"""What an annotation says about a value: its type and, for numbers, the range that it lies in.

Options of methods, kinds and routers, fields of configs and arguments of public functions declare both in one place,
their annotation (`rank: Count`, `dropout: Probability`), and are checked by one function, `problem`. Numbers are
finite, whatever else is said.
"""

from __future__ import annotations

import enum
import functools
import inspect
import math
import types
import typing
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import torch

from effzoo.errors import ArgumentError, OptionError, shown

R = TypeVar("R")

LARGEST = 2**40  # of sizes and counts: products of a few of them stay below the 2^63 that torch takes
SMALLEST = 1e-12  # of floats that divide
WIDEST = 1e6  # of floats that set a scale or a deviation: beyond it products leave float32 and float16


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; `above` and `below` leave out the end itself, `nonzero` leaves out 0."""

    low: float = -WIDEST
    high: float = WIDEST
    above: bool = False
    below: bool = False
    nonzero: bool = False

    def holds(self, number: float) -> bool:
        number = plain(number)  # in float16 the ends themselves would be 0 and infinite
        after = number > self.low if self.above else number >= self.low
        before = number < self.high if self.below else number <= self.high
        return after and before and not (self.nonzero and number == 0)

    def broken_by(self, number: float) -> str:
        """The end of the range that a number lies beyond, in words."""
        if self.nonzero and number == 0:
            return "not 0, with which nothing is added and nothing learns"
        if isinstance(self.high, float) and self.high <= 1:
            return str(self)
        if self.low == SMALLEST and number <= 0:
            return "above 0"
        if number <= self.low:
            return (
                "above 0"
                if self.above and self.low == 0
                else "0 or more"
                if self.low == 0
                else (f"at least {_written(self.low)}")
            )
        return f"at most {_written(self.high)}"

    def __str__(self) -> str:
        if self.nonzero:
            return f"not 0, and from {_written(self.low)} to {_written(self.high)}"
        if isinstance(self.high, int) and self.high == LARGEST:
            return "0 or more" if self.low == 0 else f"at least {_written(self.low)}"
        if self.low == SMALLEST:
            return f"above 0 and at most {_written(self.high)}"
        if isinstance(self.high, float) and self.high <= 1:
            return (
                f"in {'(' if self.above else '['}{_written(self.low)}, "
                f"{_written(self.high)}{')' if self.below else ']'}"
            )
        return f"from {_written(self.low)} to {_written(self.high)}"


Count = Annotated[int, Range(1, LARGEST)]
Whole = Annotated[int, Range(0, LARGEST)]
Few = Annotated[int, Range(1, 10_000)]  # of what is made one by one: layers, experts
Seed = Annotated[int, Range(0, 2**32 - 1)]  # torch's CPU generator reads 32 bits of a seed and no more
Number = Annotated[float, Range()]
NonZero = Annotated[float, Range(nonzero=True)]
Positive = Annotated[float, Range(SMALLEST)]
NotNegative = Annotated[float, Range(0.0)]
PerSecond = Annotated[float, Range(SMALLEST, 1e30)]  # bytes and operations
Share = Annotated[float, Range(0.0, 1.0, above=True)]  # 0 < share <= 1
ProperShare = Annotated[float, Range(0.0, 1.0, above=True, below=True)]  # 0 < share < 1
Fraction = Annotated[float, Range(0.0, 1.0)]  # 0 <= fraction <= 1
Probability = Annotated[float, Range(0.0, 1.0, below=True)]  # 0 <= p < 1


def plain(value: Any) -> Any:
    """A number of numpy as the number of Python that it is, also inside lists and maps; everything else as it is."""
    # a scalar; numpy itself is not imported for this
    if type(value).__module__ == "numpy" and not getattr(value, "shape", (0,)):
        return value.item()
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    if type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    return value


def in_type(value: Any, annotation: Any) -> Any:
    """A value that fits, with whole numbers as floats where the annotation takes floats alone; also inside lists."""
    value = plain(value)
    fitting = next((part for part in _alternatives(annotation) if _has_type(value, part, ranges=True)), None)
    if typing.get_origin(fitting) is Annotated:
        fitting = typing.get_args(fitting)[0]
    if fitting is float and type(value) is int:
        return float(value)
    origin, arguments = typing.get_origin(fitting), typing.get_args(fitting)
    if type(value) in (list, tuple) and arguments and isinstance(origin, type) and issubclass(origin, Collection):
        each = arguments if _counted(origin, arguments) else arguments[:1] * len(value)
        return type(value)(map(in_type, value, each))
    return value


_hints: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()


def annotations_of(of: Any) -> dict[str, Any]:
    """The annotations of a class or a function, with their ranges; reading them takes long, so it is done once."""
    if of not in _hints:
        _hints[of] = typing.get_type_hints(of, include_extras=True)
    return _hints[of]


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is what the annotation says; ints pass for floats, lists for tuples, numpy's for Python's."""
    return problem(value, annotation) is None


def problem(value: Any, annotation: Any) -> str | None:
    """What is wrong with a value, as the end of a sentence that begins with its name, or None."""
    if _has_type(value, annotation, ranges=True):
        return None
    if _has_type(value, annotation, ranges=False):
        return f"is {_broken(plain(value), annotation)}, got {shown(value)}"
    if typing.get_origin(annotation) is typing.Literal and type(value) in map(type, typing.get_args(annotation)):
        return f"is {describe(annotation)}, got {shown(value)}"
    return f"takes {describe(annotation)}, got {shown(value)} ({type(value).__name__}){_part(value, annotation)}"


def _part(value: Any, annotation: Any) -> str:
    """The key or item of another type than the annotation says, as the end of a sentence."""
    for _, origin, arguments in map(_read, _alternatives(annotation)):
        if issubclass(origin, Mapping) and isinstance(value, Mapping):
            for key, item in value.items():
                if not _has_type(key, arguments[0], ranges=False):
                    return f"; its key {shown(key)} is of type {type(key).__name__}"
                if not _has_type(item, arguments[1], ranges=False):
                    return f"; its {shown(key)} is {shown(item)} ({type(item).__name__})"
        elif issubclass(origin, Collection) and not issubclass(origin, Mapping) and isinstance(value, (list, tuple)):
            each = arguments[: len(value)] if _counted(origin, arguments) else arguments[:1] * len(value)
            for place, (item, wanted) in enumerate(zip(value, each, strict=False)):
                if not _has_type(item, wanted, ranges=False):
                    return f"; item {place} is {shown(item)} ({type(item).__name__})"
        elif issubclass(origin, Collection) and not issubclass(origin, Mapping) and hasattr(value, "tolist"):
            return "; .tolist() makes a list of it"
        elif (
            issubclass(origin, Sequence)
            and isinstance(value, Iterable)
            and not isinstance(value, (str, bytes, Mapping))
        ):
            return "; list(...) makes one of it"
    return ""


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """What a value may be, one by one."""
    return (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType)
        else (annotation,)
    )


def _read(annotation: Any) -> tuple[Any, type, tuple[Any, ...]]:
    """The annotation, its class (`object` for what is no class) and what it holds (anything in a bare list or map)."""
    origin, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if isinstance(origin, type) and not arguments:
        if issubclass(origin, Mapping):
            return Mapping[Any, Any], origin, (Any, Any)
        if origin in (list, tuple, Sequence):
            return Sequence[Any], origin, (Any, ...)
    return annotation, origin if isinstance(origin, type) else object, arguments


def _counted(origin: type, arguments: tuple[Any, ...]) -> bool:
    """Whether an annotation is of a tuple with a type for each of its items."""
    return issubclass(origin, tuple) and arguments[-1:] != (Ellipsis,)


def unreadable(annotation: Any) -> Any | None:
    """The part of an option's annotation that no spec and no adapter file can hold, or that says nothing; or None."""
    if any(
        annotation is known
        for known in (Any, object, inspect.Parameter.empty, None, types.NoneType, bool, int, float, str)
    ):
        return None
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        ranged = any(isinstance(limit, Range) for limit in arguments[1:])
        return annotation if ranged and arguments[0] not in (int, float) else unreadable(arguments[0])
    if origin is typing.Literal:
        return None if all(value is None or type(value) in (bool, int, str) for value in arguments) else annotation
    if origin in (typing.Union, types.UnionType):
        return next((part for part in map(unreadable, arguments) if part is not None), None)
    holds = annotation if origin is None else origin
    if any(holds is known for known in (dict, Mapping)) and arguments and arguments[0] not in (str, Any):
        return annotation
    if any(holds is known for known in (list, tuple, Sequence, dict, Mapping)):
        return next(
            (part for part in map(unreadable, (a for a in arguments if a is not Ellipsis)) if part is not None), None
        )
    return annotation


def unwritable(value: Any) -> str | None:
    """The part of a value of an option that no spec and no adapter file can hold, in words; None when there is none."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"the number {value}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return f"{shown(value)} ({type(value).__name__})" if isinstance(value, enum.Enum) else None
    if isinstance(value, Mapping):
        odd = [f"the key {shown(key)} ({type(key).__name__})" for key in value if not isinstance(key, str)]
        return odd[0] if odd else unwritable(tuple(value.values()))
    if isinstance(value, (list, tuple)):
        return next((part for part in map(unwritable, value) if part is not None), None)
    return f"{shown(value)} ({type(value).__name__})"


def _has_type(value: Any, annotation: Any, ranges: bool) -> bool:
    annotation = _read(annotation)[0]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (Any, object, inspect.Parameter.empty) or isinstance(annotation, (str, typing.ForwardRef)):
        return True
    if isinstance(annotation, TypeVar):
        return annotation.__bound__ is None or _has_type(value, annotation.__bound__, ranges)
    if origin is Annotated:
        inside = (
            not ranges
            or not _has_type(value, arguments[0], False)
            or all(r.holds(value) for r in arguments[1:] if isinstance(r, Range))
        )
        return inside and _has_type(value, arguments[0], ranges)
    if origin in (typing.Union, types.UnionType):
        return any(_has_type(value, argument, ranges) for argument in arguments)
    if origin is typing.Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if annotation is None or annotation is type(None):
        return value is None
    if annotation in (int, float):
        return _is_number(value, annotation, ranges)
    if annotation is bool:
        return isinstance(plain(value), bool)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            _has_type(key, arguments[0], ranges) and _has_type(item, arguments[1], ranges)
            for key, item in value.items()
        )
    if isinstance(origin, type) and _counted(origin, arguments):
        return (
            isinstance(value, Sequence)
            and len(value) == len(arguments)
            and all(map(lambda v, a: _has_type(v, a, ranges), value, arguments))
        )
    if isinstance(origin, type) and issubclass(origin, Collection):
        kind = Sequence if issubclass(origin, (list, tuple)) else origin
        # an array without an axis cannot be gone through
        if isinstance(value, (str, bytes)) or hasattr(value, "__array__"):
            return False
        return isinstance(value, kind) and all(_has_type(item, arguments[0], ranges) for item in value)
    if isinstance(origin, type) and origin is not type:
        return isinstance(value, origin)
    if isinstance(annotation, type) and issubclass(annotation, torch.nn.Module):
        # which may be a compiled model, or one that runs on several devices: the function looks into it
        annotation = torch.nn.Module
    return not isinstance(annotation, type) or isinstance(value, annotation)


def _is_number(value: Any, annotation: type, ranges: bool) -> bool:
    value = plain(value)
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return not ranges or -(2**63) <= value < 2**63
    return annotation is float and isinstance(value, float) and (not ranges or math.isfinite(value))


def check_arguments(namespace: dict[str, Any]) -> None:
    """Make every function that a module names in `__all__` refuse arguments that are not what its annotations say.

    The last line of a public module is `check_arguments(globals())`; what it exports later is covered by itself.
    Modules that call each other import from where a function is written, and pay nothing.
    """
    for name in namespace["__all__"]:
        function = namespace.get(name)
        if inspect.isroutine(function) and not hasattr(function, "checks_arguments"):
            namespace[name] = checked(function)
            # where pickle looks for it
            namespace[name].__module__, namespace[name].__qualname__ = namespace.get("__name__"), name


def checked(function: Callable[..., R]) -> Callable[..., R]:
    """The function, with a check of its arguments: ArgumentError for another type, OptionError beyond a range."""
    if hasattr(function, "checks_arguments"):
        return function
    parameters = inspect.signature(function).parameters
    in_order = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((name for name, p in parameters.items() if p.kind is p.VAR_POSITIONAL), None)
    annotations: dict[str, Any] = {}

    @functools.wraps(function)
    def checks(*arguments: Any, **keywords: Any) -> R:
        if not torch.compiler.is_compiling():
            if not annotations:
                annotations.update({name: _meaning(function, p.annotation) for name, p in parameters.items()})
            names = [*in_order[: len(arguments)], *[rest] * (len(arguments) - len(in_order))]
            arguments = (*map(fitting, names, arguments), *arguments[len(names) :])
            keywords = {name: fitting(name, value) for name, value in keywords.items()}
        return function(*arguments, **keywords)

    def fitting(name: str | None, value: Any) -> Any:
        """The value, numbers of numpy in it as those of Python; refused where it is not what the annotation says."""
        if name not in annotations or annotations[name] is Any or value is parameters[name].default:
            return value
        wrong = problem(value, annotations[name])
        if wrong is not None:
            raise (ArgumentError if wrong.startswith("takes") else OptionError)(f"{function.__name__}: {name} {wrong}")
        return plain(value)

    checks.checks_arguments = True  # type: ignore[attr-defined]
    return checks


def _meaning(function: Any, annotation: Any) -> Any:
    """A textual annotation, evaluated where the function was written; Any for names that only type checkers import."""
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, inspect.unwrap(getattr(function, "__func__", function)).__globals__)
    except NameError:
        return Any


def _broken(value: Any, annotation: Any) -> str:
    """What the first number in a value that is not in its range should be, in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        annotation = next(argument for argument in arguments if _has_type(value, argument, ranges=False))
        return _broken(value, annotation)
    if origin is Annotated and _has_type(value, arguments[0], ranges=True):
        return next(limit for limit in arguments[1:] if isinstance(limit, Range) and not limit.holds(value)).broken_by(
            value
        )
    if origin is Annotated:
        return _broken(value, arguments[0])
    if annotation in (int, float):
        return "a finite number" if isinstance(value, float) else "a number of at most 63 bits"
    items, kind = (value.values(), arguments[1]) if isinstance(value, Mapping) else (value, arguments[0])
    return _broken(next(item for item in items if not _has_type(item, kind, ranges=True)), kind)


def describe(annotation: Any) -> str:
    """The annotation as a reader would say it."""
    annotation = _read(annotation)[0]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        limits = [str(limit) for limit in arguments[1:] if isinstance(limit, Range)]
        return f"{describe(arguments[0])} ({', '.join(limits)})" if limits else describe(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(describe, arguments)))
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if annotation in (None, type(None)):
        return "none"
    if isinstance(annotation, TypeVar):
        return describe(annotation.__bound__ or Any)
    if annotation is torch.nn.Module:
        return "a model"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a map" if arguments == (Any, Any) else f"a map from {_inside(arguments[0])} to {_inside(arguments[1])}"
    if isinstance(origin, type) and _counted(origin, arguments):
        return f"a list of {len(arguments)} ({', '.join(map(describe, arguments))})"
    if isinstance(origin, type) and issubclass(origin, Collection):
        return "a list" if arguments[0] is Any else f"a list of {_inside(arguments[0])}"
    return getattr(annotation, "__name__", str(annotation))


def _inside(annotation: Any) -> str:
    """`describe`, in brackets where it offers a choice."""
    return f"({describe(annotation)})" if len(_alternatives(annotation)) > 1 else describe(annotation)


def _written(number: float) -> str:
    exact = int(number)
    if exact == number and exact > 2**20 and exact + 1 & exact == 0:
        return f"2^{exact.bit_length()} - 1"
    return f"{exact:,}" if exact == number else f"{number:g}"
