"""Every attention kind x every fine-tuning method x {encoder, decoder, reversible, encoder-decoder, perceiver}: the
laws hold, or it is refused with a reason.

Driven by the registry: a new kind or method is in the matrix as soon as it is registered.
"""

import functools
import json
from pathlib import Path

import pytest

import effzoo
from effzoo.checks.attention import Subject as Kind
from effzoo.checks.matrix import ARCHITECTURES, as_expert, candidates, cell
from effzoo.checks.peft import Subject as Method

ROOT = Path(__file__).parent.parent
TRACKED = {
    (cell["method"], cell["attention"], cell["architecture"]): cell["status"]
    for cell in json.loads((ROOT / "benchmarks/results/matrix.json").read_text())
}
KINDS = functools.cache(Kind.of)
METHODS = functools.cache(Method.of)
EXPERTS = {
    (cell["method"], cell["attention"], cell["architecture"]): cell["status"]
    for cell in json.loads((ROOT / "benchmarks/results/matrix-experts.json").read_text())
}


@pytest.mark.cover()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("attention", effzoo.attention.names())
@pytest.mark.parametrize("method", effzoo.peft.names())
def test_every_method_keeps_the_laws_on_every_kind(method, attention, architecture):
    found = cell(METHODS(method), KINDS(attention), architecture)
    assert found.status != "fails", found.reason
    assert (found.status == "refused") == refused(method, attention, architecture), found.reason
    assert TRACKED[method, attention, architecture] == found.status, (
        "run effzoo matrix --save benchmarks/results/matrix.json"
    )


def test_the_tracked_matrix_of_experts_is_whole_and_nothing_in_it_fails():
    """Its cells are tried by `effzoo matrix --experts`, some of them in test_modular: all would take as long as the
    matrix itself."""
    assert {*EXPERTS} == {
        (m, a, each) for m in candidates(experts=True) for a in effzoo.attention.names() for each in ARCHITECTURES
    }
    assert "fails" not in EXPERTS.values()


@pytest.mark.cover()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("attention", ["longformer", "lsh"])
@pytest.mark.parametrize("method", ["lora", "prefix", "houlsby", "bitfit", "unipelt", "prompt", "head"])
def test_experts_keep_the_laws(method, attention, architecture):
    found = cell(METHODS(as_expert(method)), KINDS(attention), architecture)
    assert found.status == EXPERTS[method, attention, architecture], found.reason


def refused(method, attention, architecture):
    """The whole list of what has no meaning."""
    return (
        (architecture == "decoder" and effzoo.attention.get(attention).not_causal != "")  # mixes past and future
        or method == "residual_adapter"  # for convolutions
        # its own attention would need a cache
        or (method == "pals" and architecture in ("decoder", "encoder-decoder"))
        # no blocks to stand beside, or two stacks of them
        or (method == "ladder" and architecture in ("perceiver", "encoder-decoder"))
        or (method == "loreft" and architecture == "reversible")  # two streams, and so none to edit
        # gates that read a whole text; a head for labels
        or (method in ("unipelt", "head") and architecture == "encoder-decoder")
    )


def test_the_matrix_holds_every_kind_of_the_lectures():
    assert {"full", "blockwise", "longformer", "lsh", "local", "linformer", "perceiver"} <= {*effzoo.attention.names()}
