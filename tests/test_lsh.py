"""LSH and local attention: a definition in plain Python, anchors, rounds, decoding, decisions replayed, and nothing
quadratic."""

import copy
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effzoo
from effzoo.architectures import transformer
from effzoo.attention import Context, Mask
from effzoo.attention import rounds as few_heads
from effzoo.attention.hashing import automatic, buckets_of
from effzoo.attention.reference import dense
from effzoo.blocks.reversible import two_streams
from effzoo.errors import IncompatibleError, InputError, OptionError
from tests.doubles import on

HEADS, WIDTH = 2, 4


def random(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def core(spec, causal=False, max_length=32, heads=HEADS, **context):
    return effzoo.attention.create(
        spec, Context(heads=heads, head_dim=WIDTH, causal=causal, max_length=max_length, **context)
    ).double()


def inputs_of(made, n, seed=0, batch=2):
    return [random(seed + i, batch, made.context.heads, n, WIDTH) for i in range(len(made.projections))]


def gradients(out, leaves):
    direction = random(17, *out.shape).detach()
    found = torch.autograd.grad(out, leaves, direction, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


def assert_same(out, expected, leaves, tolerance=1e-10):
    assert out.shape == expected.shape and out.isfinite().all() and (out - expected).abs().max() < tolerance
    for found, wanted in zip(gradients(out, leaves), gradients(expected, leaves), strict=True):
        assert found.isfinite().all() and (found - wanted).abs().max() < tolerance


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + x.shape[-1] * 1e-6).sqrt()


def shared(qk, v, allowed, memory=None):
    """Softmax attention with unit keys and no scale, over a mask."""
    memory = None if memory is None else (unit(memory[0]) * WIDTH**0.5, memory[1])
    return dense(qk, unit(qk) * WIDTH**0.5, v, allowed, memory)


def by_hand(made, qk, valid):
    """How often query i sees key j, written with lists: {(batch, head, i, j): times}, as the paper and HF's released
    code define it."""
    batch, heads, n, _ = qk.shape
    turned = torch.einsum("bhnd,rhdk->rbhnk", qk.detach(), made.rotations[: made.rounds])
    times = Counter()
    for b in range(batch):
        for h in range(heads):
            rounds, buckets = [], []
            for r in range(made.rounds):
                names, start = [()] * n, 0
                for factor in made.factors if made.factors != (1,) else ():
                    part = turned[r, b, h, :, start : start + factor // 2]
                    names = [
                        (*name, int(choice))
                        for name, choice in zip(names, torch.cat([part, -part], -1).argmax(-1), strict=True)
                    ]
                    start += factor // 2
                order = sorted(
                    range(n), key=lambda i, names=names: (not valid[b, i], names[i][::-1] if valid[b, i] else (), i)
                )
                rounds.append([order[at : at + made.chunk] for at in range(0, n, made.chunk)])
                buckets.append(names)
            ring = [(r, chunk) for r, chunks in enumerate(rounds) for chunk in chunks]
            for r, chunks in enumerate(rounds):
                flat = [i for chunk in chunks for i in chunk]
                for at, chunk in enumerate(chunks):
                    seen = []
                    for offset in range(-made.before, made.after + 1):
                        if made.circular and not (made.within_buckets and made.rounds > 1):
                            other, keys = ring[(r * len(chunks) + at + offset) % len(ring)]
                            seen += [(other, j) for j in keys]
                        elif 0 <= at + offset < len(chunks):
                            seen += [(r, j) for j in chunks[at + offset]]
                    for i in chunk:
                        if made.stable:
                            place = flat.index(i)
                            seen = [
                                (r, j)
                                for j in flat[
                                    max(0, place - made.before * made.chunk) : place + made.after * made.chunk + 1
                                ]
                            ]
                        for other, j in seen:
                            if not valid[b, i] or not valid[b, j] or i == j or (made.context.causal and j > i):
                                continue
                            if made.within_buckets and (other != r or buckets[r][i] != buckets[r][j]):
                                continue
                            times[b, h, i, j] += 1
    return times


def expected_of(made, qk, v, valid, memory=None):
    """Softmax with weights in proportion to `by_hand`, one query at a time."""
    times, rows = by_hand(made, qk, valid), []
    for b, h, i in ((b, h, i) for b in range(qk.shape[0]) for h in range(qk.shape[1]) for i in range(qk.shape[2])):
        sees = {j: 1 if made.count_once else times[b, h, i, j] for j in range(qk.shape[2]) if times[b, h, i, j]}
        if not sees and memory is None and valid[b, i]:
            sees = {i: 1}
        keys, values = [unit(qk[b, h, j]) for j in sees], [v[b, h, j] for j in sees]
        weights = [torch.tensor(float(count)) for count in sees.values()]
        if memory is not None:
            keys, values = keys + list(unit(memory[0][h])), values + list(memory[1][h])
            weights += [torch.tensor(1.0 if made.count_once else float(made.rounds))] * memory[0].shape[1]
        if not keys:
            rows.append(0 * v[b, h, i])
            continue
        logits = torch.stack(keys) @ qk[b, h, i]
        weights = torch.stack(weights) * (logits - logits.max()).exp()
        rows.append((weights / weights.sum()) @ torch.stack(values))
    return torch.stack(rows).view(qk.shape)


@st.composite
def lsh_cases(draw):
    """(spec, causal, n, kept, rows of memory, seed)"""
    causal = draw(st.booleans())
    stable = draw(st.sampled_from([False, False, True]))
    spec = {
        "name": "lsh",
        "rounds": draw(st.integers(1, 3)),
        "chunk": draw(st.integers(1, 6)),
        "buckets": draw(st.sampled_from([None, 1, 2, 6, (2, 2), (4, 2)])),
        "look_back": draw(st.integers(1 if stable else 0, 2)),
        "look_forward": draw(st.integers(0, 2)),
        "within_buckets": draw(st.booleans()),
        "count_once": draw(st.booleans()),
        "circular": not stable and draw(st.booleans()),
        "stable": stable,
        "seed": draw(st.integers(0, 99)),
    }
    return (
        spec,
        causal,
        draw(st.integers(1, 17)),
        draw(st.sampled_from([0.0, 0.6, 1.0])),
        draw(st.sampled_from([0, 3])),
        draw(st.integers(0, 999)),
    )


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(lsh_cases(), st.sampled_from(["auto", "reference", "efficient"]))
def test_lsh_equals_its_definition_and_that_equals_plain_python(case, backend):
    with on(backend) as name:
        spec, causal, n, kept, rows, seed = case
        made = core(spec, causal, backend=name)
        qk, v = inputs_of(made, n, seed)
        valid = (
            torch.rand(2, n, generator=torch.Generator().manual_seed(seed)) < kept
            if kept < 1
            else torch.ones(2, n, dtype=torch.bool)
        )
        mask = Mask(None if kept == 1 else valid)
        memory = (random(3, HEADS, rows, WIDTH), random(4, HEADS, rows, WIDTH)) if rows else None
        expected = expected_of(made, qk, v, valid, memory)
        leaves = [qk, v, *(memory or ())]
        assert_same(made.dense(qk, v, mask=mask, memory=memory), expected, leaves)
        assert_same(made(qk, v, mask=mask, memory=memory), expected, leaves)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 9), st.integers(0, 2), st.integers(0, 2), st.booleans(), st.booleans(), st.integers(1, 40),
    st.sampled_from([0.0, 0.6, 1.0]), st.sampled_from([0, 3]), st.sampled_from(["auto", "reference", "efficient"]),
)  # fmt: skip
def test_local_equals_its_pattern_and_that_equals_plain_python(
    chunk, before, after, circular, causal, n, kept, rows, backend
):
    with on(backend) as name:
        made = core(
            {"name": "local", "chunk": chunk, "look_back": before, "look_forward": after, "circular": circular},
            causal,
            backend=name,
        )
        leaves = inputs_of(made, n)
        valid = (
            torch.rand(2, n, generator=torch.Generator().manual_seed(n)) < kept
            if kept < 1
            else torch.ones(2, n, dtype=torch.bool)
        )
        memory = (random(3, HEADS, rows, WIDTH), random(4, HEADS, rows, WIDTH)) if rows else None
        mask = Mask(None if kept == 1 else valid)
        chunks = -(-n // chunk)
        pattern = made.pattern(n, mask).expand(2, 1, n, n)
        for b in range(2):
            for i in range(n):
                sight = [i // chunk + offset for offset in range(-before, after + 1)]
                sight = {c % chunks for c in sight} if circular else set(sight)
                assert pattern[b, 0, i].tolist() == [
                    bool(valid[b, j]) and j // chunk in sight and not (causal and j > i) for j in range(n)
                ]
        out, expected = (f(*leaves, mask=mask, memory=memory) for f in (made, made.dense))
        assert_same(out, expected, [*leaves, *(memory or ())])


@pytest.mark.parametrize("n", [7, 8, 11, 16, 20])
def test_a_key_that_the_local_ring_meets_twice_is_seen_once(n):
    made = core("local[chunk=4,look_back=2,look_forward=2,circular=true]")
    leaves = inputs_of(made, n)
    # five chunks at most: all of them
    assert_same(made(*leaves, mask=Mask()), dense(*leaves, torch.ones(n, n, dtype=torch.bool)), leaves)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "spec", ["lsh[buckets=1,chunk=32]", "lsh[chunk=32]", "lsh[buckets=1,chunk=32,within_buckets=true,count_once=true]"]
)
def test_one_chunk_is_full_attention_with_shared_queries_and_keys(spec, causal):
    """The anchor: every token sees every other one; itself only where it is alone. Memory has the weight of every other
    key."""
    made = core(spec, causal)
    qk, v = inputs_of(made, 23)
    place = torch.arange(23)
    allowed = place < place[:, None] if causal else place != place[:, None]
    memory = (random(3, HEADS, 3, WIDTH), random(4, HEADS, 3, WIDTH))
    assert_same(made(qk, v, mask=Mask(), memory=memory), shared(qk, v, allowed, memory), [qk, v, *memory])
    allowed[0, 0] = causal
    assert_same(made(qk, v, mask=Mask()), shared(qk, v, allowed), [qk, v])


@pytest.mark.parametrize("causal", [False, True])
def test_one_bucket_is_local_attention_in_chunks(causal):
    """When all hash alike, the sorted order is the order of positions."""
    made, local = core("lsh[buckets=1,chunk=5,look_forward=1]", causal), core("local[chunk=5,look_forward=1]", causal)
    qk, v = inputs_of(made, 23)
    allowed = local.pattern(23, Mask())[0, 0] & ~torch.eye(23, dtype=torch.bool)
    allowed[0, 0] = causal
    assert_same(made(qk, v, mask=Mask()), shared(qk, v, allowed), [qk, v])


@pytest.mark.parametrize("within", ["false", "true"])
@pytest.mark.parametrize("causal", [False, True])
def test_counted_once_it_is_dense_attention_on_the_union_of_the_rounds(causal, within):
    made = core(f"lsh[rounds=3,chunk=4,buckets=4,count_once=true,within_buckets={within}]", causal)
    qk, v = inputs_of(made, 31)
    union = torch.zeros(2, HEADS, 31, 31, dtype=torch.bool)
    twice = 0
    for (b, h, i, j), times in by_hand(made, qk, torch.ones(2, 31, dtype=torch.bool)).items():
        union[b, h, i, j] = True
        twice += times > 1
    assert twice > 20  # the correction has something to correct
    union |= ~union.any(-1, keepdim=True) & torch.eye(31, dtype=torch.bool)
    assert_same(made(qk, v, mask=Mask()), shared(qk, v, union), [qk, v])


@pytest.mark.slow
@pytest.mark.parametrize("once", ["false", "true"])
@pytest.mark.parametrize("seed", range(4))
def test_rounds_in_a_ring_equal_plain_python(seed, once):
    """Three rounds, so that the round before and the round after are two; look-back and look-ahead meet the ring's
    ends."""
    made = core(
        f"lsh[rounds=3,chunk=4,buckets=4,circular=true,look_back=2,look_forward=1,count_once={once},seed={seed}]"
    )
    qk, v = inputs_of(made, 22, seed)
    valid = torch.arange(22) != 7 * torch.tensor([1, 9])[:, None]
    expected = expected_of(made, qk, v, valid)
    assert_same(made(qk, v, mask=Mask(valid)), expected, [qk, v])
    assert_same(made.dense(qk, v, mask=Mask(valid)), expected, [qk, v])


@pytest.mark.slow
@pytest.mark.parametrize("together", [1, 3 * 37 * WIDTH, 2**19])
@pytest.mark.parametrize(
    "spec",
    [
        "lsh[rounds=3,chunk=8]",
        "lsh[rounds=2,chunk=5,circular=true]",
        "lsh[rounds=2,chunk=8,stable=true,count_once=true]",
    ],
)
def test_a_few_heads_at_a_time_are_all_rounds_side_by_side(spec, together, monkeypatch):
    """The fast path against its twin, forward and backward, in blocks of one head, of all heads of an example, and of
    the whole batch."""
    monkeypatch.setattr(few_heads, "TOGETHER", together)
    valid = torch.arange(37) < torch.tensor([37, 20, 1, 0])[:, None]
    for causal in (False, True):
        for mask in (Mask(decisions={}), Mask(valid, decisions={})):
            fast, twin, blocks = (
                core(spec, causal, heads=3, backend=backend) for backend in ("flash", "reference", "blocks")
            )
            leaves = inputs_of(fast, 37, batch=4)
            expected = twin(*leaves, mask=mask)
            for one in (fast, blocks):
                assert_same(one(*leaves, mask=mask), expected, leaves)


def test_nothing_of_the_rounds_is_kept():
    """But what goes in and out, and the buckets."""
    made, kept = core("lsh[rounds=4,chunk=8]", heads=2, max_length=256), {}
    leaves = inputs_of(made, 256)

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        made(*leaves, mask=Mask())
    numbers = leaves[0].numel()
    # qk, v, keys, out and their lengths, of 8 bytes
    assert sum(kept.values()) < 8 * (5 * numbers + 8 * numbers // WIDTH)


def test_a_token_alone_gives_its_own_value_in_every_dtype():
    """No large negative constant that rounds or overflows: weight 1 exactly, also in float16."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        made = core("lsh[chunk=4,within_buckets=true,buckets=16]", causal=True).to(dtype)
        qk, v = ((100 * x).detach().to(dtype) for x in inputs_of(made, 21))
        out = made(qk, v, mask=Mask())
        assert out.isfinite().all() and torch.equal(out[:, :, 0], v[:, :, 0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("spec", ["lsh[chunk=4]", "lsh[chunk=4,count_once=true,within_buckets=true]", "local[chunk=4]"])
def test_lower_precision_agrees_with_float64_on_the_same_buckets(spec, dtype, tolerance):
    """Half precision has 8 or 11 bits of each input, hence the tolerance."""
    made, decisions = core(spec, causal=True), {}
    leaves = inputs_of(made, 29)
    expected = made(*leaves, mask=Mask(decisions=decisions))
    rounded = [x.detach().to(dtype).requires_grad_() for x in leaves]
    out = made.to(dtype)(*rounded, mask=Mask(decisions=decisions))
    assert out.dtype == dtype and (out - expected).abs().max() < tolerance
    direction = random(17, *out.shape).detach()
    for got, want in zip(
        torch.autograd.grad(out, rounded, direction.to(dtype)), torch.autograd.grad(expected, leaves, direction),
        strict=True
    ):  # fmt: skip
        assert (got - want).abs().max() < 4 * tolerance * want.abs().max()


def test_rotations_of_a_round_are_the_same_however_many_rounds_there_are():
    four, eight = core("lsh[rounds=4,chunk=4]"), core("lsh[rounds=8,chunk=4]")
    assert torch.equal(four.rotations, eight.rotations[:4]) and len({float(r.sum()) for r in eight.rotations}) == 8
    qk, v = inputs_of(four, 27)
    before = four(qk, v, mask=Mask())
    four.rounds = 8
    assert torch.equal(four(qk, v, mask=Mask()), eight(qk, v, mask=Mask())) and not torch.allclose(
        four(qk, v, mask=Mask()), before
    )
    four.rounds = 4
    assert torch.equal(four(qk, v, mask=Mask()), before)


def test_more_rounds_see_all_that_fewer_see():
    made, pairs = core("lsh[rounds=1,chunk=4,buckets=4]"), set()
    qk, _ = inputs_of(made, 31)
    for rounds in (1, 2, 4, 8):
        made.rounds = rounds
        seen = set(by_hand(made, qk, torch.ones(2, 31, dtype=torch.bool)))
        assert pairs < seen
        pairs = seen


def test_rotations_come_from_a_generator_of_their_own_by_seed_layer_round_and_head():
    state = torch.get_rng_state()
    made = core("lsh[chunk=4,seed=3]", heads=3)
    qk, v = inputs_of(made, 27)
    first = made(qk, v, mask=Mask())
    drawn = made.rotations.clone()
    made.resample(4)
    assert not torch.equal(made.rotations, drawn) and not torch.allclose(made(qk, v, mask=Mask()), first)
    made.resample(3)
    assert torch.equal(made.rotations, drawn) and torch.equal(made(qk, v, mask=Mask()), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(drawn, core("lsh[chunk=4,seed=3]", heads=3, layer=1).rotations)
    assert not torch.equal(drawn[:, 0], drawn[:, 1]) and abs(float(drawn.std()) - 1) < 0.1
    assert not [key for key in made.state_dict() if "rotations" in key]  # the seed of the spec gives them again


def test_given_rotations_are_used_and_cannot_be_extended():
    made = core("lsh[chunk=4,buckets=4]")
    given_ = random(5, 2, HEADS, WIDTH, 2).detach()
    made.rotate_by(given_)
    assert made.rounds == 2 and torch.equal(made.rotations, given_)
    with pytest.raises(OptionError, match="3 rounds, but rotations were given for 2"):
        made.rounds = 3
    with pytest.raises(InputError, match=r"rotations have the shape \[rounds, 2, 4, 2\].*got \[2, 2, 4, 3\]"):
        made.rotate_by(torch.zeros(2, HEADS, WIDTH, 3))
    made.resample(0)
    made.rounds = 3


def test_buckets_are_the_nearest_of_the_rotated_axes():
    """With the identity as rotation the buckets are +x, +y, -x, -y; factors count like digits, the first the lowest."""
    x = torch.tensor([[2.0, 1.0], [1.0, 2.0], [-2.0, 1.0], [1.0, -2.0]])[None, None]
    assert buckets_of(x, torch.eye(2)[None, None], (4,)).flatten().tolist() == [0, 1, 2, 3]
    two = torch.cat([torch.eye(2)[:, :1], torch.eye(2)[:, 1:]], dim=1)[None, None]  # (2, 2): sign of x, then sign of y
    assert buckets_of(x, two, (2, 2)).flatten().tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("length", "chunk", "factors"),
    [
        (512, 64, (16,)),
        (64, 4, (4, 8)),
        (65536, 64, (32, 64)),
        (16, 64, (2,)),
        (4096, 64, (128,)),
        (4096, 8, (8, 8, 16)),
    ],
)
def test_the_automatic_number_of_buckets_is_twice_the_chunks(length, chunk, factors):
    assert automatic(length, chunk) == factors == core(f"lsh[chunk={chunk}]", max_length=length).factors


@settings(max_examples=120, deadline=None)
@given(lsh_cases(), st.lists(st.integers(1, 6), min_size=2, max_size=4))
def test_a_step_equals_the_last_rows_of_the_forward_pass(case, sizes):
    """Whatever the options: padding at the front, memory, prompts and steps of any length."""
    spec, _, _, kept, rows, seed = case
    made = core(spec, causal=True)
    qk, v = inputs_of(made, sum(sizes), seed)
    valid = torch.arange(sum(sizes)) >= torch.tensor([0, 0 if kept == 1 else sizes[0] - 1])[:, None]
    memory = (random(3, HEADS, rows, WIDTH), random(4, HEADS, rows, WIDTH)) if rows else None
    state, start = None, 0
    for size in sizes:
        end = start + size
        mask = Mask(valid[:, :end])
        out, state = made.step(qk[:, :, start:end], v[:, :, start:end], mask=mask, past=state, memory=memory)
        expected = made(qk[:, :, :end], v[:, :, :end], mask=mask, memory=memory)
        assert (out - expected[:, :, start:]).abs().max() < 1e-12
        start = end
    if spec["stable"]:  # and of all rows of the whole, since rows do not change when the sequence grows
        whole = made(qk, v, mask=Mask(valid), memory=memory)
        assert (
            whole[:, :, : sizes[0]]
            - made(*(x[:, :, : sizes[0]] for x in (qk, v)), mask=Mask(valid[:, : sizes[0]]), memory=memory)
        ).abs().max() < 1e-12


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(0, 2), st.lists(st.integers(1, 9), min_size=2, max_size=5), st.booleans())
def test_local_steps_equal_the_forward_pass_and_the_cache_is_bounded(chunk, before, sizes, remembers):
    made = core(f"local[chunk={chunk},look_back={before}]", causal=True)
    n = sum(sizes)
    leaves = inputs_of(made, n)
    valid = torch.arange(n) >= torch.tensor([0, sizes[0] - 1])[:, None]
    memory = (random(3, HEADS, 3, WIDTH), random(4, HEADS, 3, WIDTH)) if remembers else None
    expected = made(*leaves, mask=Mask(valid), memory=memory)
    state, start = None, 0
    for size in sizes:
        end = start + size
        out, state = made.step(
            *(x[:, :, start:end] for x in leaves), mask=Mask(valid[:, :end]), past=state, memory=memory
        )
        assert (out - expected[:, :, start:end]).abs().max() < 1e-12 and state["k"].shape[2] <= (before + 1) * chunk
        start = end


def test_a_ring_that_shows_the_first_chunks_to_the_last_keeps_no_cache():
    made = core("local[chunk=4,circular=true,look_forward=1]", causal=True)
    with pytest.raises(IncompatibleError, match="decode with circular=false"):
        made.step(*inputs_of(made, 5), mask=Mask(), past=None)
    ring, plain = core("local[chunk=4,circular=true]", causal=True), core("local[chunk=4]", causal=True)
    leaves = inputs_of(ring, 21)
    # looking back, causality hides the ring
    assert torch.equal(ring(*leaves, mask=Mask()), plain(*leaves, mask=Mask()))


def grows(spec):
    """Whether the first 20 rows are the same in a sequence of 20 and in one of 33."""
    made = core(spec, causal=True)
    qk, v = inputs_of(made, 33)
    return torch.allclose(
        made(qk, v, mask=Mask())[:, :, :20], made(qk[:, :, :20], v[:, :, :20], mask=Mask()), rtol=0, atol=1e-12
    )


def test_stable_rows_stay_when_the_sequence_grows_and_others_need_not():
    """Why `stable` exists: a chunk border of the sorted sequence depends on later tokens, though no gradient shows
    it."""
    assert grows("lsh[chunk=4,buckets=4,stable=true]") and grows("lsh[chunk=4,buckets=4,stable=true,count_once=true]")
    assert not grows("lsh[chunk=4,buckets=4]") and not grows("lsh[chunk=4,buckets=4,within_buckets=true]")


@pytest.mark.parametrize(
    "attention", ["lsh[chunk=4,stable=true,rounds=2]", ("local[chunk=4]", "lsh[chunk=4,stable=true]")]
)
@pytest.mark.parametrize("peft", [None, "prefix[length=3]|lora"])
def test_logits_of_a_stable_model_with_a_cache_equal_those_without(attention, peft, tiny):
    model = effzoo.build("gpt2", attention=attention, peft=peft, task="causal_lm", **tiny).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(53, (3, 27))
    mask = (torch.arange(27) >= torch.tensor([0, 4, 2])[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
        cache, logits = effzoo.attention.Cache(), []
        for start, stop in [(0, 6), (6, 7), (7, 8), (8, 19), *((i, i + 1) for i in range(19, 27))]:
            kept = {"position_ids": positions[:, start:stop], "cache": cache}
            logits.append(model(ids[:, start:stop], attention_mask=mask[:, :stop], **kept).logits)
    assert expected.std() > 0.1 and (torch.cat(logits, dim=1) - expected)[mask.bool()].abs().max() < 1e-10


def test_changing_the_rounds_in_the_middle_of_decoding_says_so():
    made = core("lsh[rounds=2]", causal=True)
    qk, v = inputs_of(made, 5)
    _, state = made.step(qk, v, mask=Mask(), past=None)
    made.rounds = 3
    with pytest.raises(InputError, match="filled with 2 rounds, now there are 3"):
        made.step(qk, v, mask=Mask(), past=state)


def test_buckets_are_decided_once_for_a_batch():
    """A second pass over inputs that rounding has moved hashes as the first did: reversible blocks and checkpoints
    compute the same function."""
    made = core("lsh[chunk=4]")
    qk, v = inputs_of(made, 31)
    decisions = {}
    made(qk, v, mask=Mask(decisions=decisions))
    moved = -qk.detach()  # every bucket would be another
    again = made(moved, v, mask=Mask(decisions=decisions))
    made.rotate_by(-made.rotations)  # which undoes that
    assert (
        torch.allclose(made(moved, v, mask=Mask()), again, rtol=0, atol=1e-13)
        and decisions[("buckets", 0)].dtype == torch.int16
    )


@pytest.mark.parametrize("peft", [None, "lora[rank=2]"])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_reversible_gradients_equal_the_plain_ones_with_dropout(name, peft, monkeypatch):
    sizes = {
        "dim": 16,
        "heads": 2,
        "mlp": 32,
        "vocab": 53,
        "max_length": 64,
        "layers": 3,
        "dropout": 0.1,
        "attention_dropout": 0.1,
    }
    attention = ("local[chunk=4]", "lsh[chunk=4,rounds=2]", "lsh[chunk=4,count_once=true]")
    model = effzoo.build(
        name, attention=attention, task="token_classification", num_labels=3, peft=peft, norm="pre",
        residual="reversible", tied=False, **sizes
    ).double()  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    ids, labels = torch.randint(53, (2, 21)), torch.randint(3, (2, 21))
    found = []
    for plain in (False, True):
        with monkeypatch.context() as patch:
            if plain:
                patch.setattr(transformer, "reversible", two_streams)
            torch.manual_seed(11)
            loss = model.train()(input_ids=ids, labels=labels).loss
        found.append(
            (loss, torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True))
        )
    (loss, grads), (expected_loss, expected) = found
    assert abs(loss - expected_loss) < 1e-12 and max(float(g.abs().max()) for g in expected if g is not None) > 1e-3
    for got, want in zip(grads, expected, strict=True):
        assert (got is None) == (want is None) and (want is None or (got - want).abs().max() < 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "causal", "n"),
    [
        ("lsh[chunk=8]", False, 27),
        ("lsh[chunk=8]", True, 27),
        ("lsh[chunk=8]", True, 5),
        ("lsh[chunk=8,count_once=true,within_buckets=true]", True, 27),
        ("lsh[chunk=8,count_once=true,circular=true,rounds=2]", False, 27),
        ("lsh[chunk=8,count_once=true,stable=true,rounds=2]", True, 27),
        ("local[chunk=8]", True, 27),
        ("local[chunk=8,circular=true]", False, 5),
    ],
)
def test_compiles_whole_and_computes_the_same(spec, causal, n):
    made = core(spec, causal)
    leaves, valid = inputs_of(made, n), torch.arange(n) < torch.tensor([n, n // 2])[:, None]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: made(*x, mask=Mask(valid)), fullgraph=True, backend="aot_eager")
    assert_same(compiled(*leaves), made(*leaves, mask=Mask(valid)), leaves, 1e-12)


@pytest.mark.parametrize("spec", ["lsh[chunk=8]", "lsh[chunk=8,count_once=true,within_buckets=true]", "local[chunk=8]"])
def test_twice_the_length_keeps_and_makes_twice_as_much(spec):
    """No tensor with n x n entries, neither kept for the backward pass nor on the way."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.size = max(
                [
                    self.size,
                    *(
                        x.untyped_storage().nbytes()
                        for x in (out if isinstance(out, tuple | list) else [out])
                        if isinstance(x, torch.Tensor)
                    ),
                ]
            )
            return out

    sizes = []
    for n in (256, 512, 1024):
        made = core(spec, max_length=128)
        leaves, kept, mode = inputs_of(made, n), [], Largest()
        mode.size = 0
        with (
            mode,
            torch.autograd.graph.saved_tensors_hooks(
                lambda x, kept=kept: kept.append(x.untyped_storage().nbytes()) or x, lambda x: x
            ),
        ):
            made(*leaves, mask=Mask()).sum().backward()
        sizes.append((mode.size, sum(kept)))
    for small, large in pairwise(sizes):
        assert all(big <= 2.1 * little for little, big in zip(small, large, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lsh", "local"])
def test_dropout_drops_each_weight_with_its_probability(name):
    """Values all 1: the mean over draws stays 1, the spread shows that weights are dropped, also those of tokens
    alone."""
    made = core(f"{name}[chunk=4]", causal=True, dropout=0.25).train()
    leaves = [x.detach() for x in inputs_of(made, 24)]
    leaves[-1] = torch.ones_like(leaves[-1])
    outs = torch.stack([made(*leaves, mask=Mask()) for _ in range(800)])
    assert (outs.mean(dim=(0, 1, 2, 4)) - 1).abs().max() < 0.05 and set(outs[..., 0, 0].unique().tolist()) == {
        0.0,
        1 / 0.75,
    }


def test_swapping_copies_the_queries_and_tells(tiny):
    model = effzoo.build("bert", **tiny)
    q = copy.deepcopy(model.blocks[0].attn.q)
    report = effzoo.swap_attention(model, "lsh[chunk=8]")
    assert report.copied["blocks.0.attn.qk.weight"] == "blocks.0.attn.q.weight" and torch.equal(
        model.blocks[0].attn.qk.weight, q.weight
    )
    assert any(key.endswith("attn.k.weight") for key in report.dropped) and any(
        key.endswith("attn.v.weight") for key in report.kept
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lsh[chunk=0]", "chunk is at least 1, got 0"),
        ("lsh[rounds=0]", "rounds is at least 1, got 0"),
        ("lsh[buckets=5]", r"buckets is 1, an even number or even factors such as \(8, 16\), got 5"),
        ("lsh[buckets=(4, 3)]", "got"),
        ("lsh[buckets=(1, 2)]", "got"),
        ("lsh[look_back=-1]", "look_back is 0 or more, got -1"),
        ("lsh[seed=-1]", "seed is 0 or more"),
        ("lsh[stable=true,look_back=0]", "stable needs look_back of at least 1"),
        ("lsh[stable=true,circular=true]", "has no borders that could be circular"),
        ("local[chunk=0]", "chunk is at least 1"),
        ("local[look_forward=-2]", "look_forward is 0 or more, got -2"),
    ],
)
def test_wrong_options_are_refused_with_a_sentence(spec, message):
    with pytest.raises(OptionError, match=message):
        core(spec)


def test_lsh_cannot_cross_to_another_sequence():
    from effzoo.blocks import Attention
    from effzoo.spec import parse_one

    with pytest.raises(IncompatibleError, match="within one sequence only"):
        Attention(8, parse_one("lsh"), Context(heads=2, head_dim=4), source_dim=8)
