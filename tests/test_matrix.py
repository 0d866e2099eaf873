"""Every attention kind x {encoder, decoder} x every fine-tuning method: attached, trained for three steps, detached.

Driven by the registry: a new kind or method is in the matrix as soon as it is registered. The encoder is bidirectional and post-norm (BERT),
the decoder causal and pre-norm (GPT-2); sizes are tiny, in float64.
"""

import pytest
import torch

import effzoo
from effzoo.checks.attention import Subject as Kind
from effzoo.checks.models import Case, logits, silent, train
from effzoo.checks.peft import Subject as Method
from effzoo.errors import IncompatibleError
from effzoo.peft.attach import adapter_tensors, base_tensors


@pytest.fixture(scope="module")
def kinds():
    return {name: Kind.of(name) for name in effzoo.attention.names()}


@pytest.fixture(scope="module")
def methods():
    return {name: Method.of(name) for name in effzoo.peft.names()}


def case(kind: Kind, architecture: str) -> Case:
    return Case(architecture, str(kind.spec), kind.cls.supports_global)


@pytest.mark.parametrize("method", effzoo.peft.names())
@pytest.mark.parametrize("attention", effzoo.attention.names())
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_every_method_trains_on_every_kind_and_leaves_no_trace(kinds, methods, architecture, attention, method):
    kind = kinds[attention]
    if architecture == "gpt2" and not kind.cls.supports_causal:
        with pytest.raises(IncompatibleError, match=f"{attention!r} cannot be causal"):
            case(kind, architecture).model()
        return
    one = case(kind, architecture)
    model, batch = one.model(), one.batch()
    before = logits(model, batch)
    frozen = {name: tensor.clone() for name, tensor in base_tensors(model).items()}
    effzoo.attach(model, methods[method].spec, name="one")
    if methods[method].cls.identity_at_init:
        assert (logits(model, batch) - before).abs().max() < 1e-10
    start = {name: tensor.clone() for name, tensor in adapter_tensors(model, "one").items()}
    seen = train(model, batch)
    assert silent(model, seen) == ""
    assert any(not torch.equal(start[name], tensor) for name, tensor in adapter_tensors(model, "one").items())
    assert not torch.allclose(logits(model, batch), before)
    now = base_tensors(model)
    assert now.keys() == frozen.keys() and all(torch.equal(now[name], tensor) for name, tensor in frozen.items())
    effzoo.detach(model, "one")
    assert torch.equal(logits(model, batch), before)
    assert {*model.state_dict()} == {*frozen}


def test_the_matrix_holds_every_kind_of_the_lectures(kinds):
    assert {"full", "blockwise", "longformer", "lsh", "local", "linformer", "perceiver"} <= kinds.keys()
