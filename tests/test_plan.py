"""`effzoo.plan` predicts, byte for byte, what autograd keeps in a real pass: for every attention kind x every fine-tuning method."""

import pytest
import torch
from torch import nn

import effzoo
from effzoo.checks.attention import Subject as Kind
from effzoo.checks.peft import Subject as Method
from effzoo.errors import EffzooError, IncompatibleError
from effzoo.plan import plan

SIZES = {"dim": 16, "layers": 2, "heads": 2, "mlp": 32, "vocab": 53, "max_length": 96}
TRAINED = {"dropout": 0.1, "attention_dropout": 0.1}


def kept(model: nn.Module, autocast: torch.dtype | None = None, **inputs: torch.Tensor) -> int:
    """The oracle: bytes of the storages that a real forward pass saves, each once, without parameters, buffers and inputs."""
    saved: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        output = model.train()(**inputs)
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers(), *inputs.values())}
    assert output is not None
    return sum(nbytes for address, (nbytes, _) in saved.items() if address not in own)


def call(model, batch: int, length: int, padded: bool = False) -> dict[str, torch.Tensor]:
    """A call of a model of the zoo, as `plan` makes it up from batch and length; padded: with padding behind the first sequence."""
    inputs = {"input_ids": torch.randint(2, 53, (batch, length))}
    if padded:
        inputs["attention_mask"] = (torch.arange(length) < torch.tensor([length - length // 3] + [length] * (batch - 1))[:, None]).long()
    if model.task != "features":
        inputs["labels"] = torch.zeros(batch, *[length] * (model.task != "classification"), dtype=torch.long)
    return inputs


@pytest.fixture(scope="module")
def kinds():
    return {name: Kind.of(name) for name in effzoo.attention.names()}


def built(kind: Kind, dropout: float):
    """An encoder, and a decoder where the kind can be causal."""
    for name, task in (("bert", "classification"), ("gpt2", "token_classification"))[: 1 + kind.cls.supports_causal]:
        yield effzoo.build(name, attention=str(kind.spec), task=task, dropout=dropout, attention_dropout=dropout, **SIZES)


@pytest.mark.parametrize("attention", effzoo.attention.names())
@pytest.mark.parametrize("method", [None, *effzoo.peft.names()])
def test_activations_are_those_of_a_real_pass(kinds, attention, method):
    """With dropout everywhere and padding, at a prime length."""
    for model in built(kinds[attention], dropout=0.1):
        if method is not None:
            effzoo.attach(model, Method.of(method).spec)
        inputs = call(model, 2, 37, padded=True)
        assert plan(model, inputs=inputs).kept == kept(model, **inputs) > 0


@pytest.mark.parametrize(
    ("attention", "method"),
    [*((attention, None) for attention in effzoo.attention.names()), *(("full", method) for method in effzoo.peft.names())],
)
def test_activations_are_those_of_a_real_pass_without_dropout(kinds, attention, method):
    """Of the fused kernel, and without a mask; at a length of 1 too."""
    for model in built(kinds[attention], dropout=0.0):
        if method is not None:
            effzoo.attach(model, Method.of(method).spec)
        for length in (1, 37):
            assert plan(model, batch=2, length=length).kept == kept(model, **call(model, 2, length))
