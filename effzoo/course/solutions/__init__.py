"""Solutions, and mutants of them: one-line mistakes, each with words that name it. `effzoo course kit` copies them."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from effzoo.errors import OptionError

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Mutant:
    """A solution with one mistake.

    name: of the mistake.
    text: of the file.
    cause: words that the first red line must have.
    """

    name: str
    text: str
    cause: str


def solution(assignment: str) -> str:
    """The text of the solution of an assignment, by its name."""
    return (HERE / f"{assignment}.py").read_text()


def mutants(assignment: str) -> list[Mutant]:
    """The mutants of an assignment. Raises OptionError for one whose line the solution does not have."""
    right = solution(assignment)
    made = []
    for one in tomllib.loads((HERE / f"{assignment}.toml").read_text())["mutants"]:
        if right.count(one["right"]) < 1:
            raise OptionError(f"mutant {one['name']!r} of {assignment} changes {one['right']!r}, which is not there")
        made.append(Mutant(one["name"], right.replace(one["right"], one["wrong"]), one["cause"]))
    return made
