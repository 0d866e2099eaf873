"""Assignments: folders with a text, a starter, points and hints (`assignment.toml`), and what is right (`tasks.py`)."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effzoo.checks.apart import Limits
from effzoo.course.task import Task
from effzoo.errors import OptionError, UnknownNameError, listing

HERE = Path(__file__).parent / "assignments"
KEYS = {"title", "deck", "lecture", "minutes", "max_lines", "forbid", "allow", "seconds", "gigabytes", "tasks"}
TASK_KEYS = {"name", "points", "title", "where", "paper", "code"}


@dataclass(frozen=True)
class Part:
    """One task of an assignment.

    name: as in `tasks.py`.
    points: for a right answer; a wrong one has none.
    title: the property in words.
    where, paper, code: hints: where to look, what the paper says and in which section, a line of code.
    """

    name: str
    points: int
    title: str
    paper: str
    code: str
    where: str = ""


@dataclass(frozen=True)
class Assignment:
    """What `assignment.toml` says, and the folder.

    name: "a03".
    deck: the lecture's deck, 0 to 4, or "all".
    lecture: what it is about there.
    minutes: that a student needs, about.
    max_lines: of code that may be written, without comments, docstrings and imports.
    forbid: names that a solution must not use.
    allow: more modules of effzoo that it may import, with the names.
    limits: of the process that runs it.
    """

    name: str
    folder: Path
    title: str
    deck: str
    lecture: str
    minutes: int
    parts: tuple[Part, ...]
    max_lines: int = 40
    forbid: tuple[str, ...] = ()
    allow: dict[str, list[str]] = field(default_factory=dict)
    limits: Limits = field(default_factory=lambda: Limits(30.0, 8.0))

    @property
    def of(self) -> int:
        """The points of a right solution."""
        return sum(part.points for part in self.parts)

    @property
    def starter(self) -> str:
        return (self.folder / "starter.py").read_text()

    @property
    def text(self) -> str:
        return (self.folder / "README.md").read_text()

    def tasks(self) -> dict[str, Task]:
        """What is right, by the names of the parts."""
        module = _module(self.folder)
        tasks: dict[str, Task] = module.TASKS
        if list(tasks) != [part.name for part in self.parts]:
            names = listing(part.name for part in self.parts)
            raise OptionError(f"{self.folder}: tasks.py has {listing(tasks)}, assignment.toml {names}; name the same")
        return tasks


def _module(folder: Path) -> Any:
    if folder.parent == HERE:
        package: Any = importlib.import_module("effzoo.course")
        kept = package.assignments
        found = importlib.import_module(f"effzoo.course.assignments.{folder.name}.tasks")
        package.assignments = kept  # the import has put the folder of this name in the function's place
        return found
    name = f"effzoo_assignment_{folder.name}"
    spec = importlib.util.spec_from_file_location(name, folder / "tasks.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def assignments() -> dict[str, Assignment]:
    """The assignments of the course by name, in order."""
    folders = sorted(path.parent for path in HERE.glob("*/assignment.toml"))
    return {found.name: found for found in map(read, folders)}


def find(name: str) -> Assignment:
    """An assignment by its name, "a03", "A3" or "3", or by the path of a folder of one's own.

    Raises UnknownNameError for a name that none has, OptionError for a folder that is none.
    """
    number = name.lower().removeprefix("a")
    wanted = f"a{int(number):02d}" if number.isdecimal() and len(number) < 4 else name
    if wanted in assignments():
        return assignments()[wanted]
    if Path(name).is_dir():
        return read(Path(name))
    raise UnknownNameError("assignment", name, assignments())


def read(folder: Path) -> Assignment:
    """The assignment in a folder. Raises OptionError for one that lacks a file or a key, or has one too many."""
    for file in ("assignment.toml", "README.md", "starter.py", "tasks.py"):
        if not (folder / file).is_file():
            raise OptionError(f"{folder} is no assignment: it has no {file}")
    given = tomllib.loads((folder / "assignment.toml").read_text())
    required = {"title", "deck", "lecture", "minutes", "tasks"}
    if unknown := (given.keys() - KEYS) | {key for one in given.get("tasks", []) for key in one.keys() - TASK_KEYS}:
        raise OptionError(f"{folder}/assignment.toml: unknown keys {listing(sorted(unknown))}")
    if missing := required - given.keys():
        raise OptionError(f"{folder}/assignment.toml lacks {listing(sorted(missing))}")
    seconds, gigabytes = given.pop("seconds", 30.0), given.pop("gigabytes", 8.0)
    parts = tuple(Part(**one) for one in given.pop("tasks"))
    given["forbid"] = tuple(given.get("forbid", ()))
    name = folder.name.partition("_")[0]
    return Assignment(name=name, folder=folder, parts=parts, limits=Limits(float(seconds), float(gigabytes)), **given)
