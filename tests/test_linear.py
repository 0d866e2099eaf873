"""Linear attention: the paper's equations written out, the recurrence of decoding, sums in chunks and over long ranges
of size, half precision, and the words with which something else is refused."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import effzoo
from effzoo.attention import Cache, Context, Mask
from effzoo.attention.features import CHUNK, recurrence
from effzoo.errors import IncompatibleError, InputError, OptionError


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


def core(causal=False, heads=2, head_dim=4, **context):
    return effzoo.attention.create("linear", Context(heads, head_dim, causal=causal, **context)).double()


def written_out(q, k, v, causal, valid=None, memory=None):
    """Equation 4 with the similarity of equation 7, pair by pair; in a decoder over j <= i (equation 8)."""
    phi_q, phi_k = F.elu(q) + 1, F.elu(k) + 1
    similarity = phi_q @ phi_k.mT
    if causal:
        similarity = similarity.tril()
    if valid is not None:
        similarity = similarity * valid[:, None, None, :]
    if memory is not None:
        keys, values = (x.expand(len(q), *x.shape[-3:]) for x in memory)
        similarity = torch.cat([phi_q @ (F.elu(keys) + 1).mT, similarity], dim=-1)
        v = torch.cat([values, v], dim=2)
    total = similarity.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, similarity @ v / torch.where(total > 0, total, 1.0), 0.0)


@settings(max_examples=100, deadline=None)
@given(
    st.booleans(), st.integers(1, 3), st.integers(1, 20) | st.sampled_from([63, 64, 65, 130]), st.integers(1, 20),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.sampled_from([0, 3]), st.sampled_from([4, 7]), st.integers(0, 999),
)  # fmt: skip
def test_equals_the_papers_equations_forward_and_backward(causal, batch, n, source, kept, rows, width, seed):
    """Also across two sequences, with values of another width, padding at any place, and memory."""
    source = n if causal else source
    leaves = [draw(seed, batch, 2, n, 4), draw(seed + 1, batch, 2, source, 4), draw(seed + 2, batch, 2, source, width)]
    memory = (draw(3, 2, rows, 4), draw(4, 2, rows, width)) if rows else None
    valid = torch.rand(batch, source, generator=torch.Generator().manual_seed(seed)) < kept
    valid = None if kept == 1 else valid
    expected = written_out(*leaves, causal, valid, memory)
    made = core(causal)
    for compute in (made, made.dense):
        assert_same(compute(*leaves, mask=Mask(valid), memory=memory), expected, [*leaves, *(memory or ())])


@pytest.mark.parametrize("n", [1, 5, 140])
def test_decoding_is_the_recurrence_of_the_paper(n):
    """Equations 16 to 20: s_i = s_(i-1) + phi(x_i W_k) (x_i W_v)^T and z_i = z_(i-1) + phi(x_i W_k)."""
    made, leaves = core(causal=True), [draw(seed, 2, 2, n, 4) for seed in range(3)]
    S, z, rows, state, found = torch.zeros(2, 2, 4, 4).double(), torch.zeros(2, 2, 4).double(), [], None, []
    for i in range(n):
        q, k, v = (x[:, :, i] for x in leaves)
        phi_q, phi_k = F.elu(q) + 1, F.elu(k) + 1
        S, z = S + phi_k[..., None] * v[..., None, :], z + phi_k
        rows.append((phi_q[..., None, :] @ S)[..., 0, :] / (phi_q * z).sum(-1, keepdim=True))
        out, state = made.step(*(x[:, :, i : i + 1] for x in leaves), mask=Mask(), past=state)
        found.append(out)
        assert {name: tuple(x.shape) for name, x in state.items()} == {"top": (2, 2, 4, 1), "total": (2, 2, 4, 5)}
    expected = torch.stack(rows, dim=2)
    assert_same(torch.cat(found, dim=2), expected, leaves)
    assert_same(made(*leaves, mask=Mask()), expected, leaves)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 33])
def test_the_recurrence_by_pairs_is_that_step_by_step(n):
    decay, update = draw(0, 2, 1, n, 3, 1), draw(1, 2, 1, n, 3, 2)
    S, rows = update[:, :, 0], [update[:, :, 0]]
    for t in range(1, n):
        S = decay[:, :, t] * S + update[:, :, t]
        rows.append(S)
    assert_same(recurrence(decay, update), torch.stack(rows, dim=2), [decay, update])


@pytest.mark.parametrize(("causal", "size"), [(False, 1.0), (False, 300.0), (True, 1.0), (True, 20.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_stay_near_float64_whatever_the_size_of_keys_and_queries(causal, size, dtype):
    """phi of -300 is e^-300, which float32 does not hold; a ratio of sums of such numbers is what is wanted."""
    made, leaves = core(causal), [draw(seed, 2, 2, 150, 4).detach().to(dtype) for seed in range(3)]
    q, k, v = leaves[0] * size, leaves[1] * size, leaves[2]
    q, k = q - size * (dtype != torch.float16), k - size * (dtype != torch.float16)
    out = copy.deepcopy(made).to(dtype)(q, k, v, mask=Mask())
    expected = made(q.double(), k.double(), v.double(), mask=Mask())
    assert (
        out.dtype == dtype
        and (out.double() - expected).abs().max()
        < 4 * torch.finfo(dtype).eps + 4 * size * torch.finfo(torch.float32).eps
    )


def test_sums_of_many_halves_are_in_float32():
    """The sum of 20,000 features of 6 is above the largest float16, and 1 is nothing beside 20,000 in bfloat16."""
    for dtype in (torch.float16, torch.bfloat16):
        q, k = torch.full((1, 1, 20000, 2), 5.0, dtype=dtype), torch.full((1, 1, 20000, 2), 5.0, dtype=dtype)
        v = torch.linspace(0, 1, 20000).view(1, 1, -1, 1).to(dtype)
        for causal in (False, True):
            out = core(causal, 1, 2).to(dtype)(q, k, v, mask=Mask())
            assert out[0, 0, -1, 0].item() == pytest.approx(0.5, abs=0.003)


@pytest.mark.parametrize("causal", [False, True])
def test_keys_and_queries_far_from_zero_give_the_same_weights_and_no_nan(causal):
    """phi(x - c) = e^-c phi(x) below 0: a shift of keys and queries that are negative changes nothing."""
    made = core(causal)
    q, k, v = (draw(seed, 1, 2, 70, 4) for seed in range(3))
    q, k = q.abs().neg(), k.abs().neg()
    assert_same(made(q - 400, k - 400, v, mask=Mask()), made(q, k, v, mask=Mask()), [q, k, v])


def test_training_keeps_linear_memory_and_no_state_for_each_position():
    """What autograd keeps for n positions is bounded by a few d numbers each, where a state has d^2 (section 3.3.1)."""

    def kept(n):
        found = {}

        def pack(x):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        made = core(causal=True, heads=1, head_dim=32).float()
        leaves = [draw(seed, 1, 1, n, 32).detach().float().requires_grad_() for seed in range(3)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            made(*leaves, mask=Mask())
        return sum(found.values()) / 4

    assert kept(8 * CHUNK) / kept(4 * CHUNK) == pytest.approx(2, abs=0.1)
    assert kept(16 * CHUNK) < 16 * CHUNK * 32 * 20


def test_dropout_draws_once_for_a_key_and_keeps_the_mean():
    """Every weight is 0 or 1 / (1 - p) times what it was, the same for all queries that see the key."""
    for causal in (False, True):
        made, leaves = core(causal, dropout=0.25), [draw(seed, 1, 2, 12, 4).detach() for seed in range(2)]
        eye = torch.eye(12).double().expand(1, 2, 12, 12)
        weights = made.eval()(*leaves, eye, mask=Mask())
        dropped = made.train()(*leaves, eye, mask=Mask())
        there = weights > 0
        factor = torch.where(there, dropped / torch.where(there, weights, 1.0), math.nan)
        assert ((factor - 4 / 3).abs() < 1e-10).logical_or(factor == 0)[there].all()
        of_key = factor.nanmean(dim=2, keepdim=True)
        assert (torch.where(there, factor - of_key, 0.0).abs() < 1e-10).all() and 0 < (of_key == 0).sum() < 24


def test_a_model_decodes_beams_samples_and_looked_up_drafts_with_a_cache_that_does_not_grow(tiny):
    model = effzoo.build("gpt2", attention="linear", task="causal_lm", **tiny).double().eval()
    ids = torch.tensor([[4, 5, 6, 4, 5, 6, 4], [7, 7, 8, 9, 7, 7, 8]])
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    for how in ({"num_beams": 3}, {"do_sample": True, "top_k": 9}, {"attention_mask": mask}):
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            texts.append(effzoo.generate(model, ids, max_new_tokens=9, use_cache=use_cache, **how))
        assert torch.equal(*texts)
    plain = effzoo.generate(model, ids[:1], max_new_tokens=20)
    assert torch.equal(plain, effzoo.generate(model, ids[:1], max_new_tokens=20, prompt_lookup_num_tokens=4))
    cache = Cache()
    with torch.no_grad():
        model(ids, cache=cache)
        sizes = [x.numel() for state in cache.states.values() for x in state.values()]
        for _ in range(30):
            model(ids[:, :1], cache=cache)
    assert sizes == [x.numel() for state in cache.states.values() for x in state.values()]


def test_a_state_is_not_changed_by_the_step_that_goes_on_from_it():
    made, leaves = core(causal=True), [draw(seed, 2, 2, 9, 4).detach() for seed in range(3)]
    with torch.no_grad():
        _, state = made.step(*(x[:, :, :6] for x in leaves), mask=Mask(), past=None)
        before = {name: x.clone() for name, x in state.items()}
        outs = [made.step(*(x[:, :, 6:] for x in leaves), mask=Mask(), past=state)[0] for _ in range(2)]
    assert torch.equal(*outs) and all(torch.equal(state[name], x) for name, x in before.items())


def test_what_it_has_not_is_refused_with_the_reason(tiny):
    with pytest.raises(OptionError, match="'linear' has no softmax over keys, which is what backend 'flash' computes"):
        core(backend="flash")
    with pytest.raises(InputError, match="'linear' has no global tokens"):
        effzoo.build("bert", attention="linear", **tiny)(
            torch.ones(1, 4, dtype=torch.long), global_attention_mask=torch.ones(1, 4)
        )
    with pytest.raises(IncompatibleError, match="attends within one sequence only"):
        effzoo.blocks.Attention(8, effzoo.spec.parse_one("linear"), Context(2, 4, causal=True), source_dim=8)
