"""A grade as JSON, for Gradescope, for GitHub Classroom, and as JUnit's XML."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from effzoo.course.grading import Grade, Outcome

VISIBILITIES = ("visible", "hidden", "after_due_date", "after_published")
LESS_IS_MORE = ("loss", "seconds", "numbers")  # figures of a leaderboard of which the smaller is the better


def message(outcome: Outcome) -> str:
    """What is wrong, and the likely cause, in one text; "" for a right answer."""
    lines = [outcome.happened, f"Likely cause: {outcome.cause}" if outcome.cause else "", f"Call: {outcome.where}"]
    return "" if outcome.status == "green" else "\n".join(line for line in lines if line and line != "Call: ")


def as_json(done: Grade) -> dict[str, Any]:
    """Everything that is known of a grade."""
    from importlib.metadata import version

    return {
        "assignment": done.assignment.name,
        "title": done.assignment.title,
        "file": done.file.name,
        "sha256": done.sha256,
        "effzoo": version("effzoo"),
        "points": round(done.points, 2),
        "of": done.of,
        "hints": round(done.lost, 2),
        "refused": done.refused,
        "seconds": round(done.seconds, 1),
        "board": done.board,
        "tasks": [
            {
                "task": outcome.part.name, "title": outcome.part.title, "status": outcome.status,
                "points": outcome.points, "of": outcome.part.points,
                "happened": outcome.happened, "cause": outcome.cause, "where": outcome.where,
            }
            for outcome in done.outcomes
        ],
    }  # fmt: skip


def as_gradescope(done: Grade, visibility: str = "visible", hidden: tuple[str, ...] = ()) -> dict[str, Any]:
    """The document results.json of a Gradescope autograder.

    visibility: of the tests; one of VISIBILITIES.
    hidden: the names of tasks that students never see.

    Source of the format: gradescope-autograders.readthedocs.io, "Autograder specifications".
    """
    tests = [
        {
            "name": f"{outcome.part.name}: {outcome.part.title}", "number": f"{done.assignment.name[1:]}.{number}",
            "score": float(outcome.points), "max_score": float(outcome.part.points),
            "status": "passed" if outcome.status == "green" else "failed", "output": message(outcome),
            "tags": [done.assignment.name, outcome.part.name],
            "visibility": "hidden" if outcome.part.name in hidden else visibility,
        }
        for number, outcome in enumerate(done.outcomes, 1)
    ]  # fmt: skip
    lines = [f"{done.points:g} of {done.of} points"]
    lines += [f"Not run: {done.refused}"] if done.refused else []
    lines += [f"Hints cost {done.lost:g} points."] if done.lost else []
    board = [
        {"name": name, "value": value, "order": "asc" if name in LESS_IS_MORE else "desc"}
        for name, value in done.board.items()
    ]
    return {
        "score": round(done.points, 2), "execution_time": round(done.seconds), "output": "\n".join(lines),
        "output_format": "text", "test_output_format": "text", "stdout_visibility": "hidden",
        "extra_data": {"sha256": done.sha256}, "tests": tests, "leaderboard": board,
    }  # fmt: skip


def as_classroom(done: Grade) -> dict[str, Any]:
    """What a runner of GitHub Classroom hands to its reporter, before base64.

    Source of the format: the action autograding-grading-reporter of GitHub Classroom.
    """
    return {
        "version": 1,
        "status": "pass" if done.ok else "fail",
        "max_score": done.of,
        "tests": [
            {
                "name": f"{outcome.part.name}: {outcome.part.title}",
                "status": "pass" if outcome.status == "green" else "fail",
                "score": outcome.points, "message": message(outcome), "filename": done.file.name, "line_no": 0,
                "test_code": f"effzoo course check {done.assignment.name} {done.file.name} --task {outcome.part.name}",
                "duration": 0,
            }
            for outcome in done.outcomes
        ],
    }  # fmt: skip


def as_junit(done: Grade) -> str:
    """A test suite in JUnit's XML, with a test case for each task."""
    red = [outcome for outcome in done.outcomes if outcome.status != "green"]
    suite = ElementTree.Element(
        "testsuite", name=f"effzoo course {done.assignment.name}", tests=str(len(done.outcomes)),
        failures=str(len(red)), errors="0", skipped="0", time=f"{done.seconds:.1f}",
    )  # fmt: skip
    for outcome in done.outcomes:
        case = ElementTree.SubElement(suite, "testcase", classname=done.assignment.name, name=outcome.part.name)
        if outcome.status != "green":
            ElementTree.SubElement(case, "failure", message=outcome.happened).text = message(outcome)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)
