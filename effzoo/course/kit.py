"""An instructor's kit: a private folder with solutions, mutants, hidden seeds, and what graders need to run."""

from __future__ import annotations

import secrets
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from effzoo.course.assignment import Assignment, assignments, find
from effzoo.course.formats import VISIBILITIES
from effzoo.course.grading import Grade, grade
from effzoo.course.solutions import mutants, solution
from effzoo.errors import OptionError, listing
from effzoo.writing import replace_file

README = """# A course with effzoo: the private part

Keep this folder where students cannot read it.

- `hidden.toml`: the seed that graded runs draw from, and which results students see. `effzoo course check` draws from
  another one, so a file that repeats the numbers it has seen there has no points here.
- `solutions/`: one for each assignment.
- `mutants/`: the solutions, each with one mistake, and the words that the first red line must have.
- `gradescope/`: `setup.sh` and `run_autograder` for a Gradescope autograder. Put `hidden.toml` and a file
  `assignment.txt` that holds one name, such as `a03`, beside them, and zip the files.
- `classroom/`: a workflow of GitHub Classroom for each assignment; copy one to `.github/workflows/classroom.yml` of
  the assignment's repository.
- `.github/workflows/verify.yml`: runs `effzoo course verify .`: every solution has all points, and every mutant fewer,
  with its mistake named.

Grade by hand: `effzoo course grade a03 FILE --hidden hidden.toml --format json`. A folder of such documents is a
leaderboard: `effzoo course board FOLDER`.
"""
VERIFY = """name: verify
on: [push, workflow_dispatch]
jobs:
  verify:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with: {python-version: "3.12"}
      - run: pip install effzoo
      - run: effzoo course verify .
"""
SETUP = """#!/usr/bin/env bash
set -euo pipefail
apt-get update && apt-get install -y python3 python3-pip
pip install effzoo
"""
RUN = """#!/usr/bin/env bash
# Gradescope calls this; a file that cannot be graded at all leaves a message for the instructor and no points
set -euo pipefail
cd /autograder/source
name=$(cat assignment.txt)
file=$(find /autograder/submission -maxdepth 1 \\( -name "$name.py" -o -name "$name.ipynb" \\) | head -n 1)
effzoo course grade "$name" "${file:-/autograder/submission/$name.py}" --hidden hidden.toml \\
  --format gradescope --output /autograder/results/results.json || test -s /autograder/results/results.json
"""


CLASSROOM = """name: Autograding
on: [push, repository_dispatch]
permissions: {checks: write, actions: read, contents: read}
jobs:
  autograding:
    runs-on: ubuntu-latest
    if: github.actor != 'github-classroom[bot]'
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with: {python-version: "3.12"}
      - run: pip install effzoo
"""
STEP = """      - name: {name}
        id: {name}
        uses: classroom-resources/autograding-command-grader@v1
        with:
          test-name: {name}
          command: effzoo course check {file} {file}.py --task {name}
          timeout: 5
          max-score: {points}
"""
REPORT = """      - uses: classroom-resources/autograding-grading-reporter@v1
        env:
"""
RESULT = """          {upper}_RESULTS: "${{{{ steps.{name}.outputs.result }}}}"
"""
HIDDEN = """seed = {seed}  # of what graded runs draw
visibility = "visible"  # of the tests on Gradescope: {visibilities}
hidden = []  # tasks that students never see there, such as "a03.linear"
"""


@dataclass(frozen=True)
class Hidden:
    """What a grader keeps to itself.

    seed: of what is drawn.
    visibility: of the tests on Gradescope, one of `formats.VISIBILITIES`.
    hidden: tasks that students never see there, as "a03.linear".
    """

    seed: int
    visibility: str = "visible"
    hidden: tuple[str, ...] = ()

    def tasks_of(self, assignment: str) -> tuple[str, ...]:
        """The hidden tasks of an assignment."""
        pairs = (name.partition(".") for name in self.hidden)
        return tuple(task for name, _, task in pairs if name == assignment)


