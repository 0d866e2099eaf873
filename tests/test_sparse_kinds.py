"""Kinds that are masks of a paper, against the paper's sets written out pair by pair: streaming, bigbird, dilated."""

import numpy
import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

import effzoo
from effzoo.attention import Context, Mask
from effzoo.attention.bigbird import random_blocks, random_blocks_of_pretraining
from effzoo.attention.core import Cache
from effzoo.attention.union import Union
from effzoo.errors import InputError, OptionError


def created(spec, *, causal=False, heads=2, head_dim=4, **context):
    return effzoo.attention.create(spec, Context(heads=heads, head_dim=head_dim, causal=causal, **context)).double()


def drawn(n, *, batch=2, heads=2, head_dim=4, seed=0):
    generator = torch.Generator().manual_seed(seed + n)
    return [
        torch.randn(batch, heads, n, head_dim, dtype=torch.float64, generator=generator, requires_grad=True)
        for _ in range(3)
    ]


def padded(n):
    """No padding, and padding at the end."""
    return torch.arange(n) < torch.tensor([n, max(1, n - n // 3)])[:, None]


def softmax(q, k, v, counts):
    """The softmax over the keys of each query, each as often as it counts; 0 for a query without any."""
    weights = (q @ k.mT / q.shape[-1] ** 0.5).exp() * counts
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-300) @ v


def assert_same(core, counts, *leaves, mask, memory=None):
    """Output and gradients of a core are those of the softmax over these keys."""
    out, wanted = core(*leaves, mask=mask, memory=memory), softmax(*leaves, counts)
    direction = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(core.dense(*leaves, mask=mask), wanted, rtol=0, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(out, leaves, direction), torch.autograd.grad(wanted, leaves, direction), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def stream(n, window, sinks, causal):
    """The sets of `streaming`, pair by pair."""
    return torch.tensor(
        [[(abs(i - j) < window or j < sinks) and (j <= i or not causal) for j in range(n)] for i in range(n)]
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("window", "sinks"), [(1, 1), (3, 4), (5, 0), (7, 2), (40, 4), (2, 60)])
def test_streaming_sees_a_window_and_the_first_positions(window, sinks, causal):
    core = created(f"streaming[window={window}, sinks={sinks}]", causal=causal)
    for n in (1, 5, 33, 70):
        for valid in (None, padded(n)):
            seen = stream(n, window, sinks, causal) & (torch.ones(1) if valid is None else valid[:, None, None]).bool()
            assert_same(core, seen, *drawn(n), mask=Mask(valid))


def test_streaming_by_hand():
    """Window 2 and one sink: a token sees itself, the one before, and the first."""
    sees = created("streaming[window=2, sinks=1]", causal=True).pattern(5, Mask())[0, 0]
    assert [{j for j in range(5) if row[j]} for row in sees] == [{0}, {0, 1}, {0, 1, 2}, {0, 2, 3}, {0, 3, 4}]


def test_streaming_without_sinks_is_the_causal_window():
    q, k, v = drawn(37)
    window = created("longformer[window=10]", causal=True)(q, k, v, mask=Mask())
    assert torch.equal(created("streaming[window=6, sinks=0]", causal=True)(q, k, v, mask=Mask()), window)


@pytest.mark.parametrize("sizes", [(1,) * 12, (2, 1, 5, 1, 1, 9), (12, 1, 1, 4), (3, 3, 3, 3)])
@pytest.mark.parametrize(("window", "sinks"), [(3, 4), (1, 2), (6, 0), (2, 30)])
def test_streaming_decodes_as_it_reads_with_a_cache_of_constant_size(window, sinks, sizes):
    core, n = created(f"streaming[window={window}, sinks={sinks}]", causal=True), sum(sizes)
    tensors, memory = [x.detach() for x in drawn(n)], tuple(torch.randn(2, 2, 3, 4, dtype=torch.float64))
    front = torch.arange(n) >= torch.tensor([0, 1])[:, None]
    for valid, remembered in ((None, None), (front, None), (front, memory)):
        expected = core(*tensors, mask=Mask(valid), memory=remembered)
        state, start = None, 0
        for size in sizes:
            now, end = [x[:, :, start : start + size] for x in tensors], start + size
            mask = Mask(None if valid is None else valid[:, :end])
            out, state = core.step(*now, mask=mask, past=state, memory=remembered)
            here = torch.ones(1, 1, 1, 1) if valid is None else valid[:, None, start:end, None]
            torch.testing.assert_close(out * here, expected[:, :, start:end] * here, rtol=0, atol=1e-12)
            kept = {name: x.shape[2] for name, x in state.items() if x.ndim == 4}
            bound = max(0, window - 1) + sinks  # with the token that comes: window + sinks
            assert kept["k"] == kept["v"] and kept["k"] + kept["k_sinks"] <= max(bound, end) and kept["k"] <= n
            if end >= sinks + window:
                assert kept["k"] + kept["k_sinks"] == bound
            start = end


def test_a_decoder_streams_far_beyond_its_window_in_constant_memory(tiny):
    model = effzoo.build("gpt2", attention="streaming[window=6, sinks=2]", task="causal_lm", **tiny).double().eval()
    ids = torch.randint(2, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    cache, logits = Cache(), []
    with torch.no_grad():
        wanted = model(ids).logits
        for start in range(40):
            logits.append(model(ids[:, start : start + 1], cache=cache).logits)
            state = cache.states[0]
            assert state["k"].shape[2] <= 5 and state["k_sinks"].shape[2] <= 2
    torch.testing.assert_close(torch.cat(logits, dim=1), wanted, rtol=0, atol=1e-10)


def test_streaming_equals_scaled_dot_product_attention_under_its_mask():
    q, k, v = drawn(50)
    core = created("streaming[window=9, sinks=3]", causal=True)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=stream(50, 9, 3, True))
    torch.testing.assert_close(core(q, k, v, mask=Mask()), wanted, rtol=0, atol=1e-12)


def longnet(q, k, v, pairs, causal):
    """Equations 6 to 10 of LongNet: each pair thins out its segments, attends within each, and scatters; the outputs
    are mixed by the denominators of their softmaxes."""
    batch, heads, n, d = q.shape
    outs, denominators = [], []
    for segment, dilation in pairs:
        out, denominator = torch.zeros_like(v), torch.zeros(batch, heads, n, 1, dtype=q.dtype)
        for head in range(heads):
            for start in range(0, n, segment):
                kept = torch.arange(start, min(start + segment, n))[head % dilation :: dilation]
                scores = (q[:, head, kept] @ k[:, head, kept].mT / d**0.5).exp()
                scores = scores.tril() if causal else scores
                total = scores.sum(dim=-1, keepdim=True)
                out[:, head, kept] = scores @ v[:, head, kept] / total
                denominator[:, head, kept] = total
        outs.append(out)
        denominators.append(denominator)
    whole = sum(denominators).clamp(min=1e-300)
    return sum(out * denominator / whole for out, denominator in zip(outs, denominators, strict=True))


def counted(n, pairs, heads, causal):
    """How often each head's query counts each key."""
    counts = torch.zeros(heads, n, n)
    for segment, dilation in pairs:
        for head in range(heads):
            for i in range(n):
                for j in range(n):
                    kept = all((place % segment) % dilation == head % dilation for place in (i, j))
                    counts[head, i, j] += kept and i // segment == j // segment and (j <= i or not causal)
    return counts


PAIRS = [((4, 1), (8, 2), (32, 3)), ((8, 1),), ((6, 2), (10, 5)), ((5, 1), (5, 1)), ((64, 1), (64, 4))]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pairs", PAIRS)
def test_dilated_is_the_mixture_of_the_paper(pairs, causal):
    segments, dilations = zip(*pairs, strict=True)
    core = created(f"dilated[segments={segments}, dilations={dilations}]".replace(",)", ")"), causal=causal, heads=3)
    for n in (1, 4, 13, 37):
        leaves = drawn(n, heads=3)
        torch.testing.assert_close(core(*leaves, mask=Mask()), longnet(*leaves, pairs, causal), rtol=0, atol=1e-12)
        counts = counted(n, pairs, 3, causal)
        assert_same(core, counts, *leaves, mask=Mask())
        assert_same(core, counts * padded(n)[:, None, None], *leaves, mask=Mask(padded(n)))


def test_dilated_by_hand():
    """Segments of 4 with dilation 2: head 0 keeps places 0 and 2 of a segment, head 1 the places 1 and 3."""
    pattern = created("dilated[segments=(4,), dilations=(2,)]").pattern(6, Mask())[0]
    assert [{j for j in range(6) if row[j]} for row in pattern[0]] == [{0, 2}, set(), {0, 2}, set(), {4}, set()]
    assert [{j for j in range(6) if row[j]} for row in pattern[1]] == [set(), {1, 3}, set(), {1, 3}, set(), {5}]


def test_dilated_caches_the_longest_segment_and_no_more():
    core = created("dilated[segments=(4, 8), dilations=(1, 2)]", causal=True)
    tensors, state = [x.detach() for x in drawn(40)], None
    expected = core(*tensors, mask=Mask())
    for start in range(40):
        out, state = core.step(*(x[:, :, start : start + 1] for x in tensors), mask=Mask(), past=state)
        torch.testing.assert_close(out, expected[:, :, start : start + 1], rtol=0, atol=1e-12)
        assert state["k"].shape[2] <= 7


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("segments=(4, 8)", "as many of one as of the other, got 2 and 5"),
        ("segments=(4,), dilations=(8,)", "a dilation is at most its segment, got 8 for a segment of 4; try 4"),
    ],
)
def test_pairs_that_are_none_are_refused(options, said):
    with pytest.raises(OptionError, match=said):
        created(f"dilated[{options}]")


def theirs_drawn(layer, heads, blocks, size, random, most):
    """The random blocks of transformers [heads, blocks - 2, random] in training."""
    sizes = {"hidden_size": 4 * heads, "num_attention_heads": heads, "block_size": size, "num_random_blocks": random}
    config = transformers.BigBirdConfig(max_position_embeddings=most, **sizes)
    module, n = BigBirdBlockSparseAttention(config, layer).train(), blocks * size
    numpy.random.seed(layer)
    if n in (1024, 3072, 4096):
        found = [module._bigbird_block_rand_mask(most, most, size, size, random, last_idx=1024) for _ in range(heads)]
        return numpy.stack(found)[:, : blocks - 2]
    lengths, counts = module._get_rand_attn_plan(n, size, random)
    return numpy.stack(module._bigbird_block_rand_mask_with_head(n, n, size, size, heads, lengths, counts))


@pytest.mark.parametrize(
    ("layer", "heads", "blocks", "size", "random", "most"),
    [
        (0, 2, 12, 16, 3, 4096), (3, 1, 40, 4, 2, 160), (1, 3, 9, 5, 1, 45), (2, 2, 16, 64, 3, 4096),
        (5, 2, 48, 64, 3, 4096), (11, 2, 64, 64, 3, 4096), (4, 2, 16, 64, 2, 1024), (1, 2, 32, 32, 3, 2048),
        (0, 1, 8, 128, 1, 1024),
    ],
)  # fmt: skip
def test_random_blocks_are_those_that_transformers_draws(layer, heads, blocks, size, random, most):
    rows = most // size
    if blocks * size in (1024, 3072, 4096):
        ours = random_blocks_of_pretraining(layer, heads, rows, random, size)
    else:
        ours = random_blocks(layer, heads, rows, random)
    assert (ours[:, 1 : blocks - 1] == theirs_drawn(layer, heads, blocks, size, random, most)).all()
    core = created(f"bigbird[block={size}, random={random}]", heads=heads, layer=layer, layers=12, max_length=most)
    assert (core.drawn.numpy()[int(blocks * size in (1024, 3072, 4096))] == ours).all()


def blocks_seen(core, n, marked=()):
    """The sets of `bigbird`, pair by pair, bool[heads, n, n]."""
    size, blocks = core.block, -(-n // core.block)
    seen = torch.zeros(core.context.heads, n, n, dtype=torch.bool)
    for head in range(core.context.heads):
        for i in range(n):
            for j in range(n):
                of, to = i // size, j // size
                ends = core.ends and bool({of, to} & {0, blocks - 1})
                seen[head, i, j] = (
                    abs(of - to) <= 1 or to in core.drawn[0, head, of].tolist() or ends
                    or i in marked or j in marked or blocks <= 5 + 2 * core.random
                )  # fmt: skip
    return seen


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize(("block", "random"), [(3, 1), (2, 2), (4, 0), (1, 3)])
def test_bigbird_sees_a_window_random_blocks_and_global_ones(block, random, ends):
    core = created(f"bigbird[block={block}, random={random}, ends={str(ends).lower()}]", max_length=64)
    for n in (1, 7, 26, 40):
        leaves = drawn(n)
        assert_same(core, blocks_seen(core, n), *leaves, mask=Mask())
        marked = torch.zeros(2, n, dtype=torch.bool)
        marked[0, n // 2] = marked[1, n - 1] = True
        each = torch.stack([blocks_seen(core, n, {n // 2}), blocks_seen(core, n, {n - 1})])
        assert_same(core, each, *leaves, mask=Mask(is_global=marked))
    core = created(f"bigbird[block={block}, random={random}, ends={str(ends).lower()}]", max_length=64)
    n, lengths = 40, (40, 31)
    valid = torch.arange(n) < torch.tensor(lengths)[:, None]
    leaves = drawn(n)
    out = core(*leaves, mask=Mask(valid))
    for row, length in enumerate(lengths):  # an example has its own last block
        alone = [x[row : row + 1, :, :length] for x in leaves]
        expected = softmax(*alone, blocks_seen(core, length))
        torch.testing.assert_close(out[row : row + 1, :, :length], expected, rtol=0, atol=1e-12)


def test_bigbird_draws_as_in_pretraining_for_these_lengths_alone():
    """At 1,024 tokens other blocks are seen than at 1,040, and a padded example has those of its own length."""
    core = created("bigbird[block=16, random=2]", max_length=1100)
    leaves = drawn(1040, batch=2)
    valid = torch.arange(1040) < torch.tensor([1040, 1024])[:, None]
    out = core(*leaves, mask=Mask(valid))
    for row, n in enumerate((1040, 1024)):
        alone = [x[row : row + 1, :, :n] for x in leaves]
        torch.testing.assert_close(out[row : row + 1, :, :n], core(*alone, mask=Mask()), rtol=0, atol=1e-12)
        torch.testing.assert_close(core(*alone, mask=Mask()), core.dense(*alone, mask=Mask()), rtol=0, atol=1e-12)
    assert not core.pattern(1024, Mask())[..., :1024].equal(core.pattern(1040, Mask())[..., :1024, :1024])
    with pytest.raises(InputError, match="random blocks for max_length, 1100 tokens, got 1200; build"):
        core(*drawn(1200), mask=Mask())


class Twice(effzoo.attention.PredicateAttention):
    """A key at a distance below 3 counts twice, others of the same parity once."""

    name = "twice"
    counts_keys = True

    def visible(self, query, key):
        return 2 * ((query - key).abs() < 3).long() + ((query - key) % 2 == 0).long()


@pytest.mark.parametrize("causal", [False, True])
def test_a_predicate_may_say_how_often_a_key_counts(causal):
    core = Twice(Context(heads=2, head_dim=4, causal=causal)).double()
    for n in (1, 9, 130):
        place = torch.arange(n)
        gap = place[:, None] - place
        counts = (2 * (gap.abs() < 3) + (gap % 2 == 0)) * ((gap >= 0) | (not causal))
        assert_same(core, counts, *drawn(n), mask=Mask())
        assert_same(core, counts * padded(n)[:, None, None], *drawn(n), mask=Mask(padded(n)))


COUNTED = "bigbird[block=2, random=1, like_transformers=true]", "dilated[segments=(4, 16), dilations=(1, 2)]"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [*COUNTED, "bigbird[block=2, random=1]"])
def test_scores_are_capped_before_a_key_counts_several_times(kind, training):
    core, cap, (q, k, v) = created(kind, score_cap=0.8, max_length=64).train(training), 0.8, drawn(31)
    for mask in (Mask(), Mask(padded(31))):
        counts = core.seen_at(torch.arange(31)[None], 31, mask).double()
        weights = (cap * torch.tanh(q @ k.mT / q.shape[-1] ** 0.5 / cap)).exp() * counts
        wanted = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-300) @ v
        found = core(q, k, v, mask=mask)
        kept = torch.ones(1) if mask.valid is None else mask.valid[:, None, :, None]
        for mine, theirs in zip(
            [found * kept, *torch.autograd.grad((found * kept).pow(3).sum(), (q, k, v))],
            [wanted * kept, *torch.autograd.grad((wanted * kept).pow(3).sum(), (q, k, v))],
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


LARGE = 2**40


@pytest.mark.parametrize(
    "spec",
    [
        f"streaming[window={LARGE}, sinks={LARGE}]", f"bigbird[block={LARGE}, random={LARGE}]",
        f"bigbird[random={LARGE}, like_transformers=true]",
        f"bigbird[block=1, random={LARGE}, ends=false, max_globals={LARGE}]",
        f"dilated[segments=({LARGE},), dilations=(1,)]",
    ],
)  # fmt: skip
def test_options_far_above_the_length_are_full_attention(spec):
    core, leaves = created(spec, max_length=5000), drawn(12)
    for valid in (None, padded(12)):
        seen = torch.ones(1, 1, 12, 12) if valid is None else valid[:, None, None].double()
        assert_same(core, seen, *leaves, mask=Mask(valid))


def test_random_blocks_for_a_length_without_end_are_refused():
    with pytest.raises(OptionError, match=r"max_length=1000000000 and block=64 would draw .* give a larger block"):
        created("bigbird", max_length=10**9)


@pytest.mark.parametrize("kind", ["bigbird[block=3, random=1, like_transformers=true]", "dilated", "twice"])
def test_counts_are_computed_by_flex_attention_too(kind):
    context = Context(heads=2, head_dim=4, max_length=64, backend="flex")
    spec = "dilated[segments=(4, 16), dilations=(1, 2)]" if kind == "dilated" else kind
    core = (Twice(context) if kind == "twice" else effzoo.attention.create(spec, context)).double()
    leaves = drawn(31)
    for training in (True, False):
        core.train(training)
        for mask in (Mask(), Mask(padded(31))):
            with torch.no_grad():
                found = core(*leaves, mask=mask)
            torch.testing.assert_close(found, core.dense(*leaves, mask=mask), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("n", "block", "random", "most", "training"),
    [
        (45, 2, 2, 60, True), (45, 2, 2, 60, False), (30, 3, 1, 40, True), (18, 2, 2, 60, True),
        pytest.param(1024, 64, 2, 1024, True, marks=pytest.mark.slow),
        pytest.param(1020, 64, 3, 4096, True, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_model_of_transformers_is_the_same_in_training_and_in_evaluation(n, block, random, most, training):
    """Random blocks are drawn in training; in evaluation they are the first block; a short input is full attention."""
    torch.manual_seed(n)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "num_hidden_layers": 2}
    config = transformers.BigBirdConfig(
        vocab_size=41, max_position_embeddings=most, block_size=block, num_random_blocks=random,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes,
    )  # fmt: skip
    theirs = transformers.BigBirdModel(config).double().train(training)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    ours = effzoo.convert.from_transformers(theirs).train(training)
    ids = torch.randint(3, 41, (2, n))
    tokens = torch.arange(n) < torch.tensor([n, n - n // 4])[:, None]
    found = []
    for model in (theirs, ours):
        out = model(input_ids=ids, attention_mask=tokens.long())["last_hidden_state"][tokens]
        (out**3).sum().backward()
        embedded = model.get_input_embeddings() if model is theirs else model.embeddings.token
        found.append((out.detach(), embedded.weight.grad))
    assert theirs.attention_type == ("original_full" if n <= (5 + 2 * random) * block else "block_sparse")
    for mine, other in zip(found[1], found[0], strict=True):
        assert other.abs().max() > 0.1
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_the_random_blocks_of_training_and_evaluation_differ_as_in_transformers_and_are_the_same_here():
    leaves = drawn(60)
    for like, same_function in ((True, False), (False, True)):
        core = created(f"bigbird[block=2, random=2, like_transformers={str(like).lower()}]", max_length=60)
        outs = [core.train(training)(*leaves, mask=Mask()) for training in (True, False)]
        assert torch.equal(*outs) is same_function


SHARING = [
    "full", "longformer[window=2]", "longformer[window=6]", "longformer[window=98]", "local[chunk=4]",
    "streaming[window=3, sinks=2]", "streaming[window=99]", "bigbird[block=3, random=1]",
    "bigbird[block=3, random=1, ends=false]", "bigbird[block=30]", "dilated[segments=(4, 16), dilations=(1, 2)]",
    "blockwise[blocks=2]", "lsh[chunk=4]", "linformer[k=4]", "nystromformer[landmarks=4]", "linear",
]  # fmt: skip


@pytest.mark.parametrize("second", SHARING)
def test_layers_of_other_kinds_share_a_mask(second):
    """What a layer keeps on the mask of a batch is not taken for another's."""
    n, is_global = 31, torch.zeros(2, 31, dtype=torch.bool)
    is_global[0, 4] = is_global[1, 2] = True
    with torch.no_grad():
        later, given = created(second, max_length=64), drawn(n)
        given = given[: len(later.projections)]
        for marked in (None, is_global & padded(n)):
            alone = later(*given, mask=Mask(padded(n), marked))
            for first in SHARING:
                core, mask = created(first, max_length=64), Mask(padded(n), marked)
                core(*drawn(n)[: len(core.projections)], mask=mask)
                assert torch.equal(later(*given, mask=mask), alone), first


def test_gradients_of_several_tilings_are_summed_before_they_are_rounded():
    class Given:
        def __init__(self, value):
            self.value = value

        def backward(self, *_):
            return tuple(torch.full((1, 1, 2, 2), self.value, dtype=torch.bfloat16) for _ in range(3))

    q = torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16)
    union = Union([(Given(value), 0) for value in (1.0, 2**-8, 2**-8)])
    for gradient in union.backward(None, q, q, q, q, q, q, None):
        assert gradient.dtype == torch.bfloat16 and (gradient == 1 + 2**-7).all()  # one by one it would stay 1
