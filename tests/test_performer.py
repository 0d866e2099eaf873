"""Performer attention: the estimate of the softmax kernel is unbiased with the variance of the paper, orthogonal rows
have less of it, and the output tends to full attention as 1 / sqrt(features)."""

import copy
import math

import pytest
import torch

import effzoo
from effzoo.attention import Context, Mask
from effzoo.attention.performer import random_rows
from effzoo.errors import OptionError


def draw(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def core(spec="performer[features=6]", causal=False, heads=2, head_dim=4, **context):
    return effzoo.attention.create(spec, Context(heads, head_dim, causal=causal, **context)).double()


def gradients(out, leaves, direction):
    return torch.autograd.grad(out, leaves, direction, retain_graph=True)


def assert_same(out, expected, leaves, tolerance=1e-10):
    assert out.shape == expected.shape and out.isfinite().all() and (out - expected).abs().max() < tolerance
    direction = draw(17, *out.shape).detach()
    for found, wanted in zip(gradients(out, leaves, direction), gradients(expected, leaves, direction), strict=True):
        assert found.isfinite().all() and (found - wanted).abs().max() < tolerance


def written_out(made, q, k, v, valid=None):
    """Equation 4 with phi of Lemma 1 written out, every pair by itself: h(x) = exp(-|x|^2 / 2), f = exp."""
    d, m = q.shape[-1], made.W.shape[1]
    phi_q, phi_k = (
        ((x / d**0.25) @ made.W.mT).exp() * (-(x / d**0.25).square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(m)
        for x in (q, k)
    )
    pairs = torch.einsum("bhif,bhjf->bhij", phi_q, phi_k)
    if made.context.causal:
        pairs = pairs.tril()
    if valid is not None:
        pairs = pairs * valid[:, None, None, :]
    total = pairs.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, pairs @ v / torch.where(total > 0, total, 1.0), 0.0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 7, 64, 133])
@pytest.mark.parametrize("kept", [0.5, 1.0])
def test_equals_the_papers_estimate_forward_and_backward(causal, n, kept):
    made, leaves = core(causal=causal), [draw(seed, 2, 2, n, 4) for seed in range(3)]
    valid = None if kept == 1 else torch.rand(2, n, generator=torch.Generator().manual_seed(n)) < kept
    expected = written_out(made, *leaves, valid)
    assert_same(made(*leaves, mask=Mask(valid)), expected, leaves)
    assert_same(made.dense(*leaves, mask=Mask(valid)), expected, leaves)


def estimates(features, orthogonal, heads, d=6):
    """phi(q) . phi(k) for one q and k, with another W in each of so many heads; q and k scaled by d^(1/4)."""
    made = core(f"performer[features={features}, orthogonal={orthogonal}]".replace("T", "t").replace("F", "f"),
                heads=heads, head_dim=d)  # fmt: skip
    q, k = draw(1, 1, 1, 1, d).detach() * 0.7, draw(2, 1, 1, 1, d).detach() * 0.7
    each = (made.log_phi(q) + made.log_phi(k)).exp().sum(dim=-1).flatten()
    return each, q.flatten() / d**0.25, k.flatten() / d**0.25


@pytest.mark.parametrize("orthogonal", [False, True])
def test_the_estimate_of_the_kernel_is_unbiased(orthogonal):
    """The mean over 20,000 draws is exp(q . k / sqrt(d)) within 4 standard errors, and these are below 1 %."""
    each, q, k = estimates(8, orthogonal, 20000)
    error = float(each.std() / len(each) ** 0.5)
    truth = float((q @ k).exp())
    assert error < 0.01 * truth and abs(float(each.mean()) - truth) < 4 * error


def test_its_variance_is_that_of_the_paper_and_less_with_orthogonal_rows():
    """Lemma 2: exp(|q + k|^2) exp(q . k)^2 (1 - exp(-|q + k|^2)) / m with independent rows; Theorem 2: less with
    orthogonal ones, here by more than 4 standard errors of the difference."""
    m, squares = 6, {}
    for orthogonal in (False, True):
        each, q, k = estimates(m, orthogonal, 40000)
        squares[orthogonal] = (each - (q @ k).exp()).square()
    z = (q + k).square().sum()
    wanted = float(z.exp() * (2 * q @ k).exp() * (1 - (-z).exp()) / m)
    found, error = (float(x) for x in (squares[False].mean(), squares[False].std() / 200))
    assert abs(found - wanted) < 4 * error and error < 0.1 * wanted
    gain = squares[False].mean() - squares[True].mean()
    assert gain > 4 * (squares[False].var() / 40000 + squares[True].var() / 40000).sqrt()


