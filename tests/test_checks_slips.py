"""One-line mistakes of students, in solutions that are right otherwise: each is caught, and its cause named first.

The table is `slips.py`. Of the mistakes in attention and in a low-rank method all must be caught, none may be green,
and the first red line must name the cause.
"""

import pytest
from slips import ATTENTION, ATTENTION_SLIPS, LOW_RANK, LOW_RANK_SLIPS, WINDOW

import effzoo
from effzoo.checks.against import read

SOLUTIONS = {"attention": (ATTENTION, WINDOW), "peft": (LOW_RANK, "lora[rank=4, alpha=8.0]")}
TABLE = [("attention", name, *slip) for name, slip in ATTENTION_SLIPS.items()]
TABLE += [("peft", name, *slip) for name, slip in LOW_RANK_SLIPS.items()]
FAST = {"no_scale", "softmax_queries", "window_wide", "mask_inverted", "in_a_list", "alpha_times", "transposed"}
LATER = (  # checks that take long, behind those that speak of the function
    "compiles", "cost_", "trains_", "checkpointing", "project_", "decisions", "learns_in_rev", "learns_under", "runs_",
    "dropout_keeps", "copies", "adapters_are", "serves", "saves", "finishes", "detaches", "gradients_are", "positions_",
    "keys_are",
)  # fmt: skip


def first_failure(kind, text, folder):
    file = folder / "mine.py"
    file.write_text(text)
    only = {check.__name__ for check in effzoo.checks.checks_of(kind, True)}
    only = {name for name in only if not name.startswith(LATER)}
    with effzoo.scope():
        effzoo.load_file(file)
        report = effzoo.check(kind, "mine", only=only, against=read(SOLUTIONS[kind][1], [kind]))
    return report, report.failures[0] if report.failures else None


def cells():
    for kind, name, old, new, words in TABLE:
        marks = [] if name in FAST else [pytest.mark.slow]
        yield pytest.param(kind, old, new, words, id=f"{kind}-{name}", marks=marks)


@pytest.mark.parametrize(("kind", "old", "new", "words"), list(cells()))
def test_a_mistake_is_caught_and_its_cause_named_first(kind, old, new, words, tmp_path):
    solution = SOLUTIONS[kind][0]
    assert old in solution
    report, first = first_failure(kind, solution.replace(old, new, 1), tmp_path)
    assert first is not None and not report.verified, f"\n{report}"
    assert words in first.reason, f"{first.check}: {first.reason}"


@pytest.mark.parametrize("kind", SOLUTIONS)
def test_the_solution_behind_the_mistakes_is_green_and_verified(kind, tmp_path):
    report, first = first_failure(kind, SOLUTIONS[kind][0], tmp_path)
    assert first is None and report.verified, f"\n{report}"


def test_the_table_holds_thirty_of_each():
    assert len(ATTENTION_SLIPS) >= 40 and len(LOW_RANK_SLIPS) >= 40
    assert len({(kind, old, new) for kind, _, old, new, _ in TABLE}) == len(TABLE)
    assert {name for _, name, *_ in TABLE} >= FAST
