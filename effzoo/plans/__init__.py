"""Memory of a training step: predicted part by part from the code that runs, and the closed forms beside it."""

from effzoo.annotations import check_arguments
from effzoo.plans.lectures import OPT_1_3B, OPT_SLIDE, OPT_SLIDE_REMARK, OptTable, lecture_activations, opt_table
from effzoo.plans.planning import PRECISIONS, plan
from effzoo.plans.report import Plan
from effzoo.plans.spread import Spread, spread

__all__ = [
    "OPT_1_3B", "OPT_SLIDE", "OPT_SLIDE_REMARK", "PRECISIONS", "OptTable", "Plan", "Spread", "lecture_activations",
    "opt_table", "plan", "spread",
]  # fmt: skip

check_arguments(globals())
