"""The checks themselves: every built-in entry is green, and a report says what a reader needs."""

from pathlib import Path

import pytest
import torch

import effzoo
from effzoo.attention import Part
from effzoo.attention.full import Full
from effzoo.checks import KINDS, Result
from effzoo.checks.runner import Report, label_of, see_of
from effzoo.errors import OptionError, UnknownNameError

ENTRIES = [("attention", name) for name in effzoo.attention.names()] + [("peft", name) for name in effzoo.peft.names()]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), ENTRIES, ids=lambda value: str(value))
def test_every_registered_entry_keeps_its_contract(kind, name):
    report = effzoo.check(kind, name)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("name", effzoo.attention.names())
def test_the_core_of_every_kind_keeps_its_contract(name):
    """The checks that neither compile it nor move it nor build a model around it, which the matrix does."""
    elsewhere = ("trains_", "compiles", "devices", "checkpointing")
    only = {check.__name__ for check in KINDS["attention"] if not check.__name__.startswith(elsewhere)}
    report = effzoo.check("attention", name, only=only)
    assert report.ok and len(report.results) == len(only) > 20, f"\n{report}"


def test_a_spec_sets_options_and_large_defaults_become_small():
    def subject(spec: str) -> str:
        return effzoo.check("attention", spec, only=["declares_itself"]).subject

    assert subject("longformer[window=4]") == "longformer[window=4, max_globals=8]"
    assert subject("longformer") == "longformer[window=8, max_globals=8]"


@pytest.mark.slow
def test_results_are_told_one_by_one_in_the_order_of_the_checks():
    seen: list[Result] = []
    report = effzoo.check("attention", "perceiver[latents=4]", on_result=seen.append)
    assert seen == report.results and [result.check for result in seen] == [
        check.__name__ for check in KINDS["attention"]
    ]


@pytest.mark.parametrize(
    ("kind", "name", "only", "error"),
    [
        ("attenton", "full", None, UnknownNameError),
        ("attention", "longfromer", None, UnknownNameError),
        ("attention", "full", ["padding"], UnknownNameError),
        ("peft", "lora[rnk=4]", None, OptionError),
    ],
)
def test_unknown_names_and_options_are_errors_not_red_lines(kind, name, only, error):
    with pytest.raises(error):
        effzoo.check(kind, name, only=only)


def test_a_crash_is_one_red_line_with_the_place_in_the_users_file():
    with effzoo.scope():

        @effzoo.attention.register("crashing")
        class Crashing(Full):
            """Fails at its own line."""

            def forward(self, q, k, v, *, mask, memory=None):
                return {}["missing"]

        report = effzoo.check("attention", "crashing")
    red = report.result("shape_and_dtype")
    assert red.status == "red" and "KeyError: 'missing'" in red.reason
    assert f"{__file__}:" in red.reason and "in forward" in red.reason
    assert red.trace.endswith("KeyError: 'missing'") and red.happened == red.reason
    assert (
        report.result("every_length").status == "not run" and "shape_and_dtype" in report.result("every_length").reason
    )
    assert report.result("declares_itself").status == "green"
    assert not report.ok and [result.check for result in report.failures] == ["shape_and_dtype"]


@pytest.mark.slow
def test_checking_leaves_the_random_state_the_threads_and_the_registry_alone():
    torch.manual_seed(5)
    state, threads, names = torch.get_rng_state(), torch.get_num_threads(), effzoo.attention.names()
    effzoo.check("attention", "full")
    effzoo.check("peft", "lora", only=["copies"])
    assert (
        torch.equal(state, torch.get_rng_state())
        and threads == torch.get_num_threads()
        and names == effzoo.attention.names()
    )


def test_the_same_name_in_two_scopes_is_checked_anew():
    for broken in (False, True, False):
        with effzoo.scope():

            class Kind(Full):
                """Full attention, broken on demand."""

                def forward(self, q, k, v, *, mask, memory=None):
                    out = super().forward(q, k, v, mask=mask, memory=memory)
                    return out.detach() if self.broken else out

            Kind.broken = broken
            effzoo.attention.register("again")(Kind)
            assert effzoo.check("attention", "again", only=["trains_lora"]).ok is not broken


@pytest.mark.slow
def test_a_kind_without_a_pattern_is_not_verified():
    with effzoo.scope():

        @effzoo.attention.register("patternless")
        class Patternless(effzoo.attention.AttentionCore):
            """Full attention that does not say so."""

            cost = "n^2"

            def forward(self, q, k, v, *, mask, memory=None):
                return self.attend(
                    Part(q, k, v, mask.key_bias(q.dtype), causal=self.context.causal),
                    effzoo.attention.memory_part(q, memory),
                )

        report = effzoo.check("attention", "patternless")
    assert report.ok and not report.verified, f"\n{report}"
    result = report.result("equals_definition")
    assert result.status == "skipped" and "nothing to compare with" in result.reason


def test_the_report_reads_as_a_summary_and_one_line_per_check():
    results = [
        Result("a", "A holds", "green"),
        Result("b", "B holds", "red", "off by 3"),
        Result("c", "C holds", "not run", "b"),
    ]
    report = Report("peft", "mine", results)
    assert str(report).splitlines() == [
        "peft mine: 1 green, 1 red, 1 not run",
        "  green    A holds",
        "  red      B holds",
        "           off by 3",
        "  not run  C holds",
        "           b",
    ]
    assert not report.ok and not Report("peft", "mine").ok


def test_a_reason_has_two_parts_and_the_docstring_of_a_check_says_how_to_see_it():
    result = Result("a", "A holds", "red", "off by 3; the scale; or the sign")
    assert (result.happened, result.cause) == ("off by 3", "the scale; or the sign")
    assert all(len(see_of(check)) > 20 for checks in KINDS.values() for check in checks)


def test_no_sentence_advises_to_declare_a_fault_away():
    folder = Path(effzoo.checks.__file__).parent
    for file in folder.rglob("*.py"):
        text = " ".join(file.read_text().split()).replace('" "', "")
        for advice in (
            "declare identity_at_init",
            "or declare",
            "declare that",
            "by_position",
            "say why it",
            "facts why",
        ):
            assert advice not in text, (file.name, advice)


def test_every_check_has_a_label_of_its_own():
    for checks in KINDS.values():
        labels = [label_of(check) for check in checks]
        assert len(set(labels)) == len(labels) and all(len(label) > 20 for label in labels)
