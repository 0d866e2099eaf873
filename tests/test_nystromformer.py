"""Nystrom attention: the three matrices written out segment by segment, the layer of transformers, full attention where
every token is a landmark, and the convolution."""

import copy
import math

import pytest
import torch
from transformers import NystromformerConfig
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

import effzoo
from effzoo.attention import Context, Mask
from effzoo.errors import IncompatibleError, OptionError
from effzoo.sites import sites


def draw(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(out, leaves, direction):
    found = torch.autograd.grad(out, leaves, direction, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


def assert_same(out, expected, leaves, tolerance=1e-10):
    assert out.shape == expected.shape and out.isfinite().all() and (out - expected).abs().max() < tolerance
    direction = draw(17, *out.shape).detach()
    for found, wanted in zip(gradients(out, leaves, direction), gradients(expected, leaves, direction), strict=True):
        assert found.isfinite().all() and (found - wanted).abs().max() < tolerance


def core(spec="nystromformer[landmarks=4]", heads=2, head_dim=4, **context):
    made = effzoo.attention.create(spec, Context(heads, head_dim, **context)).double()
    for parameter in made.parameters():
        parameter.data = draw(99, *parameter.shape).detach()
    return made


def of_one(q, k, v, m, iterations, kernel=None):
    """One head of one example without padding, token by token and step by step."""
    n, d = q.shape
    used = min(m, n)
    places = [[i for i in range(n) if i * used // n == segment] for segment in range(used)]
    assert max(map(len, places)) - min(map(len, places)) <= 1
    landmarks = [torch.stack([x[inside].mean(dim=0) for inside in places]) for x in (q, k)]
    first = (q @ landmarks[1].T / math.sqrt(d)).softmax(-1)
    A = (landmarks[0] @ landmarks[1].T / math.sqrt(d)).softmax(-1)
    last = (landmarks[0] @ k.T / math.sqrt(d)).softmax(-1)
    one = torch.eye(used, dtype=q.dtype)
    Z = A.T / (A.abs().sum(dim=0).max() * A.abs().sum(dim=1).max())
    for _ in range(iterations):
        Z = 0.25 * Z @ (13 * one - A @ Z @ (15 * one - A @ Z @ (7 * one - A @ Z)))
    out = first @ Z @ last @ v
    if kernel is not None:
        half = len(kernel) // 2
        rows = [sum(kernel[t] * v[i + t - half] for t in range(len(kernel)) if 0 <= i + t - half < n) for i in range(n)]
        out = out + torch.stack(rows)
    return out


@pytest.mark.parametrize("conv", ["none", 3])
@pytest.mark.parametrize(("n", "m"), [(1, 4), (3, 4), (4, 4), (8, 4), (11, 4), (13, 1)])
def test_equals_the_papers_equations_head_by_head_forward_and_backward(n, m, conv):
    made = core(f"nystromformer[landmarks={m}, conv={conv}, iterations=5]")
    leaves = [draw(seed, 2, 2, n, 4) for seed in range(3)]
    kernels = [None, None] if made.conv is None else made.conv.weight
    expected = torch.stack(
        [torch.stack([of_one(*(x[b, h] for x in leaves), m, 5, kernels[h]) for h in range(2)]) for b in range(2)]
    )
    for compute in (made, made.dense):
        assert_same(compute(*leaves, mask=Mask()), expected, [*leaves, *made.parameters()])


@pytest.mark.parametrize("conv", ["none", 5])
def test_padding_at_any_place_is_in_no_segment(conv):
    """An example with holes gives at its tokens what the tokens alone give; its convolution has zeros in the holes."""
    made, n = core(f"nystromformer[landmarks=4, conv={conv}]"), 12
    leaves = [draw(seed, 3, 2, n, 4) for seed in range(3)]
    valid = torch.arange(n) >= torch.tensor([0, 5, 10])[:, None]
    if conv == "none":
        valid[0, [2, 3, 8]] = False
    out = made(*leaves, mask=Mask(valid))
    for row in range(3):
        there = valid[row]
        alone = made(*(x[row : row + 1, :, there] for x in leaves), mask=Mask())
        assert_same(out[row : row + 1, :, there], alone, leaves)


def theirs(landmarks, conv, n=24, heads=3, d=4):
    config = NystromformerConfig(
        hidden_size=heads * d, num_attention_heads=heads, num_landmarks=landmarks, segment_means_seq_len=n,
        conv_kernel_size=conv or 1, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(1)
    made = NystromformerSelfAttention(config).double().eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    if conv is None:  # which theirs always has
        torch.nn.init.zeros_(made.conv.weight)
    return made


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("conv", [None, 5])
@pytest.mark.parametrize("landmarks", [1, 6, 8, 24])
def test_equals_the_layer_of_transformers_on_random_weights(landmarks, conv, padded):
    """With `hf`: padding in its segments, one factor for the batch. As many landmarks as positions is none of
    them."""
    other, x = theirs(landmarks, conv), draw(0, 2, 24, 12)
    spec = f"nystromformer[landmarks={landmarks if landmarks < 24 else 'none'}, conv={conv or 'none'}, hf=true]"
    made = core(spec, heads=3, head_dim=4)
    if conv:
        made.conv.weight.data = other.conv.weight.data[:, 0, :, 0]
    valid = torch.arange(24) < torch.tensor([24, 15])[:, None]
    bias = torch.zeros(2, 1, 1, 24).double().masked_fill(~valid[:, None, None], torch.finfo(torch.float64).min)
    expected = other(x, attention_mask=bias if padded else None)[0]
    projected = [linear(x).view(2, 24, 3, 4).transpose(1, 2) for linear in (other.query, other.key, other.value)]
    out = made(*projected, mask=Mask(valid if padded else None)).transpose(1, 2).flatten(2)
    assert_same(out, expected, [x])
    if conv:
        direction = draw(3, *out.shape).detach()
        (mine,), (wanted,) = (
            torch.autograd.grad(y, parameter, direction)
            for y, parameter in ((out, made.conv.weight), (expected, other.conv.weight))
        )
        assert (mine - wanted[:, 0, :, 0]).abs().max() < 1e-10


def test_z_is_the_inverse_and_with_every_token_a_landmark_the_output_that_of_full_attention():
    """Algorithm 1 converges; A is the whole softmax matrix, and S A^-1 S is S where A = S."""
    leaves = [draw(seed, 2, 2, 6, 4) for seed in range(3)]
    made = core("nystromformer[landmarks=6, iterations=30]")
    A = (leaves[0] @ leaves[1].mT / 2).softmax(-1)
    assert (made.inverse(A) @ A - torch.eye(6)).abs().max() < 1e-6
    full = effzoo.attention.create("full", Context(2, 4))(*leaves, mask=Mask())
    assert (made(*leaves, mask=Mask()) - full).abs().max() < 1e-6
    exact = core("nystromformer[landmarks=none]")
    assert_same(exact(*leaves, mask=Mask()), full, leaves)


def test_more_landmarks_are_nearer_to_full_attention_on_smooth_sequences():
    n, errors = 256, []
    q, k, v = (draw(seed, 1, 2, 8, 4).detach().repeat_interleave(32, dim=2) for seed in range(3))
    q, k = (x + 0.1 * draw(9 + i, 1, 2, n, 4).detach() for i, x in enumerate((q, k)))
    full = effzoo.attention.create("full", Context(2, 4))(q, k, v, mask=Mask())
    for m in (4, 8):
        errors.append(float((core(f"nystromformer[landmarks={m}]")(q, k, v, mask=Mask()) - full).norm() / full.norm()))
    assert errors[1] < 0.05 and errors[1] < 0.5 * errors[0]


def test_the_convolution_is_a_site_that_adapters_change(tiny):
    model = effzoo.build("bert", attention="nystromformer[landmarks=4, conv=3]", **tiny).double().eval()
    ids = torch.randint(53, (2, 20))
    before = model(ids).last_hidden_state
    effzoo.attach(model, "lora[rank=1, targets=attn.conv]")
    assert sum(site.role == "attn.conv" for _, site in sites(model)) == 2
    assert torch.allclose(model(ids).last_hidden_state, before, rtol=0, atol=1e-12)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.normal_()
    tuned = model(ids).last_hidden_state
    assert (tuned - before).abs().max() > 1e-3
    effzoo.merge(model)
    assert torch.allclose(model(ids).last_hidden_state, tuned, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_and_autocast_stay_near_float64(dtype):
    made, leaves = core("nystromformer[landmarks=4, conv=3]"), [draw(seed, 2, 2, 19, 4).detach() for seed in range(3)]
    leaves = [x.to(dtype) for x in leaves]
    expected = made(*(x.double() for x in leaves), mask=Mask())
    out = copy.deepcopy(made).to(dtype)(*leaves, mask=Mask())
    assert out.dtype == dtype and (out - expected).abs().max() < 100 * torch.finfo(dtype).eps * expected.abs().max()
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            out = copy.deepcopy(made).float()(*leaves, mask=Mask())
        assert (out - expected).abs().max() < 100 * torch.finfo(dtype).eps * expected.abs().max()


def test_what_cannot_be_is_refused_with_the_reason():
    with pytest.raises(OptionError, match="conv is odd, so that a token stands in the middle, got 4"):
        core("nystromformer[conv=4]")
    with pytest.raises(IncompatibleError, match="cannot be causal: its landmarks are means over past and future"):
        core(causal=True)
    with pytest.raises(IncompatibleError, match="attends within one sequence only"):
        effzoo.blocks.Attention(8, effzoo.spec.parse_one("nystromformer"), Context(2, 4), source_dim=8)
