"""What a classification head does not read, the last block does not compute: the same loss and gradients, for every
kind, method and model."""

import pytest
import torch

import effzoo
from effzoo.registry import attention
from tests.support import labelled, small

LABELS = {"labels": torch.tensor([0, 2, 1])}


def gradients(model, batch, alone):
    model.only_what_is_read = alone
    out = model.train()(**batch)
    leaves = [p for p in model.parameters() if p.requires_grad]
    return out, torch.autograd.grad(out.loss, leaves, allow_unused=True)


def assert_equal(model, batch):
    whole, expected = gradients(model, batch, False)
    out, found = gradients(model, batch, True)
    assert whole.last_hidden_state is not None and out.last_hidden_state is None
    torch.testing.assert_close(out.logits, whole.logits, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(found, expected, strict=True):
        if theirs is None or mine is None:
            assert (mine is theirs) or not (theirs if mine is None else mine).any()
        else:
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def built(name, **choices):
    sizes = {
        "dim": 16,
        "layers": 2,
        "heads": 2,
        "mlp": 32,
        "vocab": 53,
        "max_length": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    torch.manual_seed(0)
    return effzoo.build(name, task="classification", num_labels=3, **{**sizes, **choices}).double()


@pytest.mark.parametrize("peft", [None, "lora", "prompt[length=3]|lora", "prefix[length=3]"])
@pytest.mark.parametrize("model", ["bert", "longformer", "gpt2", "llama", "modernbert"])
def test_every_model(model, peft):
    batch = {**labelled(), **LABELS}
    choices = {"llama": {"kv_heads": 1}, "modernbert": {"pooling": "first"}}.get(model, {})
    assert_equal(built(model, peft=peft, **choices), batch)
    batch.pop("attention_mask")
    assert_equal(built(model, peft=peft, **choices), batch)


@pytest.mark.parametrize("kind", effzoo.attention.names())
def test_every_kind(kind):
    for architecture in ("bert", "gpt2") if not attention.get(kind).not_causal else ("bert",):
        assert_equal(built(architecture, attention=small(kind), peft="lora|bitfit"), {**labelled(), **LABELS})


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_every_pooling(pooling):
    model = built("bert", pooling=pooling, attention="longformer[window=4, dilation=(1, 2)]", peft="houlsby")
    batch = {
        **labelled(),
        **LABELS,
        "global_attention_mask": torch.tensor([[0, 1, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0], [0] * 9]),
    }
    if pooling != "mean":
        assert_equal(model, batch)
        return
    model.only_what_is_read = True
    assert model(**batch).last_hidden_state.shape == (3, 9, 16)


@pytest.mark.parametrize("method", ["pals", "unipelt", "multihead_parallel", "ladder"])
def test_what_looks_at_other_positions_is_given_all(method):
    model = built("bert", peft=method)
    model.only_what_is_read = True
    out = model(**{**labelled(), **LABELS})
    assert out.last_hidden_state is not None


def test_under_checkpointing_and_recomputation():
    batch = {**labelled(), **LABELS}
    model = built("bert", peft="lora|houlsby")
    plain = gradients(model, batch, True)[1]
    for level in ("hidden", "blocks"):
        model.recompute = level
        for mine, theirs in zip(gradients(model, batch, True)[1], plain, strict=True):
            assert torch.equal(mine, theirs)
