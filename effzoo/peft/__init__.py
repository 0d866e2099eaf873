"""PEFT methods, each a few hooks, and what can be done with them on any model made of sites.

`names()`, `get(name)`, `options(name)` and `register(name)` are the registry's view of PEFT methods.
"""

from effzoo.annotations import check_arguments
from effzoo.peft import combined, function, input, modular, parameter
from effzoo.peft.accounting import Account, Flops, account, flops, ranks
from effzoo.peft.aggregation import Combined, combine
from effzoo.peft.attach import activate, active, attach, attached, detach, disabled, recast, roles
from effzoo.peft.budget import within
from effzoo.peft.files import base_rounding, load_adapter, save_adapter, swap_weights
from effzoo.peft.merging import MergeReport, delta, merge, unmerge
from effzoo.peft.method import Method
from effzoo.peft.modular import extract, gather
from effzoo.peft.state import Attachment
from effzoo.peft.status import Status, status
from effzoo.peft.training import (
    after_backward,
    begin,
    calibrate,
    finish,
    learning_rates,
    loss,
    penalty,
    schedule,
    stages,
    timetable,
)
from effzoo.peft.training_hooks import Stage, TrainingHooks
from effzoo.registry import peft as _view
from effzoo.sites import HookContext, Memory, PeftModule, SideNetwork

names, get, options, register, create = _view.names, _view.get, _view.options, _view.register, _view.create
aliases = _view.aliases

__all__ = [
    "Account", "Attachment", "Combined", "Flops", "HookContext", "Memory", "MergeReport", "Method", "PeftModule",
    "SideNetwork", "Stage", "Status", "TrainingHooks", "account", "activate", "active", "after_backward", "aliases",
    "attach", "attached", "base_rounding", "begin", "calibrate", "combine", "create", "delta", "detach", "disabled",
    "extract", "finish", "flops", "gather", "get", "combined", "function", "learning_rates", "load_adapter", "input",
    "loss", "merge", "modular", "names", "options", "penalty", "parameter", "ranks", "recast",
    "register", "roles", "save_adapter", "schedule", "stages", "status", "swap_weights", "timetable", "unmerge",
    "within",
]  # fmt: skip

check_arguments(globals())
