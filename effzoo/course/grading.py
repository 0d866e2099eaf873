"""Grading: what was handed in runs in a process of its own; what it sends is compared here, and only that has points.

The answers of that process are JSON and tensors, which hold no code. It knows the drawn inputs, not what must come out;
what it says of itself explains a red line, and no point depends on it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from effzoo.arguments import whole
from effzoo.checks.apart import Ended, Limits, process
from effzoo.course.assignment import Assignment, Part, find
from effzoo.course.entries import Layer, Method
from effzoo.course.refusals import refused, text_of
from effzoo.course.task import OF_A_GRADING, Call, Task
from effzoo.course.values import pack, unpack
from effzoo.errors import UnknownNameError

LARGEST = 2**28  # bytes of an answer
PUBLIC = 0  # the seed of `effzoo course check`


@dataclass(frozen=True)
class Outcome:
    """What became of one task.

    part: which one.
    status: "green", "red" or "not run".
    happened: what differs, or how the code failed.
    cause: the mistake of which this is the outcome, where it is known.
    where: the first call that is wrong.
    trace: where the code raised.
    """

    part: Part
    status: Literal["green", "red", "not run"]
    happened: str = ""
    cause: str = ""
    where: str = ""
    trace: str = ""
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def points(self) -> int:
        return self.part.points if self.status == "green" else 0


@dataclass
class Grade:
    """The outcomes of an assignment.

    assignment: which one.
    file: what was handed in, and its sha256.
    refused: why it was not run, or "".
    outcomes: of each task.
    printed: the last that the file printed.
    seconds: in all.
    hints: the points that hints cost, by task.
    """

    assignment: Assignment
    file: Path
    sha256: str
    refused: str = ""
    outcomes: list[Outcome] = field(default_factory=list)
    printed: str = ""
    seconds: float = 0.0
    hints: dict[str, float] = field(default_factory=dict)

    @property
    def points(self) -> float:
        """Those of the tasks, less what hints cost; a red task has none to lose."""
        return sum(max(0.0, outcome.points - self.hints.get(outcome.part.name, 0.0)) for outcome in self.outcomes)

    @property
    def lost(self) -> float:
        """The points that hints cost."""
        return sum(outcome.points for outcome in self.outcomes) - self.points

    @property
    def of(self) -> int:
        return sum(outcome.part.points for outcome in self.outcomes)

    @property
    def ok(self) -> bool:
        """Whether every task is green."""
        return bool(self.outcomes) and all(outcome.status == "green" for outcome in self.outcomes)

    @property
    def first(self) -> Outcome | None:
        """The first task that is not green."""
        return next((outcome for outcome in self.outcomes if outcome.status != "green"), None)

    @property
    def board(self) -> dict[str, float]:
        """The figures of a leaderboard, where a task has some."""
        return {key: value for outcome in self.outcomes for key, value in outcome.extra.items()}

    def __str__(self) -> str:
        marks = {"green": "ok ", "red": "RED", "not run": "-  "}
        lines = [f"{self.assignment.name}: {self.points:g} of {self.of} points"]
        for one in self.outcomes:
            lines.append(f"  {marks[one.status]} {one.points}/{one.part.points}  {one.part.name}: {one.part.title}")
        if self.first is not None:
            lines += [text for text in (self.first.happened, self.first.cause, self.first.where) if text]
        return "\n".join(lines)


def grade(
    assignment: Assignment | str, file: str | Path, *, seed: int = PUBLIC, only: Collection[str] | None = None
) -> Grade:
    """Run a file that was handed in on drawn inputs, and compare what it gives with what is right.

    assignment: which one, or its name.
    file: the .py file, or the notebook with a cell of the tag "solution".
    seed: of what is drawn; the default is that of `effzoo course check`, a grader takes another.
    only: the names of the tasks to grade; default all.

    Raises UnknownNameError for an assignment or a task that does not exist, OptionError for a file that cannot be read.
    """
    started = time.perf_counter()
    asked = find(assignment) if isinstance(assignment, str) else assignment
    whole("seed", seed, least=0)
    names = [part.name for part in asked.parts]
    for name in only or ():
        if name not in names:
            raise UnknownNameError("task", name, names)
    parts = [part for part in asked.parts if only is None or part.name in only]
    text = text_of(Path(file))
    done = Grade(asked, Path(file), hashlib.sha256(text.encode()).hexdigest())
    done.refused = refused(asked, text)
    if done.refused:
        done.outcomes = [Outcome(part, "not run", done.refused) for part in parts]
    else:
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
            copy = Path(folder) / f"{Path(file).stem}.py"
            copy.write_text(text)
            _run(done, copy, parts, seed)
    done.seconds = time.perf_counter() - started
    return done


def _run(done: Grade, file: Path, parts: list[Part], seed: int) -> None:
    """Fill in the outcomes: one process for all tasks, and one for each that has limits of its own."""
    tasks = done.assignment.tasks()
    calls = {part.name: tasks[part.name].calls(seed_of(seed, part.name)) for part in parts}
    groups: list[tuple[Limits, list[Part]]] = [
        (done.assignment.limits, [part for part in parts if tasks[part.name].limits is None])
    ]
    groups += [(limits, [part]) for part in parts if (limits := tasks[part.name].limits) is not None]
    outcomes: dict[str, Outcome] = {}
    for limits, group in groups:
        if not group:
            continue
        answers, printed = _ask(file, [call for part in group for call in calls[part.name]], limits)
        done.printed = done.printed or printed
        at = 0
        for part in group:
            mine = answers[at : at + len(calls[part.name])]
            outcomes[part.name] = _judged(part, tasks[part.name], calls[part.name], mine, limits)
            at += len(mine)
    done.outcomes = [outcomes[part.name] for part in parts]
    unknown = [
        outcome
        for outcome in done.outcomes
        if outcome.status == "red"
        and not outcome.cause + outcome.trace
        and isinstance(tasks[outcome.part.name], (Layer, Method))
    ]
    if reason := _explained(file, [tasks[outcome.part.name] for outcome in unknown], done.assignment.limits):
        done.outcomes = [replace(one, cause=reason) if one in unknown else one for one in done.outcomes]


def seed_of(seed: int, name: str) -> int:
    """Other numbers for each task."""
    return seed * OF_A_GRADING + int.from_bytes(hashlib.sha256(name.encode()).digest()[:3], "big")


def _ask(file: Path, calls: list[Call], limits: Limits) -> tuple[list[dict[str, Any]], str]:
    """Of each call its value or its problem, and what the file printed."""
    inputs: dict[str, Tensor] = {}
    packed = [
        {"of": call.of, "about": call.about, "number": number, "given": pack(call.given, inputs, "given")}
        for number, call in enumerate(calls)
    ]
    with process("effzoo.course.child", {"file": str(file), "calls": packed, "explain": {}}, inputs, limits) as ended:
        imported = _left(ended, "file", file)
        failed = imported if "trace" in imported else None
        answers = [failed or _left(ended, f"call{number}", file) for number in range(len(calls))]
        return answers, ended.printed


def answer_of(done: Grade, call: Call) -> Any:
    """What the file of a grade answers to one more call; None where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / f"{done.file.stem}.py"
        copy.write_text(text_of(done.file))
        answers, _ = _ask(copy, [call], done.assignment.limits)
    return answers[0].get("value")


