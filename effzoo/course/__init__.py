"""The course: assignments that grade themselves. `effzoo course list` shows them; docs/howto/teach.md is its manual."""

from __future__ import annotations

from effzoo.annotations import check_arguments
from effzoo.course.assignment import Assignment, Part, assignments, find
from effzoo.course.entries import Layer, Method
from effzoo.course.grading import Grade, Outcome, grade
from effzoo.course.task import Call, Draw, Function, Task

__all__ = ["Assignment", "Call", "Draw", "Function", "Grade", "Layer", "Method", "Outcome", "Part", "Task",
           "assignments", "find", "grade"]  # fmt: skip

check_arguments(globals())
