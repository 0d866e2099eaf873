"""Running checks: each alone, a crash in the checked code becomes a red line, and nothing is left behind.

A check is a function of a subject. The first paragraph of its docstring is the property, the rest says how to see a
violation; its body raises `Failed` when the property does not hold, and may raise `NotApplicable` with the reason why
an entry need not have it.
"""

from __future__ import annotations

import inspect
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Check = Callable[[Any], None]
C = TypeVar("C", bound=Callable[..., None])
Status = Literal["green", "red", "skipped", "not run"]


class Failed(Exception):
    """The property does not hold. The message says what was found, with numbers; then, after "; ", what to try."""


class NotApplicable(Exception):
    """The entry does not have to have this property; the message says why."""


@dataclass(frozen=True)
class Result:
    """What became of one check.

    check: its function's name.
    label: the property it stands for.
    status: "green", "red", "skipped", "not run".
    reason: unless it is green.
    seconds: that it took.
    see: how to see a violation of this property.
    trace: where the checked code raised, when it did.
    """

    check: str
    label: str
    status: Status
    reason: str = ""
    seconds: float = 0.0
    see: str = ""
    trace: str = ""

    @property
    def happened(self) -> str:
        """The part of the reason that says what was found."""
        return self.reason if self.trace else self.reason.partition("; ")[0]

    @property
    def cause(self) -> str:
        """The part of the reason that says what is the likely cause, or what to try."""
        return "the checked code raised this; its message says why" if self.trace else self.reason.partition("; ")[2]

    @property
    def ok(self) -> bool:
        return self.status in ("green", "skipped")

    def __str__(self) -> str:
        line = f"  {self.status:8} {self.label}"
        return f"{line}\n           {self.reason}" if self.reason else line


@dataclass
class Report:
    """The results of every check of one entry."""

    kind: str
    subject: str
    results: list[Result] = field(default_factory=list)
    compared_with: str = ""  # what the numbers equal: the entry's own definition, or a reference; "" for nothing

    @property
    def ok(self) -> bool:
        """Whether nothing is red; checks that another red one made pointless count as red too."""
        return bool(self.results) and all(result.ok for result in self.results)

    @property
    def verified(self) -> bool:
        """Whether nothing is red and the numbers were compared with something that says what they must be."""
        return self.ok and bool(self.compared_with)

    @property
    def failures(self) -> list[Result]:
        return [result for result in self.results if result.status == "red"]

    def result(self, check: str) -> Result:
        """The result of a check by its function's name."""
        return next(result for result in self.results if result.check == check)

    def summary(self) -> str:
        """`12 green, 1 red, 2 skipped`."""
        statuses: tuple[Status, ...] = ("green", "red", "skipped", "not run")
        counts = {status: sum(result.status == status for result in self.results) for status in statuses}
        return ", ".join(f"{count} {status}" for status, count in counts.items() if count)

    def __str__(self) -> str:
        return "\n".join([f"{self.kind} {self.subject}: {self.summary()}", *map(str, self.results)])


def needs(*checks: str) -> Callable[[C], C]:
    """Decorator: when one of these checks is red, this one would only repeat it, so it is not run."""

    def mark(check: C) -> C:
        marked: Any = check
        marked.needs = checks
        return check

    return mark


def run(
    report: Report,
    subject: Any,
    checks: Iterable[Check],
    source: str | None,
    on_result: Callable[[Result], None] | None = None,
    until_red: bool = False,
) -> Report:
    """Run the checks one after another into the report, or up to the first red one; `source` is the file in which the
    entry is written."""
    for check in checks:
        started = time.perf_counter()
        status, reason, trace = _outcome(report, subject, check, source)
        first = next(
            (earlier.check for earlier in report.results if status == "red" and earlier.reason == reason), None
        )
        reason = reason if first is None else f"the same as in {first}"
        result = Result(
            check.__name__, label_of(check), status, reason, time.perf_counter() - started, see_of(check), trace
        )
        report.results.append(result)
        if on_result is not None:
            on_result(result)
        if until_red and status == "red":
            break
    return report


def label_of(check: Check) -> str:
    """The first paragraph of the check's docstring."""
    return " ".join((check.__doc__ or check.__name__).strip().partition("\n\n")[0].split()).rstrip(".")


def see_of(check: Check) -> str:
    """How to see a violation: what follows the first paragraph of the check's docstring."""
    return inspect.cleandoc((check.__doc__ or "").strip().partition("\n\n")[2]).strip()


def _outcome(report: Report, subject: Any, check: Check, source: str | None) -> tuple[Status, str, str]:
    """Status, reason and trace."""
    status = {result.check: result for result in report.results}
    for name in getattr(check, "needs", ()):
        if name in status and status[name].status in ("red", "not run"):
            return "not run", f"makes no sense before {name} holds", ""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # tensors this small only wait for a second thread
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            check(subject)
    except Failed as failure:
        return "red", _with_notes(failure, str(failure)), ""
    except NotApplicable as reason:
        return "skipped", str(reason), ""
    except Exception as error:  # whatever the checked code does, the other checks still run
        return "red", _with_notes(error, crash(error, source)), "".join(traceback.format_exception(error)).rstrip()
    finally:
        torch.set_num_threads(threads)
    return "green", "", ""


def crash(error: BaseException, source: str | None) -> str:
    """An exception in one sentence, with the line of the entry's own file where it came from."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    in_source = [frame for frame in frames if frame.filename == source]
    place = (in_source or frames)[-1] if frames else None
    where = f", at {place.filename}:{place.lineno} in {place.name}" if place else ""
    return f"{type(error).__name__}: {text[:400]}{'...' * (len(text) > 400)}{where}"


def _with_notes(error: BaseException, text: str) -> str:
    return ": ".join([*getattr(error, "__notes__", []), text])


def source_of(cls: type) -> str | None:
    """The file in which a class is written."""
    for value in vars(cls).values():
        code = getattr(value, "__code__", None)
        if code is not None:
            return str(code.co_filename)
    return None


def close(what: str, found: Tensor, expected: Tensor, tolerance: float, advice: str) -> None:
    """Fail when two tensors differ by more than the tolerance, or when one is not finite."""
    if found.shape != expected.shape:
        raise Failed(f"{what} has shape {tuple(found.shape)}, expected {tuple(expected.shape)}; {advice}")
    if not torch.isfinite(found).all():
        raise Failed(
            f"{what} holds {int((~torch.isfinite(found)).sum())} entries that are NaN or infinite of "
            f"{found.numel()}; {advice}"
        )
    if found.numel() == 0:
        return
    difference = (found - expected).abs()
    largest = float(difference.detach().max())
    if largest > tolerance:
        at = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
        index = f" at index {at}" if at else ""
        raise Failed(f"{what} is off by {largest:.2g}{index} (allowed: {tolerance:.0e}); {advice}")