def read_hidden(path: Path) -> Hidden:
    """hidden.toml. Raises OptionError for a file that is none."""
    if not path.is_file():
        raise OptionError(f"no such file: {path}; `effzoo course kit FOLDER` writes one")
    try:
        given = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} is no TOML: {error}") from error
    if unknown := given.keys() - {"seed", "visibility", "hidden"}:
        raise OptionError(f"{path} has {listing(sorted(unknown))}; it may have seed, visibility and hidden")
    seed, visibility, hidden = given.get("seed"), given.get("visibility", "visible"), given.get("hidden", [])
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
        raise OptionError(f"{path}: seed is a whole number from 0 to 2,147,483,647, got {seed!r}")
    if visibility not in VISIBILITIES:
        raise OptionError(f"{path}: visibility is one of {listing(VISIBILITIES)}, got {visibility!r}")
    tasks = {f"{one.name}.{part.name}" for one in assignments().values() for part in one.parts}
    if not isinstance(hidden, list) or (wrong := [name for name in hidden if name not in tasks]):
        wrong = wrong if isinstance(hidden, list) else hidden
        raise OptionError(f'{path}: hidden is a list of tasks such as "a03.linear", got {wrong!r}')
    return Hidden(seed, visibility, tuple(hidden))


def write_kit(folder: Path) -> None:
    """Write the kit. Raises OptionError for a folder that is not empty: hidden seeds are never replaced."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OptionError(f"{folder} is there and not empty, and nothing in it is replaced; give a new folder")
    seed = secrets.randbelow(2**31 - 1) + 1
    files = {
        "README.md": README,
        "hidden.toml": HIDDEN.format(seed=seed, visibilities=listing(VISIBILITIES)),
        ".github/workflows/verify.yml": VERIFY,
        "gradescope/setup.sh": SETUP,
        "gradescope/run_autograder": RUN,
    }
    for name, one in assignments().items():
        files[f"solutions/{name}.py"] = solution(name)
        files[f"classroom/{name}.yml"] = classroom(one)
        for mutant in mutants(name):
            files[f"mutants/{name}/{mutant.name}.py"] = f"# the first red line must say: {mutant.cause}\n{mutant.text}"
    for path, text in files.items():
        replace_file(folder / path, text.encode())
    for path in ("gradescope/setup.sh", "gradescope/run_autograder"):
        (folder / path).chmod(0o755)


def classroom(assignment: Assignment) -> str:
    """A workflow of GitHub Classroom with a step and points for each task."""
    names = [part.name for part in assignment.parts]
    steps = [STEP.format(name=part.name, file=assignment.name, points=part.points) for part in assignment.parts]
    results = [RESULT.format(name=name, upper=name.upper()) for name in names]
    return "".join([CLASSROOM, *steps, REPORT, *results, f'        with: {{runners: "{",".join(names)}"}}\n'])


@dataclass(frozen=True)
class Verified:
    """A file of a kit and its grade; wrong: what is not as it must be, or ""."""

    path: Path
    grade: Grade
    wrong: str


def verify(folder: Path, told: Callable[[Verified], None]) -> bool:
    """Grade every solution and mutant of a kit with its hidden seed; whether all are as they must be.

    told: called after each.

    Raises OptionError for a folder without solutions.
    """
    hidden = read_hidden(folder / "hidden.toml")
    solutions = sorted((folder / "solutions").glob("*.py"))
    if not solutions:
        raise OptionError(f"{folder} has no solutions; `effzoo course kit FOLDER` writes them")
    right = True
    for path in solutions:
        done = grade(find(path.stem), path, seed=hidden.seed)
        wrong = "" if done.ok else f"a solution with {done.points:g} of {done.of} points"
        told(Verified(path, done, wrong))
        right = right and not wrong
        for one in sorted((folder / "mutants" / path.stem).glob("*.py")):
            done = grade(find(path.stem), one, seed=hidden.seed)
            wrong = _named(done, one)
            told(Verified(one, done, wrong))
            right = right and not wrong
    return right


def _named(done: Grade, path: Path) -> str:
    """Whether a mutant lost points and its mistake was named, by the words in its first line."""
    said, _, words = path.read_text().partition("\n")[0].partition(": ")
    if not said.startswith("# the first red line must say") or not words:
        return "its first line does not say which words the first red line must have"
    if done.first is None:
        return "a mutant with all points"
    told = f"{done.first.happened}; {done.first.cause}"
    return "" if words in told else f"the first red line has no {words!r}: {told}"
