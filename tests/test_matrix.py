"""Every attention kind x every fine-tuning method x {encoder, decoder, reversible, perceiver}: the laws hold, or it is refused with a reason.

Driven by the registry: a new kind or method is in the matrix as soon as it is registered.
"""

import functools

import pytest

import effzoo
from effzoo.checks.attention import Subject as Kind
from effzoo.checks.matrix import ARCHITECTURES, cell
from effzoo.checks.peft import Subject as Method

KINDS = functools.cache(Kind.of)
METHODS = functools.cache(Method.of)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("attention", effzoo.attention.names())
@pytest.mark.parametrize("method", effzoo.peft.names())
def test_every_method_keeps_the_laws_on_every_kind(method, attention, architecture):
    found = cell(METHODS(method), KINDS(attention), architecture)
    assert found.status != "fails", found.reason
    if found.status == "refused":
        assert refusal(found) is not None, f"refused without a known reason: {found.reason}"


def refusal(found):
    """Why a combination may be refused: the short list of what has no meaning."""
    if found.architecture == "decoder" and not effzoo.attention.get(found.attention).supports_causal:
        return "the kind mixes past and future"
    return REFUSED.get((found.method, found.architecture)) or REFUSED.get((found.method, "*"))


REFUSED: dict[tuple[str, str], str] = {}


def test_the_matrix_holds_every_kind_of_the_lectures():
    assert {"full", "blockwise", "longformer", "lsh", "local", "linformer", "perceiver"} <= {*effzoo.attention.names()}
