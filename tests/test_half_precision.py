"""Numbers in 16 bits: sums do not overflow, scores and losses are computed in float32, padding and empty rows give no
NaN."""

import pytest
import torch
from support import labelled, small
from torch.nn import functional as F

import effzoo
from effzoo.architectures.heads import pool
from effzoo.attention import kernel
from effzoo.attention.part import Part, bias_of
from effzoo.errors import EffzooError

HALVES = (torch.bfloat16, torch.float16)


def larger(model):
    """Weights far from 0, so that attention is far from uniform and rounding shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [*effzoo.peft.names(), "lora[init=pissa]", "lora[init=olora]", "prefix[softmax=own]", "tokens[ids=3]"]
)
def test_attaching_leaves_the_outputs_of_a_half_model_bit_by_bit(tiny, method):
    """Where the method says that it changes nothing at the start: what it computes in float32 rounds to what was
    there."""
    for half in HALVES:
        for name, more in (("bert", {}), ("llama", {"kv_heads": 1, "head_dim": 8})):
            model = (
                larger(effzoo.build(name, task="token_classification", num_labels=3, **{**tiny, **more}))
                .to(half)
                .eval()
            )
            ids = labelled()["input_ids"]
            with torch.no_grad():
                before = model(input_ids=ids).logits
            try:
                effzoo.attach(model, method)
            except EffzooError:
                continue
            if effzoo.attached(model)["default"].methods[0][0].identity_at_init:
                with torch.no_grad():
                    assert torch.equal(model.eval()(input_ids=ids).logits, before)


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("kind", effzoo.attention.names())
def test_examples_without_a_token_give_numbers(tiny, kind, half):
    """Forward and backward, with rows of prompts and prefixes and without, with the fused kernel and with dropped
    weights."""
    for dropout in (0.0, 0.1):
        for method in (None, "prefix[length=3]|prompt[length=2]"):
            sizes = {**tiny, "attention_dropout": dropout}
            model = larger(
                effzoo.build("bert", attention=small(kind), task="classification", num_labels=3, **sizes).to(half)
            )
            model = model if method is None else effzoo.attach(model, method)
            batch = labelled()
            batch["attention_mask"][0] = 0
            out = model.train()(**batch)
            out.loss.backward()
            assert bool(out.logits.isfinite().all())
            assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_the_mean_over_many_tokens_does_not_overflow(half):
    x = (20 + torch.randn(2, 5000, 3)).to(half)
    valid = torch.ones(2, 5000, dtype=torch.bool)
    valid[1, 4000:] = False
    found = pool(x, valid, "mean")
    wanted = torch.stack([x[0].double().mean(dim=0), x[1, :4000].double().mean(dim=0)])
    assert found.dtype == half and (found.double() - wanted).abs().max() <= torch.finfo(half).eps * 20
    assert torch.equal(pool(x, None, "mean")[0].double().round(), wanted[0].round())


@pytest.mark.parametrize("backend", ["reference", "flash", "blocks"])
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_scores_do_not_overflow(half, backend):
    """Products of 150,000, far above what float16 holds: the softmax is that of float64, and what no one attends to is
    0."""
    q, k = (torch.full((1, 1, 6, 64), 50.0) + torch.randint(-2, 3, (1, 1, 6, 64)) for _ in range(2))
    v = torch.randn(1, 1, 6, 8).to(half)
    allowed = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    allowed[..., 2, :] = False
    parts = [Part(q.to(dtype), k.to(dtype), v.to(dtype), bias_of(allowed, dtype)) for dtype in (half, torch.float64)]
    found, wanted = kernel.attend(parts[0], backend=backend), kernel.attend(parts[1], backend="reference")
    assert bool(found.isfinite().all()) and bool((found[..., 2, :] == 0).all())
    assert (found.double() - wanted).abs().max() < 2 * torch.finfo(half).eps * v.double().abs().max()


def test_autocast_leaves_the_scores_in_float32():
    """In plain PyTorch too, which masks and merged parts take where there is no fused kernel for them."""
    torch.manual_seed(0)
    q, k, v = ((torch.randn(2, 4, 64, 32) * scale).to(torch.bfloat16) for scale in (3.0, 3.0, 1.0))
    wanted = kernel.attend(Part(q.double(), k.double(), v.double()), backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        under = kernel.attend(Part(q, k, v), backend="reference")
    assert torch.equal(under, kernel.attend(Part(q, k, v), backend="reference"))
    assert (under.double() - wanted).norm() < 1.8e-3 * wanted.norm()  # that of rounding the output alone


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("task", ["classification", "token_classification", "masked_lm", "causal_lm"])
def test_losses_are_those_of_float32_logits(tiny, task, half):
    """As in transformers: the logits are widened, then the loss is taken."""
    name = "gpt2" if task == "causal_lm" else "bert"
    model = larger(effzoo.build(name, task=task, num_labels=3, **tiny)).to(half).eval()
    batch = labelled()
    labels = (
        batch["labels"]
        if task == "classification"
        else batch["input_ids"] % (3 if task == "token_classification" else 53)
    )
    out = model(**(batch | {"labels": labels}))
    logits, wanted = out.logits.float(), labels
    if task == "causal_lm":
        logits, wanted = logits[:, :-1], labels[:, 1:]
    assert out.loss.dtype == torch.float32
    assert torch.equal(out.loss, F.cross_entropy(logits.flatten(0, -2), wanted.flatten()))


def test_fisher_information_is_summed_in_float32(tiny, monkeypatch):
    """Squares of small gradients, over many examples: in float16 they would all be 0, and the choice any."""
    from effzoo.peft.parameter import fish

    seen = []
    monkeypatch.setattr(fish, "top", lambda scores, k: seen.extend(scores) or torch.arange(k))
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = effzoo.build("bert", task="classification", num_labels=3, **tiny).to(torch.bfloat16).to(dtype)
        effzoo.attach(model, "fish[keep=0.1, samples=3]")
        effzoo.peft.calibrate(model, [labelled()])
    exact = torch.cat([x.flatten() for x in seen[: len(seen) // 2]])
    half = torch.cat([x.flatten() for x in seen[len(seen) // 2 :]])
    assert half.dtype == torch.float32 and (half - exact).norm() < 0.1 * exact.norm()