def _explained(file: Path, tasks: list[Task], limits: Limits) -> str:
    """What the first red check of `effzoo check` says of the entry, where these tasks are of one."""
    task = tasks[0] if tasks else None
    if not isinstance(task, (Layer, Method)):
        return ""
    kind, reference = "attention" if isinstance(task, Layer) else "peft", task.reference
    explain = {"kind": kind, "against": reference if isinstance(reference, str) else ""}
    with process("effzoo.course.child", {"file": str(file), "calls": [], "explain": explain}, {}, limits) as ended:
        value = _left(ended, "explained", file).get("value")
    results = value.get("results") if isinstance(value, dict) else None
    red = [one for one in results or [] if isinstance(one, dict) and one.get("status") == "red"]
    reason = str(red[0].get("reason", ""))[:2000].replace(f"{file.parent}/", "") if red else ""
    found, _, cause = reason.partition("; ")
    return cause if cause and "(allowed: " in found else reason  # by how much it is off is told already


def _left(ended: Ended, name: str, file: Path) -> dict[str, Any]:
    """What a process left under a name: {"value": ...} or {"problem": ..., "trace": ...}."""
    texts, tensors = ended.folder / f"{name}.json", ended.folder / f"{name}.safetensors"
    try:
        for path in (texts, tensors):
            if path.is_symlink() or path.stat().st_size > LARGEST:
                return {"problem": "its process left an answer that is none, or too large"}
        told = json.loads(texts.read_text())
        if "problem" in told:
            problem, trace = (str(told.get(key, "")).replace(f"{file.parent}/", "") for key in ("problem", "trace"))
            return {"problem": problem[:1000], "trace": trace[-6000:]}
        return {"value": unpack(told["value"], safetensors.torch.load_file(tensors))}
    except FileNotFoundError:
        last = ended.printed.splitlines()[-1:]
        said = f": {last[0][:200]}" if last else ""
        return {"problem": ended.problem or f"its process ended with {ended.code} before it answered{said}"}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        return {"problem": f"its process left an answer that cannot be read: {type(error).__name__}"}


def _judged(part: Part, task: Task, calls: list[Call], answers: list[dict[str, Any]], limits: Limits) -> Outcome:
    for call, answer in zip(calls, answers, strict=True):
        if problem := answer.get("problem"):
            return Outcome(part, "red", problem, _limit(problem, limits), call.where, answer.get("trace", ""))
    values = [answer["value"] for answer in answers]
    for call, value in zip(calls, values, strict=True):
        if said := task.differs(call, value):
            return Outcome(part, "red", said, task.cause(calls, values), call.where)
    return Outcome(part, "green", extra=task.board(calls, values))


def _limit(problem: str, limits: Limits) -> str:
    """Which limit of the process a problem speaks of; "" for another problem."""
    if "allocate memory" in problem or "MemoryError" in problem:
        return (
            f"it needs more memory than the {limits.gigabytes:g} GiB of address space that its process may have, of "
            "which torch itself takes about 3; count the numbers in your largest tensor"
        )
    if "stopped after" in problem or "ended with -" in problem:
        return f"its process may take {limits.seconds:g} seconds; it is too slow for this input, or a loop does not end"
    return ""
