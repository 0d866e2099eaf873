"""Routing by the number of the task: fixed, or by a learned table of which task uses which skill."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from effzoo.annotations import Count, Positive
from effzoo.checked import known
from effzoo.devices import at_hand
from effzoo.errors import InputError
from effzoo.registry import router
from effzoo.routing.mixtures import hard
from effzoo.routing.router import Router, Routing


@router.register("fixed")
class Fixed(Router):
    """Task t goes to expert t: nothing to learn, as with one adapter for each language.

    Raises InputError for a task that no expert has.
    """

    paper = "Pfeiffer et al. 2023, Modular deep learning, arXiv:2302.11529, section 4.1"
    reads = "tasks"

    def forward(self, x: Tensor) -> Routing:
        x = checked_tasks(x, self.experts, "experts")
        sent = self.one_hot(x)
        weights = sent.to(torch.get_default_dtype())
        return Routing(weights, sent, weights)


@router.register("skills")
class Skills(Router):
    """weights sigmoid(Z_t) / sum for task t, with a learned table Z [tasks, experts]: which skills a task uses.

    tasks: how many there are.
    form: "soft", with the relaxed Bernoulli's noise in training; "hard", each skill on or off with the gradient of its
        relaxation.
    temperature: of the relaxation.

    The table starts near 0, so that all tasks share all skills. `routed` trains it at 100 times the experts' learning
    rate: at their own it hardly leaves 1/2.
    """

    paper = "Ponti et al. 2022, Combining modular skills in multitask learning, arXiv:2202.13914, section 3"
    reads = "tasks"

    def __init__(
        self,
        dim: int,
        experts: int,
        *,
        tasks: Count,
        form: Literal["soft", "hard"] = "soft",
        temperature: Positive = 1.0,
    ):
        super().__init__(dim, experts)
        self.form, self.temperature = form, temperature
        self.dense, self.straight_through = form == "soft", form == "hard"
        self.table = nn.Parameter(torch.empty(tasks, experts).uniform_(-1e-3, 1e-3))

    def forward(self, x: Tensor) -> Routing:
        x = checked_tasks(x, len(self.table), "tasks of the table")
        choice = hard(self.table[x], "sigmoid", self.temperature, self.training)
        if self.form == "hard":
            return choice
        return Routing(choice.probabilities, torch.ones_like(choice.sent), choice.probabilities)


def checked_tasks(x: Tensor, tasks: int, what: str) -> Tensor:
    """Numbers of tasks that exist; InputError for others."""
    wanted = f"task_ids are integers from 0 to {tasks - 1}, one for each of the {tasks} {what}"
    fine = ((x >= 0) & (x < tasks)).all()
    if x.is_floating_point() or x.ndim != 1 or (at_hand(x) and not bool(fine)):
        raise InputError(f"{wanted}, got {sorted(set(x.flatten().tolist()))[:8]}")
    return known(x, fine, wanted)
