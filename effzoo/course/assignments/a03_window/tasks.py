"""What is right: the zoo's longformer without global tokens."""

from __future__ import annotations

from effzoo.checks.apart import Limits
from effzoo.course.entries import Layer
from effzoo.course.task import Task

WINDOW = "longformer[window=8, global_projections=false]"
TASKS: dict[str, Task] = {
    "window": Layer(WINDOW),
    "padding": Layer(WINDOW, padding="some"),
    "causal": Layer(WINDOW, causal=True),
    "gradients": Layer(WINDOW, gradients=True, lengths=(9, 30), draws=2),
    "linear": Layer(WINDOW, lengths=(32_768, 32_768), draws=1, dtype="float32", limits=Limits(40.0, 5.0)),
}
