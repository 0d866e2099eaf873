"""What a student is given: a folder with the text, the picture and the starter, as a file or as a notebook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from effzoo.course.assignment import Assignment
from effzoo.errors import OptionError
from effzoo.writing import replace_file


def start(assignment: Assignment, folder: Path, notebook: bool = False) -> list[Path]:
    """Write the files of an assignment into a folder, and return their paths.

    Raises OptionError where one of them is there already: what a student wrote is never replaced.
    """
    starter = f"{assignment.name}.ipynb" if notebook else f"{assignment.name}.py"
    contents = {
        "README.md": (assignment.folder / "README.md").read_bytes(),
        "picture.png": (assignment.folder / "picture.png").read_bytes(),
        starter: json.dumps(as_notebook(assignment), indent=1).encode() if notebook else assignment.starter.encode(),
    }
    there = [name for name in contents if (folder / name).exists()]
    if starter in there:
        raise OptionError(f"{folder / starter} is there already, and is not replaced; give another folder with --to")
    for name, content in contents.items():
        replace_file(folder / name, content)
    return [folder / name for name in contents]


def as_notebook(assignment: Assignment) -> dict[str, Any]:
    """The text, the starter in a cell that is written to a file, and one cell for each task that checks it.

    The cells carry the marks of nbgrader (schema 3): the starter is a solution, the checks are tests with points.
    """
    name = assignment.name
    cells = [
        _cell("markdown", "text", assignment.text),
        _cell("code", "solution", f"%%writefile {name}.py\n{assignment.starter}", solution=True),
        _cell("markdown", "checks", "Run the cell above after each change, then those below."),
    ]
    for part in assignment.parts:
        source = (
            f"# {part.title}\nfrom effzoo.course import grade\n\n"
            f'done = grade("{name}", "{name}.py", only=["{part.name}"])\nassert done.ok, done'
        )
        cells.append(_cell("code", part.name, source, points=part.points))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def _cell(kind: str, name: str, source: str, *, solution: bool = False, points: int = 0) -> dict[str, Any]:
    marks: dict[str, Any] = {
        "grade_id": name, "schema_version": 3, "grade": points > 0, "solution": solution, "locked": not solution,
        "task": False,
    }  # fmt: skip
    if points:
        marks["points"] = points
    cell: dict[str, Any] = {"cell_type": kind, "id": name, "metadata": {"nbgrader": marks}, "source": source}
    if solution:
        cell["metadata"]["tags"] = ["solution"]
    if kind == "code":
        cell |= {"execution_count": None, "outputs": []}
    return cell
