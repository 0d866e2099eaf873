"""Memory of a training step: predicted part by part from the code that runs, and the closed forms beside it."""

from effzoo.annotations import check_arguments
from effzoo.plan.lectures import OPT_1_3B, OptTable, lecture_activations, opt_table
from effzoo.plan.planning import PRECISIONS, plan
from effzoo.plan.report import Plan

__all__ = ["OPT_1_3B", "PRECISIONS", "OptTable", "Plan", "lecture_activations", "opt_table", "plan"]

check_arguments(globals())
