"""The one softmax: parts merged equal concatenated keys, forward and backward, on every backend."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from effzoo.attention.kernel import attend, choose, merge
from effzoo.attention.part import Part, bias_of
from effzoo.errors import OptionError
from tests.doubles import on


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def concatenated(q, keys, values, biases):
    """softmax over all keys at once, rows without keys 0."""
    scores = torch.cat(
        [q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + b for k, b in zip(keys, biases, strict=True)], dim=-1
    )
    some = (scores > -math.inf).any(-1, keepdim=True)
    return scores.masked_fill(~some, 0).softmax(-1).masked_fill(~some, 0) @ torch.cat(values, dim=-2)


@pytest.mark.parametrize("backend", ["reference", "flash", "efficient"])
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 9),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    keep=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_parts_equal_concatenated_keys(backend, seed, rows, sizes, keep):
    q = draw(seed, 2, 3, rows, 4)
    keys = [draw(seed + 1 + i, 2, 3, s, 4) for i, s in enumerate(sizes)]
    values = [draw(seed + 101 + i, 2, 3, s, 4) for i, s in enumerate(sizes)]
    generator = torch.Generator().manual_seed(seed)
    biases = [bias_of(torch.rand(2, 1, rows, s, generator=generator) < keep, torch.float64) for s in sizes]
    expected = concatenated(q, keys, values, biases)
    with on(backend) as name:
        out = attend(*(Part(q, k, v, b) for k, v, b in zip(keys, values, biases, strict=True)), backend=name)
        assert out.isfinite().all() and torch.allclose(out, expected, rtol=0, atol=1e-12)
        direction = draw(seed + 7, *out.shape).detach()
        leaves = [q, *keys, *values]
        for got, want in zip(
            torch.autograd.grad(out, leaves, direction), torch.autograd.grad(expected, leaves, direction), strict=True
        ):
            assert torch.allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "flash", "efficient"])
@pytest.mark.parametrize("padded", [False, True])
def test_causal_part_with_left_padding_and_memory(backend, padded):
    n = 7
    q, k, v, mk = draw(0, 2, 2, n, 4), draw(1, 2, 2, n, 4), draw(2, 2, 2, n, 4), draw(3, 2, 2, 3, 4)
    mv = draw(4, 2, 2, 3, 4)
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[1, :3] = not padded
    bias = bias_of(valid[:, None, None, :], torch.float64) if padded else None
    triangle = bias_of(torch.ones(n, n, dtype=torch.bool).tril() & valid[:, None, None, :], torch.float64)
    for parts, expected in [
        ([Part(q, k, v, bias, causal=True)], concatenated(q, [k], [v], [triangle])),
        (
            [Part(q, k, v, bias, causal=True), Part(q, mk, mv)],
            concatenated(q, [k, mk], [v, mv], [triangle, torch.zeros(1, 1, n, 3)]),
        ),
    ]:
        with on(backend) as name:
            out = attend(*parts, backend=name)
            assert torch.allclose(out, expected, rtol=0, atol=1e-12)
            got, want = (torch.autograd.grad(x.square().sum(), [q, k, v]) for x in (out, expected))
        assert all(torch.allclose(g, w, rtol=0, atol=1e-12) for g, w in zip(got, want, strict=True))


def test_merging_is_associative_and_an_empty_part_is_neutral():
    outs = [draw(i, 2, 5, 3).detach() for i in range(3)]
    lses = [draw(9 + i, 2, 5, 1).detach() for i in range(3)]
    a, b, c = zip(outs, lses, strict=True)
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    assert all(torch.allclose(x, y, atol=1e-14) for x, y in zip(left, right, strict=True))
    empty = (torch.zeros(2, 5, 3, dtype=torch.float64), torch.full((2, 5, 1), -math.inf, dtype=torch.float64))
    assert all(torch.allclose(x, y, atol=1e-14) for x, y in zip(merge(a, empty), a, strict=True))
    out, lse = merge(empty, empty)
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_low_precision_agrees_with_float64_to_its_rounding(dtype, tolerance):
    exact = [draw(i, 2, 2, 33, 8).detach() for i in range(5)]
    rounded = [x.to(dtype) for x in exact]
    expected = attend(Part(*exact[:3]), Part(exact[0], *exact[3:]))
    for backend in ("reference", "flash"):
        out = attend(Part(*rounded[:3]), Part(rounded[0], *rounded[3:]), backend=backend)
        assert out.dtype == dtype and (out.double() - expected).abs().max() < tolerance * expected.abs().max()


def test_dropout_drops_weights_of_the_union_and_keeps_the_mean():
    q, k, v = (draw(i, 1, 1, 4, 8).detach() for i in range(3))
    plain = attend(Part(q, k, v), Part(q, k, v))
    torch.manual_seed(0)
    many = torch.stack([attend(Part(q, k, v), Part(q, k, v), dropout=0.3) for _ in range(4000)])
    assert not torch.equal(many[0], many[1])
    error = (many.mean(0) - plain).abs().max() / (many.std(0).max() / math.sqrt(len(many)))
    assert error < 5  # standard errors


def test_the_choice_of_a_backend_is_explained():
    q = draw(0, 1, 1, 3, 4)
    assert choose((Part(q, q, q),), 0.0) == ("flash", "fused flash attention on cpu")
    name, reason = choose((Part(q, q, q),), 0.1)
    assert name == "blocks" and "attention_dropout=0" in reason
    with pytest.raises(OptionError, match="'flash' cannot run here: attention dropout"):
        choose((Part(q, q, q),), 0.1, "flash")
    with pytest.raises(OptionError, match="'flash3' is not one of auto, reference, flash"):
        attend(Part(q, q, q), backend="flash3")
    with pytest.raises(OptionError, match="'sdpa' is not one of auto, reference, flash"):
        attend(Part(q, q, q), backend="sdpa")
    with pytest.raises(
        OptionError,
        match="'efficient' cannot run here: it runs on cuda, the tensors are on cpu; use "
        "backend='auto', which is 'flash' here",
    ):
        attend(Part(q, q, q), backend="efficient")


def test_torch_sdpa_agrees_on_one_masked_part():
    q, k, v = (draw(i, 2, 3, 11, 8) for i in range(3))
    allowed = torch.rand(2, 1, 11, 11, generator=torch.Generator().manual_seed(5)) < 0.5
    allowed |= torch.eye(11, dtype=torch.bool)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    assert torch.allclose(attend(Part(q, k, v, bias_of(allowed, torch.float64))), expected, rtol=0, atol=1e-12)
