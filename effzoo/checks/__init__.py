"""The contracts of attention kinds and PEFT methods, as checks that run: `check("attention", "mine")` -> Report.

The same checks run over the whole registry in effzoo's own tests, and over a file of yours with `effzoo check FILE`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from effzoo.annotations import check_arguments
from effzoo.checks import attention, in_model, models, peft
from effzoo.checks.runner import Check, Report, Result, run, source_of
from effzoo.errors import UnknownNameError

KINDS: dict[str, tuple[Check, ...]] = {"attention": (*attention.CHECKS, *in_model.CHECKS), "peft": peft.CHECKS}
_SUBJECTS: dict[str, Any] = {"attention": attention.Subject, "peft": peft.Subject}


def check(
    kind: str, name: str, *, only: Collection[str] | None = None, on_result: Callable[[Result], None] | None = None
) -> Report:
    """Run every check of a kind on a registered entry; `report.ok` says whether all hold.

    kind: "attention" or "peft".
    name: a registry name, or a spec such as "longformer[window=4]". Options that are not given and have a large whole
        number as default are made small, so that tiny sequences show what they do; the report's `subject` says which.
    only: the names of the checks to run, default all.
    on_result: called after each check.

    Raises UnknownNameError for a kind, a name or a check that does not exist, OptionError for options.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of check", kind, KINDS)
    known = [check.__name__ for check in KINDS[kind]]
    for wanted in only or ():
        if wanted not in known:
            raise UnknownNameError("check", wanted, known)
    checks = [check for check in KINDS[kind] if only is None or check.__name__ in only]
    models.forget()
    try:
        with torch.random.fork_rng(devices=[]):
            subject = _SUBJECTS[kind].of(name)
            return run(Report(kind, str(subject.spec)), subject, checks, source_of(subject.cls), on_result)
    finally:
        models.forget()


__all__ = ["KINDS", "Report", "Result", "check"]

check_arguments(globals())
