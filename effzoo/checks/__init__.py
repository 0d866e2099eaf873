"""The contracts of attention kinds and PEFT methods, as checks that run: `check("attention", "mine")` -> Report.

The same checks run over the whole registry in effzoo's own tests, and over a file of yours with `effzoo check FILE`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from effzoo.annotations import check_arguments
from effzoo.checks import against as _against
from effzoo.checks import attention, in_model, models, peft
from effzoo.checks.against import Reference, read
from effzoo.checks.runner import Check, Report, Result, run, source_of
from effzoo.errors import OptionError, UnknownNameError
from effzoo.spec import parse_one

KINDS: dict[str, tuple[Check, ...]] = {"attention": (*attention.CHECKS, *in_model.CHECKS), "peft": peft.CHECKS}
_SUBJECTS: dict[str, Any] = {"attention": attention.Subject, "peft": peft.Subject}


def check(
    kind: str,
    name: str,
    *,
    only: Collection[str] | None = None,
    against: Reference | str | None = None,
    own: bool = False,
    on_result: Callable[[Result], None] | None = None,
    until_red: bool = False,
) -> Report:
    """Run every check of a kind on a registered entry; `report.ok` says whether all hold, `report.verified` whether the
    numbers were also compared with a definition.

    kind: "attention" or "peft".
    name: a registry name, or a spec such as "longformer[window=4]". Options that are not given and have a large whole
        number as default are made small, so that tiny sequences show what they do; the report's `subject` says which.
    only: the names of the checks to run, default all.
    against: what the numbers must equal: another entry, such as "longformer[window=8]", or a file with a dense function
        (`effzoo.checks.against.read`). Options that both have are the reference's where none are given.
    own: whether to refuse an entry that derives from a registered one, or calls it or a dense definition.
    on_result: called after each check.
    until_red: whether to stop at the first red check.

    Raises UnknownNameError for a kind, a name or a check that does not exist, OptionError for options.
    """
    every = checks_of(kind, against is not None, own)
    if isinstance(against, str):
        against = read(against, [kind])
    if against is not None and against.kind != kind:
        raise OptionError(
            f"{against.text} is a reference of {against.kind}, and {name!r} is of {kind}; give one of {kind}"
        )
    known = [check.__name__ for check in every]
    for wanted in only or ():
        if wanted not in known:
            raise UnknownNameError("check", wanted, known)
    checks = [check for check in every if only is None or check.__name__ in only]
    spec = parse_one(name)
    if against is not None:
        spec = against.options_for(spec)
    models.forget()
    try:
        with torch.random.fork_rng(devices=[]):
            subject = _SUBJECTS[kind].of(str(spec))
            subject.reference = against
            source, report = source_of(subject.cls), Report(kind, str(subject.spec))
            run(report, subject, checks, source, on_result, until_red)
            report.compared_with = _compared(report, subject)
            return report
    finally:
        models.forget()


# what a green check compares the numbers with
COMPARING = {
    "equals_reference": "the reference",
    "equals_definition": "its own definition, `pattern` or `dense`",
    "low_rank_scale": "s B A, the product of its factors, with s of its options",
    "merges": "its own `delta`",
}


def _compared(report: Report, subject: Any) -> str:
    green = {result.check for result in report.results if result.status == "green"}
    for check_, what in COMPARING.items():
        if check_ in green and (check_ != "merges" or peft.merges_by_delta(subject)):
            return f"{subject.reference.text}" if check_ == "equals_reference" else what
    return ""


def checks_of(kind: str, against: bool = False, own: bool = False) -> list[Check]:
    """The checks of a kind in their order, with those of a reference and of own work where they are asked for.

    Raises UnknownNameError for another kind than "attention" and "peft".
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of check", kind, KINDS)
    more = {"attention": _against, "peft": peft.against}[kind]
    checks = list(KINDS[kind])
    if own:
        checks.insert(1, more.is_own_work)
    if against:
        after = {"attention": "future_changes_nothing", "peft": "everything_learns"}[kind]
        checks.insert([check.__name__ for check in checks].index(after) + 1, more.equals_reference)
    return checks


__all__ = ["KINDS", "Reference", "Report", "Result", "check", "checks_of"]

check_arguments(globals())
