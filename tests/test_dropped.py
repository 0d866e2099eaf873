"""Attention with dropped weights, a block at a time: the plain twin where nothing is dropped, exact derivatives and the
right mean where it is."""

import math

import pytest
import torch

import effzoo
from effzoo.attention import Context, Mask, dropped
from effzoo.attention.dropped import Weights
from effzoo.attention.kernel import attend
from effzoo.attention.part import Part, bias_of

EXACT = {"rtol": 0, "atol": 1e-12}


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def parts(count, bias=True, causal=False):
    """Two examples, three heads, 17 queries; 23 keys in the first part and 4 in the second; values narrower than keys;
    a row without keys."""
    leaves = [drawn(2, 3, 17, 8), drawn(2, 3, 23, 8), drawn(2, 3, 23, 5), drawn(2, 3, 4, 8), drawn(2, 3, 4, 5)]
    allowed = torch.rand(2, 1, 17, 23) < 0.6
    allowed[0, 0, 3] = False
    masked = bias_of(allowed, torch.float64) if bias else None

    def made(q, k, v, other_k, other_v):
        return (Part(q, k, v, masked, causal=causal), Part(q, other_k, other_v))[:count]

    return leaves[: 3 if count == 1 else 5], lambda *given: made(*given, *leaves[len(given) :])


@pytest.mark.parametrize("block", [7, 60, 2**19])
@pytest.mark.parametrize(
    ("count", "bias", "causal"), [(1, True, False), (2, True, False), (1, False, True), (2, False, False)]
)
def test_without_dropout_it_is_the_plain_twin(monkeypatch, block, count, bias, causal):
    monkeypatch.setattr(dropped, "BLOCK", block)
    leaves, made = parts(count, bias, causal)
    out, expected = (attend(*made(*leaves), backend=backend) for backend in ("blocks", "reference"))
    assert torch.allclose(out, expected, **EXACT)
    direction = torch.randn_like(out)
    for mine, theirs in zip(
        torch.autograd.grad(out, leaves, direction), torch.autograd.grad(expected, leaves, direction), strict=True
    ):
        assert torch.allclose(mine, theirs, **EXACT)


@pytest.mark.parametrize("block", [60, 2**19])
@pytest.mark.parametrize("count", [1, 2])
def test_the_backward_pass_draws_the_same_mask_again(monkeypatch, block, count):
    monkeypatch.setattr(dropped, "BLOCK", block)
    leaves, made = parts(count)

    def run(*given):
        torch.manual_seed(3)
        return attend(*made(*given), dropout=0.3)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_which_weights_are_dropped_and_what_the_others_are():
    """With the identity as values, the output is the matrix of weights."""
    torch.manual_seed(0)
    n, q = 64, torch.randn(40, 2, 64, 8, dtype=torch.float64)
    values = torch.eye(n, dtype=torch.float64).expand(40, 2, n, n)
    whole = attend(Part(q, q, values), backend="reference")
    weights = attend(Part(q, q, values), dropout=0.25)
    kept = weights != 0
    assert torch.allclose(weights[kept], whole[kept] / 0.75, **EXACT)  # 3 / 4 is a whole number of steps
    count = kept.numel()
    assert abs(float(kept.double().mean()) - 0.75) < 5 * math.sqrt(0.75 * 0.25 / count)
    for axis in (0, 1, 2, 3):  # no axis is special: each slice keeps its share, and neighbours are independent
        others = [i for i in range(4) if i != axis]
        share = kept.double().mean(dim=others)
        assert float((share - 0.75).abs().max()) < 6 * math.sqrt(0.75 * 0.25 * kept.shape[axis] / count)
    pairs = (kept[..., 1:] & kept[..., :-1]).double().mean()
    assert abs(float(pairs) - 0.75**2) < 5 * math.sqrt(0.25 / count)
    assert not torch.equal(attend(Part(q, q, values), dropout=0.25) != 0, kept)


@pytest.mark.parametrize("dropout", [1e-9, 0.1, 0.5, 0.999999])
def test_the_probability_is_rounded_to_steps_and_the_mean_is_kept(dropout):
    weights = Weights(dropout, 0, 1.0)
    assert abs(weights.kept - (1 - dropout)) <= 1 / dropped.STEPS and weights.kept > 0
    masks = [mask for _, _, mask in weights._blocks(torch.empty(64, 1, 128, 1), torch.empty(64, 1, 128, 1), 0)]
    share = float(torch.cat([mask.flatten() for mask in masks]).double().mean())
    assert abs(share - weights.kept) <= 5 * math.sqrt(weights.kept * (1 - weights.kept) / 2**20)


def test_nothing_as_large_as_the_weights_is_kept():
    layer = effzoo.attention.create("full", Context(heads=2, head_dim=8, dropout=0.1)).train()
    q, k, v = (torch.randn(1, 2, 300, 8, requires_grad=True) for _ in range(3))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        out = layer(q, k, v, mask=Mask())
    assert out.requires_grad and max(sizes) == q.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_and_single_precision_are_near_double(dtype):
    leaves, made = parts(2)
    found = []
    for kind in (torch.float64, dtype):
        given = [leaf.detach().to(kind).requires_grad_() for leaf in leaves]
        torch.manual_seed(1)
        whole = made(*given)
        whole = (Part(whole[0].q, whole[0].k, whole[0].v, whole[0].bias.to(kind)), whole[1])
        out = attend(*whole, dropout=0.2)
        assert out.dtype == kind
        found.append([out, *torch.autograd.grad(out, given, torch.ones_like(out))])
    tolerance = 1e-5 if dtype == torch.float32 else 6e-2
    for exact, near in zip(*found, strict=True):
        assert torch.allclose(near.double(), exact, rtol=tolerance, atol=tolerance)
