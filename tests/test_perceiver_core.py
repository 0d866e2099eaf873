"""The latent core: its dense definition, latents that copy the keys, permuted keys, latents as a place for
fine-tuning."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effzoo
from effzoo.attention import Context, Mask
from effzoo.attention.dropped import Weights
from effzoo.blocks import Attention
from effzoo.errors import IncompatibleError, OptionError
from effzoo.sites import Activity, Roster, sites
from effzoo.spec import parse_one
from tests.doubles import on


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


def core(latents=5, heads=2, head_dim=4, **context):
    made = effzoo.attention.create(f"perceiver[latents={latents}]", Context(heads, head_dim, **context)).double()
    made.latents.weight.data.copy_(draw(99, latents, heads * head_dim))
    return made


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.sampled_from([0, 3]),
    st.sampled_from(["auto", "reference", "efficient"]), st.sampled_from([4, 7]), st.integers(0, 999),
)  # fmt: skip
def test_equals_its_dense_definition_also_across_two_sequences(
    latents, batch, n, source, kept, rows, backend, width, seed
):
    with on(backend) as name:
        made = core(latents, backend=name)
        leaves = [
            draw(seed, batch, 2, n, 4),
            draw(seed + 1, batch, 2, source, 4),
            draw(seed + 2, batch, 2, source, width),
        ]
        memory = (draw(3, 2, rows, 4), draw(4, 2, rows, width)) if rows else None
        valid = torch.rand(batch, source, generator=torch.Generator().manual_seed(seed)) < kept
        out, expected = (f(*leaves, mask=Mask(None if kept == 1 else valid), memory=memory) for f in (made, made.dense))
        assert_same(out, expected, [*leaves, *made.parameters(), *(memory or ())])
        if not rows and kept < 1:
            assert (out[~valid.any(dim=1)] == 0).all()


def test_the_definition_by_hand():
    """One latent of zeros keeps the mean of keys and of values, and every query returns the mean value."""
    made, (q, k, v) = core(1), [draw(i, 2, 2, 7, 4) for i in range(3)]
    made.latents.weight.data.zero_()
    assert torch.allclose(made(q, k, v, mask=Mask()), v.mean(dim=2, keepdim=True).expand_as(v), rtol=0, atol=1e-12)
    valid = torch.arange(7) < torch.tensor([3, 7])[:, None]
    assert torch.allclose(
        made(q, k, v, mask=Mask(valid))[0], v[0, :, :3].mean(dim=1, keepdim=True).expand_as(v[0]), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_latents_that_copy_the_keys_are_full_attention(n):
    """The anchor: keys orthonormal in each head, latent i a large multiple of key i, so that row i of the summary is
    key i and value i."""
    made = core(n, heads=3, head_dim=8)
    keys = torch.linalg.qr(draw(1, 3, 8, 8)).Q[:, :n].detach().contiguous()
    made.latents.weight.data.copy_((200 * keys).transpose(0, 1).flatten(1))
    q, v, k = draw(0, 2, 3, 11, 8), draw(2, 2, 3, n, 8), keys.expand(2, -1, -1, -1)
    full = effzoo.attention.create("full", Context(3, 8))
    assert_same(made(q, k, v, mask=Mask()), full(q, k, v, mask=Mask()), [q, v])


def test_the_order_of_the_keys_does_not_matter():
    made, (q, k, v) = core(), [draw(i, 2, 2, 13, 4) for i in range(3)]
    order = torch.randperm(13)
    valid = torch.arange(13) < torch.tensor([13, 6])[:, None]
    out = made(q, k, v, mask=Mask(valid))
    assert (made(q, k[:, :, order], v[:, :, order], mask=Mask(valid[:, order])) - out).abs().max() < 1e-12
    assert (made(q, k, v[:, :, order], mask=Mask(valid)) - out).abs().max() > 1e-3


def test_the_latents_start_apart_from_each_other_in_a_model(tiny):
    """Unit scale, not the 0.02 of the model's other tables, with which all latents would read the same mean."""
    tiny["attention"] = "perceiver[latents=64]"
    model = effzoo.build("bert", **tiny)
    tables = [site for _, site in sites(model) if site.role == "attn.latents"]
    assert [table.layer for table in tables] == [0, 1] and all(table.weight.shape == (64, 16) for table in tables)
    for table in tables:
        assert 0.9 < table.weight.std() < 1.1 and table.weight.mean().abs() < 0.15
    assert model.embeddings.token.weight.std() < 0.03


def test_latents_are_a_place_where_methods_hang():
    made = Attention(12, parse_one("perceiver[latents=5]"), Context(3, 4)).double().eval()
    roles = {site.role: site for _, site in sites(made)}
    assert roles["attn.latents"].layer == 0
    x = draw(0, 2, 7, 12)
    before = made(x, Mask())
    module = effzoo.sites.PeftModule()
    module.weight = lambda weight: weight + 1
    made.core.latents.hang("mine", "shift", module)
    made.core.latents.roster = Roster(Activity(("mine",), (1.0,)))
    changed = made(x, Mask())
    assert (changed - before).abs().max() > 1e-3
    made.core.latents.roster = None
    made.core.latents.weight.data += 1
    assert torch.allclose(made(x, Mask()), changed, rtol=0, atol=1e-12)


def test_causal_is_refused_with_the_reason_and_no_latents_too():
    with pytest.raises(
        IncompatibleError,
        match="'perceiver' cannot be causal: its latents summarise past and future together; use it in an encoder",
    ):
        effzoo.build("gpt2", attention="perceiver", dim=16, layers=1, heads=2, mlp=16, vocab=20)
    with pytest.raises(OptionError, match="latents is at least 1, got 0"):
        effzoo.attention.create("perceiver[latents=0]", Context(2, 4))


@pytest.mark.parametrize("padded", [False, True])
def test_it_compiles_whole(padded):
    made, leaves = core(), [draw(i, 2, 2, 11, 4) for i in range(3)]
    valid = torch.arange(11) < torch.tensor([11, 6])[:, None] if padded else None
    compiled = torch.compile(lambda *x: made(*x, mask=Mask(valid)), fullgraph=True, backend="aot_eager")
    assert_same(compiled(*leaves), made(*leaves, mask=Mask(valid)), [*leaves, *made.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_stay_near_float64(dtype):
    tensors, made = [draw(i, 2, 2, 17, 4).detach() for i in range(3)], core()
    expected = made(*tensors, mask=Mask())
    out = made.to(dtype)(*(x.to(dtype) for x in tensors), mask=Mask())
    assert out.dtype == dtype and (out.double() - expected).abs().max() < 20 * torch.finfo(dtype).eps


def test_dropout_acts_on_both_softmaxes_in_training_only(monkeypatch):
    tensors, plain, dropping = [draw(i, 2, 2, 11, 4).detach() for i in range(3)], core(), core(dropout=0.5)
    assert torch.allclose(dropping.eval()(*tensors, mask=Mask()), plain(*tensors, mask=Mask()), rtol=0, atol=1e-12)
    seen = []
    original = Weights.forward
    monkeypatch.setattr(
        Weights,
        "forward",
        lambda self, tile, index: (
            seen.append((*tile.q.shape[:3], tile.k.shape[2], self.dropout)) or original(self, tile, index)
        ),
    )
    dropping.train()(*tensors, mask=Mask())
    assert seen == [(2, 2, 5, 11, 0.5), (2, 2, 11, 5, 0.5)]
