"""Decoding with a cache: the rows of new positions equal those of a forward pass over everything, layer by layer and
through whole models."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effzoo
from effzoo.attention import Context, Mask
from effzoo.errors import IncompatibleError, InputError

KINDS = [
    "full",
    "longformer[window=6]",
    "longformer[window=4,dilation=(1,3)]",
    "longformer[window=4,global_projections=false]",
    "streaming[window=4,sinks=3]",
]


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from([0.0, 0.3]),
    st.integers(0, 10**6),
)
def test_steps_of_any_size_equal_the_forward_pass(spec, sizes, remembers, global_share, seed):
    """A prompt and steps of drawn lengths; padding at the front, memory, and global tokens in the prompt."""
    generator = torch.Generator().manual_seed(seed)
    core, n = effzoo.attention.create(spec, Context(heads=2, head_dim=4, causal=True)), sum(sizes)
    inputs = [torch.randn(2, 2, n, 4, dtype=torch.float64, generator=generator) for _ in core.projections]
    memory = (
        tuple(torch.randn(2, 3, 4, dtype=torch.float64, generator=generator) for _ in range(2)) if remembers else None
    )
    valid = torch.arange(n) >= torch.tensor([0, min(2, sizes[0] - 1)])[:, None]
    is_global = (torch.rand(2, n, generator=generator) < global_share) & valid & (torch.arange(n) < sizes[0])
    has_global = core.knows_globals() and bool(is_global.any())
    expected = core(*inputs, mask=Mask(valid, is_global if has_global else None), memory=memory)
    rows, state, start = [], None, 0
    for size in sizes:
        now = [x[:, :, start : start + size] for x in inputs]
        mask = Mask(valid[:, : start + size], is_global[:, :size] if has_global and start == 0 else None)
        out, state = core.step(*now, mask=mask, past=state, memory=memory)
        rows.append(out)
        start += size
    assert (torch.cat(rows, dim=2) - expected).abs().max() < 1e-12


def test_the_longformer_cache_is_bounded_by_the_window_and_the_globals():
    core = effzoo.attention.create("longformer[window=6]", Context(heads=2, head_dim=4, causal=True))
    is_global = torch.zeros(1, 20, dtype=torch.bool)
    is_global[0, [0, 5]] = True
    _, state = core.step(*(torch.randn(1, 2, 20, 4) for _ in range(6)), mask=Mask(is_global=is_global), past=None)
    for _ in range(50):
        _, state = core.step(*(torch.randn(1, 2, 1, 4) for _ in range(3)), mask=Mask(), past=state)
        assert state["k"].shape[2] == 3 and state["k_global"].shape[2] == 2


@pytest.mark.parametrize("attention", ["full", "longformer[window=6]"])
@pytest.mark.parametrize("peft", [None, "prefix[length=3]|lora", "prompt[length=4]"])
def test_logits_of_a_model_with_a_cache_equal_those_without(attention, peft, tiny):
    model = effzoo.build("gpt2", attention=attention, peft=peft, task="causal_lm", **tiny).double().eval()
    ids = torch.randint(53, (3, 17))
    mask = (torch.arange(17) >= torch.tensor([0, 4, 2])[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
        cache, logits = effzoo.attention.Cache(), []
        for start, stop in [(0, 6), (6, 7), (7, 8), (8, 12), (12, 17)]:
            out = model(
                ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop], cache=cache
            )
            logits.append(out.logits)
    here = mask.bool()
    assert (torch.cat(logits, dim=1) - expected)[here].abs().max() < 1e-12


def test_reordering_a_cache_is_reordering_the_batch(tiny):
    model = effzoo.build("gpt2", attention="longformer[window=4]", task="causal_lm", **tiny).double().eval()
    ids, order = torch.randint(53, (3, 9)), torch.tensor([2, 0, 0])
    cache = effzoo.attention.Cache()
    with torch.no_grad():
        model(ids[:, :8], cache=cache)
        cache.reorder(order)
        found = model(ids[order, 8:], cache=cache).logits
        assert torch.allclose(found[:, 0], model(ids[order]).logits[:, -1], rtol=0, atol=1e-12)


def test_what_cannot_be_decoded_says_so(tiny):
    encoder = effzoo.build("bert", **tiny)
    with pytest.raises(IncompatibleError, match="bert is an encoder"):
        encoder(torch.ones(1, 4, dtype=torch.long), cache=effzoo.attention.Cache())
    decoder = effzoo.build("gpt2", attention="longformer[window=4]", task="causal_lm", **tiny)
    cache = effzoo.attention.Cache()
    decoder(torch.ones(1, 60, dtype=torch.long), cache=cache)
    with pytest.raises(InputError, match="tokens that follow the prompt cannot be global"):
        decoder(torch.ones(1, 1, dtype=torch.long), global_attention_mask=torch.ones(1, 1), cache=cache)
    with pytest.raises(InputError, match="5 tokens after 60 in the cache do not fit into max_length 64"):
        decoder(torch.ones(1, 5, dtype=torch.long), cache=cache)


@pytest.mark.parametrize("spec", ["full", "longformer[window=16]", "lsh[rounds=2,buckets=4]"])
def test_decoding_copies_the_cache_seldom_and_never_what_was_given(spec):
    """Keys lie where they lay at the token before, but for a few times when room is made; a second text that goes on
    from a state has its own."""
    core = effzoo.attention.create(spec, Context(heads=2, head_dim=4, causal=True, max_length=512))
    name = [*core.projections][-1]
    draw = torch.Generator().manual_seed(0)

    def inputs(n):
        return [torch.randn(1, 2, n, 4, dtype=torch.float64, generator=draw) for _ in [*core.projections][:3]]

    with torch.no_grad():
        _, state = core.step(*inputs(40), mask=Mask(), past=None)
        starts, kept = [], None
        for number in range(200):
            now = inputs(1)
            if number == 100:
                kept, before, again = {key: x.clone() for key, x in state.items()}, state, now
            out, state = core.step(*now, mask=Mask(), past=state)
            if number == 100:
                first = out
            starts.append(state[name].untyped_storage().data_ptr())
        assert sum(one != other for one, other in itertools.pairwise(starts)) <= 4
        assert all(torch.equal(before[key], kept[key]) for key in kept)
        twice, other = core.step(*again, mask=Mask(), past=before)
        assert (
            torch.equal(twice, first)
            and other[name].untyped_storage().data_ptr() != before[name].untyped_storage().data_ptr()
        )


def test_gradients_flow_through_what_a_cache_holds():
    core = effzoo.attention.create("full", Context(heads=2, head_dim=4, causal=True))
    whole = [torch.randn(1, 2, 7, 4, dtype=torch.float64).requires_grad_() for _ in range(3)]
    expected = torch.autograd.grad(core(*whole, mask=Mask())[:, :, 5:].square().sum(), whole)
    _, state = core.step(*(x[:, :, :5] for x in whole), mask=Mask(), past=None)
    rows = []
    for place in (5, 6):
        out, state = core.step(*(x[:, :, place : place + 1] for x in whole), mask=Mask(), past=state)
        rows.append(out)
    found = torch.autograd.grad(torch.cat(rows, dim=2).square().sum(), whole)
    assert all(torch.allclose(one, other, rtol=0, atol=1e-12) for one, other in zip(found, expected, strict=True))
