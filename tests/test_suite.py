"""The tests that `./scripts/test` runs meet everything that is registered: read off those that pytest collects."""

import functools
import json
from pathlib import Path

import pytest

import effzoo
from effzoo.checks.matrix import ARCHITECTURES
from effzoo.convert.layouts import LAYOUTS

TESTS = Path(__file__).parent
WORKING = {
    tuple(cell[part] for part in ("method", "attention", "architecture"))
    for cell in json.loads((TESTS.parent / "benchmarks/results/matrix.json").read_text())
    if cell["status"] == "works"
}
TOUCHED = [  # what has no registry: a file format, the demo, a launch, the documentation
    "test_adapter_files.py::test_an_adapter_on_the_head_gives_its_outputs_or_is_refused_by_the_heads_name",
    "test_peft_format.py::test_an_adapter_from_here_gives_the_same_logits_in_peft_and_read_again_here",
    "test_peft_format.py::test_an_adapter_from_peft_gives_the_same_logits_here_and_in_peft_again",
    "test_convert.py::test_theirs_to_ours_and_back_is_the_identity_live_and_from_a_folder",
    "test_train.py::test_resuming_the_whole_model_gives_the_same_bits",
    "test_train_resume.py::test_resuming_says_what_is_damaged_and_where_else_to_go_on",
    "test_toml.py::test_a_file_is_read_each_time_wherever_its_relative_path_leads",
    "test_demo.py::test_the_job_on_a_tiny_model",
    "test_train_processes.py::test_a_launch_of_two_processes_has_the_losses_of_one_also_of_a_stream",
    "test_docs.py::test_samples_run_and_print_what_is_shown",
]


class Kept:
    """A plugin of pytest that keeps what a session would run."""

    def pytest_collection_finish(self, session):
        self.items = session.items


@functools.cache
def fast(file):
    """The tests of a file that are not slow."""
    kept = Kept()
    assert pytest.main(["--collect-only", "-q", "-m", "not slow", str(TESTS / file)], plugins=[kept]) == 0
    return kept.items


def cells(file, test):
    """The parameters of a test in the fast suite."""
    return [item.callspec.params for item in fast(file) if item.originalname == test]


def test_every_method_kind_and_architecture_keeps_the_laws_in_a_cell_of_the_matrix_that_works():
    tried = cells("test_matrix.py", "test_every_method_keeps_the_laws_on_every_kind")
    works = [cell for cell in map(lambda c: (c["method"], c["attention"], c["architecture"]), tried) if cell in WORKING]
    methods, kinds, architectures = map(set, zip(*works, strict=True))
    assert methods == {*effzoo.peft.names()} - {"residual_adapter"}  # for convolutions: test_methods_function.py
    assert kinds == {*effzoo.attention.names()} and architectures == {*ARCHITECTURES}


def test_every_kind_is_compared_with_its_definition():
    tried = cells("test_checks.py", "test_the_core_of_every_kind_keeps_its_contract")
    assert {cell["name"] for cell in tried} == {*effzoo.attention.names()}


def test_every_model_trains_and_loads_an_adapter():
    tried = cells("test_models.py", "test_every_model_of_the_zoo_trains_an_adapter_that_loads_and_merges")
    assert {cell["name"] for cell in tried} == {*effzoo.models()}


def test_every_layout_of_transformers_is_compared_with_it():
    tried = cells("test_parity.py", "test_outputs_losses_and_gradients_equal_those_of_transformers")
    # test_parity_reformer.py, test_encoder_decoder.py, test_led.py, test_t5.py
    elsewhere = {"reformer", "bart", "led_seq2seq", "t5", "mt5"}
    assert {cell["family"] for cell in tried} == {*LAYOUTS} - elsewhere


@pytest.mark.parametrize("place", TOUCHED)
def test_what_has_no_registry_is_touched_too(place):
    file, test = place.split("::")
    assert any(item.originalname == test for item in fast(file))
