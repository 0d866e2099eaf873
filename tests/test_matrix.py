"""Every attention kind x every fine-tuning method x {encoder, decoder, reversible, perceiver}: the laws hold, or it is refused with a reason.

Driven by the registry: a new kind or method is in the matrix as soon as it is registered.
"""

import functools
import json
from pathlib import Path

import pytest

import effzoo
from effzoo.checks.attention import Subject as Kind
from effzoo.checks.matrix import ARCHITECTURES, cell
from effzoo.checks.peft import Subject as Method

ROOT = Path(__file__).parent.parent
TRACKED = {
    (cell["method"], cell["attention"], cell["architecture"]): cell["status"]
    for cell in json.loads((ROOT / "benchmarks/results/matrix.json").read_text())
}
KINDS = functools.cache(Kind.of)
METHODS = functools.cache(Method.of)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("attention", effzoo.attention.names())
@pytest.mark.parametrize("method", effzoo.peft.names())
def test_every_method_keeps_the_laws_on_every_kind(method, attention, architecture):
    found = cell(METHODS(method), KINDS(attention), architecture)
    assert found.status != "fails", found.reason
    assert (found.status == "refused") == refused(method, attention, architecture), found.reason
    assert TRACKED[method, attention, architecture] == found.status, "run effzoo matrix --save benchmarks/results/matrix.json"


def refused(method, attention, architecture):
    """The whole list of what has no meaning."""
    return (
        (architecture == "decoder" and not effzoo.attention.get(attention).supports_causal)  # mixes past and future
        or method == "residual_adapter"  # for convolutions
        or (method == "pals" and architecture == "decoder")  # its own attention would need a cache
        or (method == "ladder" and architecture == "perceiver")  # no blocks to stand beside
    )


def test_the_matrix_holds_every_kind_of_the_lectures():
    assert {"full", "blockwise", "longformer", "lsh", "local", "linformer", "perceiver"} <= {*effzoo.attention.names()}
