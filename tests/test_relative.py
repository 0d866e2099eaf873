"""Relative positions: a bias of the scores by distance, on every kind that adds one, equal to the definition."""

import dataclasses
import math

import pytest
import torch

import effzoo
from effzoo.architectures.relative import RelativePositions
from effzoo.attention.core import Cache, Context, Mask
from effzoo.errors import IncompatibleError, OptionError
from effzoo.registry import attention as registry
from effzoo.spec import parse_one

KINDS = [
    "full", "longformer[window=6]", "longformer[window=4, dilation=(1, 3)]", "longformer[window=4, dilation=2]",
    "local[chunk=4]", "local[chunk=3, look_back=2]", "blockwise[blocks=3]", "streaming[window=5, sinks=2]",
    "streaming[window=3, sinks=0]",
]  # fmt: skip
SIZES = {"layers": 2, "dim": 16, "heads": 2, "head_dim": 8, "mlp": 24, "vocab": 37, "max_length": 64}
TRAINED = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "final_dropout": 0.0}


def core_of(kind, causal):
    return registry.create(parse_one(kind), Context(2, 4, causal=causal, max_length=40)).double()


def tensors(core, n, batch=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    given = [torch.randn(batch, 2, n, 4, generator=draw, dtype=torch.float64) for _ in core.projections]
    scores = torch.randn(2, 2 * n - 1, generator=draw, dtype=torch.float64)
    return [x.requires_grad_() for x in given], scores


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("marked", ["", "padding", "global"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_added_as_the_definition_says(kind, causal, marked, memory):
    """Outputs, and gradients of queries, keys, values and what is added; frozen, by the fused kernel too."""
    core, n = core_of(kind, causal), 37
    given, scores = tensors(core, n)
    scores.requires_grad_()
    valid = torch.arange(n) < torch.tensor([[n], [22]]) if marked else None
    is_global = None
    if marked == "global":
        if not core.knows_globals():
            return
        is_global = torch.zeros(2, n, dtype=torch.bool)
        is_global[0, [0, 9]] = is_global[1, 5] = True
    draw = torch.Generator().manual_seed(3)
    more = {}
    if memory:
        more["memory"] = tuple(torch.randn(2, 3, 4, generator=draw, dtype=torch.float64) for _ in range(2))

    def mask():
        return Mask(valid, is_global, scores=scores)

    seen = torch.ones(2, n, dtype=torch.bool) if valid is None else valid
    used = [x for x, name in zip(given, core.projections, strict=True) if is_global is not None or "global" not in name]
    found, expected = core(*given, mask=mask(), **more), core.dense(*given, mask=mask(), **more)
    weight = torch.randn(found.shape, generator=draw, dtype=torch.float64) * seen[:, None, :, None]
    torch.testing.assert_close(found * weight, expected * weight, rtol=0, atol=1e-10)
    for a, b in zip(
        *(torch.autograd.grad((x * weight).sum(), [*used, scores]) for x in (found, expected)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    scores = scores.detach()
    frozen = core(*given, mask=mask(), **more)
    torch.testing.assert_close(frozen * weight, expected * weight, rtol=0, atol=1e-10)
    grads = [torch.autograd.grad((x * weight).sum(), used) for x in (frozen, core.dense(*given, mask=mask(), **more))]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_buckets_are_those_of_the_paper(causal):
    """Written out one distance at a time; beyond the largest distance all are one bucket."""
    made = RelativePositions(2, 32, 128, causal=causal)
    n = 300
    found = made.bucket(torch.arange(1 - n, n))
    for distance, bucket in zip(range(1 - n, n), found.tolist(), strict=True):
        side = 32 if causal else 16
        first = 0 if causal or distance <= 0 else side
        d = max(-distance, 0) if causal else abs(distance)
        if d >= side // 2:
            d = min(
                side // 2 + int(math.log(d / (side // 2)) / math.log(128 / (side // 2)) * (side // 2) + 1e-6), side - 1
            )
        assert bucket == first + d, distance
    table = made(5)
    assert table.shape == (2, 9) and torch.equal(table[:, 4], made.table.weight[0])


@pytest.mark.parametrize("kind", ["full", "longformer[window=64]", "local[chunk=64]"])
def test_a_wide_window_computes_what_full_attention_does(kind):
    torch.manual_seed(0)
    model = effzoo.build("t5", task="seq2seq_lm", **SIZES | TRAINED).double().eval()
    ids, labels = torch.randint(2, 37, (2, 19)), torch.randint(2, 37, (2, 7))
    mask = (torch.arange(19) < torch.tensor([[19], [11]])).long()
    before = model(ids, mask, labels=labels)
    effzoo.swap_attention(model, kind, decoder_attention=kind)
    after = model(ids, mask, labels=labels)
    torch.testing.assert_close(after.logits, before.logits, rtol=0, atol=1e-10)
    tables = [model.encoder.relative.table.weight, model.decoder.relative.table.weight]
    assert all(bool(x.any()) for x in torch.autograd.grad(after.loss, tables))


@pytest.mark.parametrize("kind", ["full", "longformer[window=4]", "local[chunk=4]", "streaming[window=4, sinks=2]"])
def test_a_decoder_writes_the_same_in_steps(kind):
    torch.manual_seed(1)
    model = effzoo.build("t5", task="seq2seq_lm", decoder_attention=kind, **SIZES | TRAINED).double().eval()
    ids, target = torch.randint(2, 37, (2, 9)), torch.randint(2, 37, (2, 13))
    with torch.no_grad():
        whole, cache = model(ids, decoder_input_ids=target), Cache()
        states = whole.encoder_last_hidden_state
        parts = [
            model(None, None, x, encoder_outputs=states, cache=cache).logits for x in target.split([3, 1, 1, 6, 2], 1)
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["lsh", "linformer", "perceiver", "bigbird", "dilated"])
def test_kinds_without_distances_are_refused(kind):
    with pytest.raises(IncompatibleError, match=f"attention '{kind}' (adds no bias by distance|has one projection)"):
        effzoo.build("t5", attention=kind, **SIZES)


def test_backends_that_would_lose_it_are_refused():
    core = core_of("full", causal=False)
    given, scores = tensors(core, 9)
    for backend, told in (("flash", "what is added to the scores learns"), ("flex", "without what relative positions")):
        core.context = dataclasses.replace(core.context, backend=backend)
        with pytest.raises((OptionError, IncompatibleError), match=told):
            core(*given, mask=Mask(scores=scores.clone().requires_grad_()))


def test_fields_of_relative_positions_are_checked():
    for sizes, told in (
        ({"relative_buckets": 6}, "a multiple of 4"), ({"relative_distance": 16}, "above relative_buckets / 2"),
        ({"positions": "learned", "relative_buckets": 8}, "are for positions='relative'"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=told):
            effzoo.build("t5", **SIZES | sizes)


@pytest.mark.parametrize("attention", ["full", "longformer[window=8]"])
@pytest.mark.parametrize("level", ["nothing", "hidden", "blocks"])
def test_an_adapter_trains_on_t5(attention, level, tmp_path):
    torch.manual_seed(2)
    model = effzoo.build("t5", attention=attention, peft="lora", task="seq2seq_lm", **SIZES | TRAINED).train()
    model.recompute = level
    given = {"input_ids": torch.randint(2, 37, (2, 19)), "labels": torch.randint(2, 37, (2, 7))}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(model(**given).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] and model.encoder.relative.table.weight.grad is None
