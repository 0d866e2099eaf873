"""Hints of a red task, one level after the other: what, where, the paper's line, a line of code. Each after the first
costs a tenth of the task's points, and stands in a log beside the file."""

from __future__ import annotations

import datetime
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from effzoo.course.assignment import Assignment
from effzoo.course.entries import Layer
from effzoo.course.grading import Grade, Outcome, answer_of
from effzoo.errors import OptionError
from effzoo.writing import replace_file

LEVELS = ("what", "where", "paper", "code")  # the first is what a check shows, and free
PRICE = 0.1  # of the task's points, for each of the others
PICTURED = 12  # positions of the drawn patterns


@dataclass(frozen=True)
class Hint:
    """What is told of a task.

    task: its name.
    level: one of LEVELS.
    text: in words.
    mine, wanted: which keys each query reads, bool[n, n], yours and the reference's; None where there is no picture.
    """

    task: str
    level: str
    text: str
    mine: Tensor | None = None
    wanted: Tensor | None = None


def log_of(file: Path) -> Path:
    """Where the hints that were taken for a file are written down."""
    return file.with_suffix(".hints.json")


def taken(file: Path) -> list[dict[str, Any]]:
    """The hints in the log of a file, none where there is no log.

    Raises OptionError for a log whose entries do not follow from each other: it was changed by hand.
    """
    path = log_of(file)
    if not path.exists():
        return []
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text())["taken"]
        seal = ""
        for entry in entries:
            if entry["level"] not in LEVELS[1:] or entry["seal"] != (seal := _seal(seal, entry)):
                raise ValueError(f"entry {entry} does not follow from the one before it")
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"{path} is not as it was written ({error}); restore it, or ask who grades to remove it"
        ) from error
    return entries


def _seal(before: str, entry: dict[str, Any]) -> str:
    told = json.dumps([before, *(entry[key] for key in ("assignment", "task", "level", "at"))])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def next_hint(done: Grade, outcome: Outcome) -> Hint:
    """The next hint of a red task, which is written into the log.

    Raises OptionError where every hint of the task was taken.
    """
    entries, part = taken(done.file), outcome.part
    before = [entry["level"] for entry in entries if entry["task"] == part.name]
    left = [level for level in LEVELS[1:] if level not in before]
    if not left:
        raise OptionError(
            f"every hint of {part.name} was taken; they are in {log_of(done.file)}, the last is: {part.code}"
        )
    entry = {"assignment": done.assignment.name, "task": part.name, "level": left[0],
             "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}  # fmt: skip
    entry["seal"] = _seal(entries[-1]["seal"] if entries else "", entry)
    hint = _hint(done, outcome, left[0])
    document = json.dumps({"taken": [*entries, entry]}, indent=1)
    replace_file(log_of(done.file), document.encode())
    return hint


def _hint(done: Grade, outcome: Outcome, level: str) -> Hint:
    part = outcome.part
    if level != "where":
        return Hint(part.name, level, part.paper if level == "paper" else part.code)
    at = f"The first call that is wrong: {outcome.where}. " if outcome.where else ""
    task = done.assignment.tasks()[part.name]
    mine, wanted = _patterns(done, task) if isinstance(task, Layer) and not outcome.trace else (None, None)
    return Hint(part.name, level, f"{at}{part.where}", mine, wanted)


def _patterns(done: Grade, task: Layer) -> tuple[Tensor | None, Tensor | None]:
    """Which keys the queries of one small call read, by values that are one-hot."""
    call = task.pattern_call(PICTURED)
    answer = None if call is None else answer_of(done, call)
    out = answer.get("the output") if isinstance(answer, dict) else None
    if call is None or not isinstance(out, Tensor) or out.shape != call.right["the output"].shape:
        return None, None
    return out[0, 0] != 0, call.right["the output"][0, 0] != 0


def costs(assignment: Assignment, file: Path) -> dict[str, float]:
    """The points that the hints in the log of a file cost, by task. Raises OptionError for a log that was changed."""
    tasks = [entry["task"] for entry in taken(file) if entry["assignment"] == assignment.name]
    return {part.name: PRICE * part.points * tasks.count(part.name) for part in assignment.parts}