@pytest.mark.parametrize("causal", [False, True])
def test_the_output_tends_to_full_attention_as_the_root_of_the_number_of_features(causal):
    """Four times the features have a quarter of the mean squared error, within 4 standard errors of the logarithm of
    their ratio over 400 draws, which are below log 2; for keys and queries whose pairs have |q' + k'| below 1."""
    heads, n, d = 400, 6, 4
    q, k, v = (draw(seed, 1, 1, n, d).detach().expand(-1, heads, -1, -1) for seed in range(3))
    q, k = q / 4, k / 4
    full = effzoo.attention.create("full", Context(heads, d, causal=causal))(q, k, v, mask=Mask())
    logs, spreads = [], []
    for m in (64, 256, 1024):
        out = core(f"performer[features={m}]", causal, heads, d)(q, k, v, mask=Mask())
        error = (out - full).square().mean(dim=(2, 3)).flatten()
        logs.append(float(error.mean().log()))
        spreads.append(float(error.std() / error.mean()) / heads**0.5)
    for i in (0, 1):
        spread = 4 * math.hypot(spreads[i], spreads[i + 1])
        assert abs(logs[i] - logs[i + 1] - math.log(4)) < spread < math.log(2)
    assert math.exp(logs[-1]) < 1e-3 * float(full.square().mean())


def test_rows_of_a_group_are_orthogonal_and_each_is_normal():
    rows = random_rows(2000, 7, 3, True, torch.Generator().manual_seed(0)).double()
    first, last = rows[:, :3], rows[:, 6:]
    products = first @ first.mT
    assert (products - products.diagonal(dim1=1, dim2=2).diag_embed()).abs().max() < 0.01  # of the grid of 2^-12
    assert last.shape == (2000, 1, 3)
    moments = rows.flatten(0, 1)
    count = len(moments)
    assert (moments.mean(dim=0).abs() < 4 / count**0.5).all()
    assert ((moments.mT @ moments / count - torch.eye(3)).abs() < 4 * 2**0.5 / count**0.5).all()
    assert abs(float((moments**4).mean()) - 3) < 4 * (96 / (3 * count)) ** 0.5  # E x^4 = 3, its variance is 105 - 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 12.0])
@pytest.mark.parametrize("causal", [False, True])
def test_other_dtypes_stay_near_float64_where_features_themselves_are_0(causal, size, dtype):
    """With keys of norm 36 every feature is far below e^-103, which float32 does not hold; their ratios it does."""
    q, k, v = (draw(seed, 2, 2, 40, 4).detach() for seed in range(3))
    q, k = (size * x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    q, k, v = (x.to(dtype) for x in (q, 3 * k, v))
    made = core(causal=causal)
    out = copy.deepcopy(made).float()(q, k, v, mask=Mask())
    assert size < 10 or float(made.log_phi(k.double()).max()) < -103
    expected = made(q.double(), k.double(), v.double(), mask=Mask())
    assert out.dtype == dtype and (out.double() - expected).abs().max() < 4 * torch.finfo(dtype).eps + 1e-5 * size


def test_decoding_keeps_sums_of_fixed_size():
    made, leaves = core(causal=True), [draw(seed, 2, 2, 90, 4) for seed in range(3)]
    state, found = None, []
    for first, end in ((0, 70), (70, 71), (71, 72), (72, 90)):
        out, state = made.step(*(x[:, :, first:end] for x in leaves), mask=Mask(), past=state)
        assert {name: tuple(x.shape) for name, x in state.items()} == {"top": (2, 2, 6, 1), "total": (2, 2, 6, 5)}
        found.append(out)
    assert_same(torch.cat(found, dim=2), written_out(made, *leaves), leaves)


def test_the_seed_says_the_features_and_another_draw_is_kept_by_a_folder(tiny, tmp_path):
    state = torch.get_rng_state()
    cores = [core(layer=layer) for layer in (0, 0, 1)] + [core("performer[features=6, seed=5]")]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(cores[0].W, cores[1].W) and not cores[0].W[0].equal(cores[0].W[1])
    assert not any(torch.equal(cores[0].W, other.W) for other in cores[2:])
    cores[0].resample(5)
    assert torch.equal(cores[0].W, cores[3].W)
    model = effzoo.build("bert", attention="performer[features=6]", **tiny).eval()
    for each in model.cores():
        each.resample(7)
    effzoo.save(model, tmp_path)
    again, ids = effzoo.load(tmp_path), torch.randint(53, (2, 9))
    assert torch.equal(again(ids).last_hidden_state, model(ids).last_hidden_state)
    with pytest.raises(OptionError, match="performer: seed is 0 or more, got -1"):
        cores[0].resample(-1)


def test_a_wide_spread_of_draws_is_the_mean_of_full_attention_in_a_pretrained_shape(tiny):
    """Swapped into a model with small weights, 2,048 features give the outputs of full attention to 2 %."""
    model = effzoo.build("bert", **tiny).eval()
    ids = torch.randint(53, (2, 30))
    with torch.no_grad():
        before = model(ids).last_hidden_state
        effzoo.swap_attention(model, "performer[features=2048]")
        assert (model(ids).last_hidden_state - before).norm() < 0.02 * before.norm()
