"""Errors: what was given, what is accepted, what to try."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 4_000  # characters of a message; what was given may be longer


class EffzooError(Exception):
    """Parent of every error that effzoo raises on purpose. The middle of a message is left out where it is long."""

    def __str__(self) -> str:
        text = super().__str__()
        left_out = len(text) - LONGEST
        return (
            text
            if left_out <= 0
            else (f"{text[: LONGEST // 2]} ... ({left_out:,} characters) ... {text[-LONGEST // 2 :]}")
        )


class UnknownNameError(EffzooError, LookupError):
    """A name that no registry entry, zoo entry, role or adapter has."""

    def __init__(self, what: str, given: object, known: Iterable[str]):
        self.what, self.given, self.known = what, given, sorted(known)
        super().__init__(
            f"unknown {what} {shown(given)}{did_you_mean(given, self.known)} Known: {listing(self.known)}."
        )


class SpecError(EffzooError, ValueError):
    """A spec string that does not parse."""


class OptionError(EffzooError, ValueError):
    """An option with an unknown name, or a value outside what the option accepts."""


class ArgumentError(EffzooError, TypeError):
    """An argument of a public function that is of another type than its annotation says."""


class InputError(EffzooError, ValueError):
    """A tensor of the wrong shape, dtype or range given to a model or a core."""


class TooLargeError(EffzooError, MemoryError):
    """A size above what the machine can hold: how many bytes it needs, and how many are free."""


class TargetError(EffzooError, ValueError):
    """PEFT targets that match nothing, match only partly, or that a method cannot hang on."""


class IncompatibleError(EffzooError, ValueError):
    """Two parts that cannot work together, with the reason."""


class IncompatiblePeft(IncompatibleError):
    """A fine-tuning method that has no meaning on a model, or on its attention: what, why, and what to use instead."""

    def __init__(self, method: str, where: str, reason: str, suggestion: str):
        self.method, self.where, self.reason, self.suggestion = method, where, reason, suggestion
        super().__init__(f"{method} does not work with {where}: {reason}; {suggestion}")


class AdapterError(EffzooError, ValueError):
    """An adapter that cannot be attached, merged, saved or loaded as asked."""


class ConversionError(EffzooError, ValueError):
    """Weights or a configuration that have no counterpart on the other side."""


class DataError(EffzooError, ValueError):
    """A data set that cannot be read, split or tokenised as asked."""


class TrainingError(EffzooError, RuntimeError):
    """A run that cannot start, continue or resume."""


class FileError(EffzooError, OSError):
    """A file that cannot be written; what was there before is as it was."""


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest known name, or just a full stop."""
    close = difflib.get_close_matches(str(given)[:80], list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "."


def listing(names: Iterable[object]) -> str:
    """The names in a sentence; `(none)` when there are none."""
    return ", ".join(map(str, names)) or "(none)"


def shown(value: object, longest: int = 80) -> str:
    """The value in a sentence of an error: cut where it is long."""
    if isinstance(value, (str, bytes)) and len(value) > longest:
        return f"{value[:longest]!r}... ({len(value):,} characters)"
    if isinstance(value, int) and value.bit_length() > 400:  # Python refuses to write still longer ones out
        return f"a whole number of {value.bit_length():,} bits"
    try:
        text = repr(value)
    except Exception:  # a foreign object, or a huge number inside a list
        return f"a {type(value).__name__}"
    return text if len(text) <= longest else f"{text[:longest]}..."
