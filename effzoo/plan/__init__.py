"""Memory of a training step: predicted part by part from the code that runs, and the closed forms beside it."""

from effzoo.plan.planning import PRECISIONS, plan
from effzoo.plan.report import Plan

__all__ = ["PRECISIONS", "Plan", "plan"]
