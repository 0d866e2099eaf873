"""Blockwise attention: the dense definition over drawn permutations, the lecture's tables, heads per permutation, short
and ragged inputs."""

import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effzoo
from effzoo.attention import Context, Mask
from effzoo.attention.reference import dense
from effzoo.errors import InputError, OptionError
from effzoo.spec import parse_one


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


def core(heads=2, max_length=24, causal=False, backend="auto", dropout=0.0, **options):
    return effzoo.attention.create(
        {"name": "blockwise", **options}, Context(heads, 4, causal, dropout, max_length=max_length, backend=backend)
    )


@st.composite
def cases(draw_):
    """(core, batch, n, kept, rows of memory, seed)"""
    blocks, heads = draw_(st.integers(1, 6)), draw_(st.integers(1, 4))
    permutations = draw_(st.lists(st.permutations(range(1, blocks + 1)), min_size=1, max_size=heads))
    block = draw_(st.none() | st.integers(1, 12))
    made = core(
        heads,
        draw_(st.integers(1, 40)),
        draw_(st.booleans()),
        draw_(st.sampled_from(["auto", "reference"])),
        blocks=blocks,
        block=block,
        permutations=permutations,
    )
    n = draw_(st.integers(1, min(40, 40 if made.block is None else made.block * blocks)))
    return (
        made,
        draw_(st.integers(1, 3)),
        n,
        draw_(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
        draw_(st.sampled_from([0, 0, 3])),
        draw_(st.integers(0, 999)),
    )


@settings(max_examples=300, deadline=None)
@given(cases())
def test_equals_its_dense_definition(case):
    made, batch, n, kept, rows, seed = case
    heads = made.context.heads
    leaves = [draw(seed + i, batch, heads, n, 4) for i in range(3)]
    memory = (draw(seed + 3, heads, rows, 4), draw(seed + 4, heads, rows, 4)) if rows else None
    mask = Mask(None if kept == 1 else torch.rand(batch, n, generator=torch.Generator().manual_seed(seed)) < kept)
    out, expected = (f(*leaves, mask=mask, memory=memory) for f in (made, made.dense))
    assert_same(out, expected, [*leaves, *(memory or ())])


@pytest.mark.parametrize(
    "permutations", [((1, 2), (2, 1)), ((1, 2, 3), (2, 3, 1), (3, 1, 2)), ((3, 1, 2), (1, 3, 2)), ((4, 3, 1, 2),)]
)
def test_the_definition_counts_by_hand(permutations):
    """Two tokens per block: a token of block i sees the two of block p(i), counted from 1 as in the lecture."""
    blocks = len(permutations[0])
    seen = core(len(permutations), 2 * blocks, blocks=blocks, permutations=permutations).pattern(2 * blocks, Mask())
    for head, permutation in enumerate(permutations):
        for i in range(2 * blocks):
            first = 2 * (permutation[i // 2] - 1)
            assert seen[0, head, i].nonzero().flatten().tolist() == [first, first + 1]


def test_seven_tokens_in_three_blocks_leave_a_last_block_of_one_and_causal_rows_without_keys():
    """max_length 7 and 3 blocks of 3: the shift (2, 3, 1) pairs 0-2 with 3-5, 3-5 with 6, and 6 with 0-2; only the last
    looks back."""
    sees = {}
    for causal in (False, True):
        row = core(1, 7, causal, blocks=3, permutations=((2, 3, 1),)).pattern(7, Mask())[0, 0]
        sees[causal] = [row[i].nonzero().flatten().tolist() for i in range(7)]
    assert sees[False] == [[3, 4, 5]] * 3 + [[6]] * 3 + [[0, 1, 2]]
    assert sees[True] == [[]] * 6 + [[0, 1, 2]]
    out = core(1, 7, True, blocks=3, permutations=((2, 3, 1),))(*(draw(i, 1, 1, 7, 4) for i in range(3)), mask=Mask())
    assert (out[:, :, :6] == 0).all() and (out[:, :, 6] != 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 5, 24])
def test_one_block_is_full_attention(n, causal):
    leaves = [draw(i, 2, 2, n, 4) for i in range(3)]
    full = effzoo.attention.create("full", Context(2, 4, causal))
    assert_same(core(causal=causal, blocks=1)(*leaves, mask=Mask()), full(*leaves, mask=Mask()), leaves)


def test_identity_makes_blocks_independent_and_each_is_full_attention():
    made, leaves = core(1, blocks=4, permutations=((1, 2, 3, 4),)), [draw(i, 2, 1, 21, 4) for i in range(3)]
    out = made(*leaves, mask=Mask())
    for start in range(0, 21, 6):
        part = [x[:, :, start : start + 6] for x in leaves]
        assert_same(out[:, :, start : start + 6], dense(*part, torch.ones(1, dtype=torch.bool)), leaves)


def test_shifts_over_layers_reach_every_block():
    """The composition of the cyclic shift with itself: after as many layers as blocks less one, block 1 has read from
    every block."""
    pattern = core(2, 8, blocks=4).pattern(8, Mask())[0].any(dim=0).double()  # identity and one shift
    assert (pattern[0] > 0).sum() == 4 and (torch.linalg.matrix_power(pattern, 3)[0] > 0).all()


@pytest.mark.parametrize(
    ("heads", "blocks", "groups"),
    [
        (12, 2, (10, 2)),
        (12, 3, (8, 2, 2)),
        (12, 1, (12,)),
        (2, 2, (1, 1)),
        (2, 4, (1, 1)),
        (1, 3, (1,)),
        (12, 12, (1,) * 12),
        (4, 3, (2, 1, 1)),
        (24, 2, (20, 4)),
    ],
)
def test_heads_are_spread_over_the_identity_and_the_shifts_as_in_the_paper(heads, blocks, groups):
    shifts = [tuple((i + shift) % blocks for i in range(blocks)) for shift in range(len(groups))]
    expected = tuple(itertools.chain.from_iterable([shift] * size for shift, size in zip(shifts, groups, strict=True)))
    assert core(heads, blocks=blocks).permutations == expected
    assert core(heads, blocks=blocks, groups=groups).permutations == expected


def test_the_spec_string_writes_permutations_as_the_lecture_does_and_reads_them_back():
    spec = parse_one("blockwise[blocks=3, permutations=((1,2,3),(2,3,1)), groups=(3,1)]")
    assert (
        spec.options == {"blocks": 3, "permutations": ((1, 2, 3), (2, 3, 1)), "groups": (3, 1)}
        and parse_one(str(spec)) == spec
    )
    single = parse_one("blockbert[permutations=((2,1),)]")
    assert single.options["permutations"] == ((2, 1),) and parse_one(str(single)) == single
    assert effzoo.attention.create(spec, Context(4, 4)).permutations == ((0, 1, 2),) * 3 + ((1, 2, 0),)
    assert effzoo.attention.create("blockwise[blocks=2,permutations=((1,2),(2,1))]", Context(2, 4)).permutations == (
        (0, 1),
        (1, 0),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 0}, "blocks is at least 1, got 0"),
        ({"block": 0}, "block is at least 1, got 0"),
        (
            {"permutations": ((1, 2), (2, 2))},
            "a permutation of 2 blocks holds each of \\(1, 2\\) once, got \\(2, 2\\); try \\(2, 1\\), or blocks=2",
        ),
        ({"permutations": ((1, 2, 3),)}, "each of \\(1, 2\\) once, got \\(1, 2, 3\\).*or blocks=3"),
        ({"permutations": ((0, 1),)}, "each of \\(1, 2\\) once, got \\(0, 1\\)"),
        ({"permutations": ()}, "permutations is empty; give at least one of 2 blocks, such as \\(\\(1, 2\\),\\)"),
        ({"permutations": (1, 2)}, "takes a list of a list of int or none, got \\(1, 2\\)"),
        ({"groups": (3, 2)}, "2 numbers of at least 1 that sum to the 4 heads, got \\(3, 2\\); try \\(3, 1\\)"),
        ({"groups": (4,)}, "2 numbers of at least 1 that sum to the 4 heads, got \\(4,\\); try \\(3, 1\\)"),
        ({"groups": (4, 0)}, "got \\(4, 0\\); try \\(3, 1\\)"),
        ({"permutations": ((1, 2),) * 5}, "5 numbers .* try at most 4 permutations"),
    ],
)
def test_options_that_cannot_be_are_refused_with_what_can(options, message):
    with pytest.raises(OptionError, match=message):
        core(4, **options)


@pytest.mark.parametrize(("causal", "options"), [(True, {}), (False, {"block": 12})])
def test_an_input_longer_than_its_blocks_is_refused_where_blocks_are_places(causal, options):
    with pytest.raises(
        InputError,
        match="2 blocks of 12 positions, 24 in all, got 25; build the model with max_length=25, or with block=13",
    ):
        core(causal=causal, **options)(*(draw(i, 1, 2, 25, 4) for i in range(3)), mask=Mask())


@pytest.mark.parametrize("lengths", [(25, 25), (24, 7), (1, 5), (26, 13)])
def test_blocks_are_shares_of_each_row_however_long_the_model_may_read(lengths):
    """Three blocks of a row of n tokens hold ceil(n / 3) each: written out token by token."""
    made, n = core(2, 8, blocks=3, permutations=((1, 2, 3), (3, 1, 2))), max(lengths)
    leaves = [draw(i, 2, 2, n, 4) for i in range(3)]
    allowed = torch.zeros(2, 2, n, n, dtype=torch.bool)
    for row, length in enumerate(lengths):
        size = -(-length // 3)
        for head, permutation in enumerate(((0, 1, 2), (2, 0, 1))):
            for i in range(length):
                for j in range(length):
                    allowed[row, head, i, j] = j // size == permutation[i // size]
    valid = torch.arange(n) < torch.tensor(lengths)[:, None]
    rows = valid[:, None, :, None]
    assert_same(made(*leaves, mask=Mask(valid)) * rows, dense(*leaves, allowed) * rows, leaves)


def test_heads_that_see_nothing_are_named_once():
    """Four blocks of 6 places in a causal model, and 6 tokens: the head with a shift looks at the blocks after the
    first."""
    made = core(2, 24, True, blocks=4)
    with pytest.warns(UserWarning, match=r"heads \[1\] of layer 0 see nothing in an input of 1 of 4 blocks"):
        out = made(*(draw(i, 1, 2, 6, 4) for i in range(3)), mask=Mask())
    assert (out[:, 1] == 0).all() and (out[:, 0] != 0).all()
    with warnings.catch_warnings(record=True) as again:
        warnings.simplefilter("always")
        made(*(draw(i, 1, 2, 6, 4) for i in range(3)), mask=Mask())
        # shares of 6 tokens: every head sees some
        out = core(2, 24, blocks=4)(*(draw(i, 1, 2, 6, 4) for i in range(3)), mask=Mask())
    assert not again and (out[:, :, :4] != 0).all()


@pytest.mark.parametrize("block", [None, 6])
def test_decoding_with_blocks_of_places_equals_the_forward_pass(block):
    made, leaves = core(2, 24, True, blocks=4, block=block), [draw(i, 2, 2, 24, 4) for i in range(3)]
    whole, state, found = made(*leaves, mask=Mask()), None, []
    for start, end in ((0, 5), (5, 6), (6, 13), (13, 24)):
        out, state = made.step(*(x[:, :, start:end] for x in leaves), mask=Mask(), past=state)
        found.append(out)
    assert_same(torch.cat(found, dim=2), whole, leaves)


@pytest.mark.parametrize("causal", [False, True])
def test_a_batch_of_ragged_rows_equals_each_alone(causal):
    """Lengths inside the first block, at a boundary, and in the last block."""
    made, lengths = core(3, 20, causal, blocks=4), (20, 12, 10, 5, 3, 1)
    leaves = [draw(i, len(lengths), 3, 20, 4) for i in range(3)]
    together = made(*leaves, mask=Mask(torch.arange(20) < torch.tensor(lengths)[:, None]))
    for row, n in enumerate(lengths):
        assert_same(
            together[row : row + 1, :, :n], made(*(x[row : row + 1, :, :n] for x in leaves), mask=Mask()), leaves
        )


def test_a_causal_output_stays_when_the_sequence_grows():
    made, leaves = core(3, 20, True, blocks=4), [draw(i, 1, 3, 20, 4) for i in range(3)]
    whole = made(*leaves, mask=Mask())
    for n in range(1, 20):
        assert torch.allclose(made(*(x[:, :, :n] for x in leaves), mask=Mask()), whole[:, :, :n], rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [24, 23])
def test_blocks_without_padding_need_no_mask(causal, n):
    """And each permutation is computed by itself, its blocks together."""
    made = core(4, 24, causal=causal, blocks=3)
    found = made.tilings(n, Mask(), torch.device("cpu"))
    assert [heads for heads, _ in found] == [[0, 1], [2], [3]]
    for heads, tiling in found:
        assert all(run.allowed is None for run in tiling.runs)
        pairs = sum(run.queries.count * run.queries.length * run.keys.length / (1 + run.causal) for run in tiling.runs)
        seen = int(made.pattern(n, Mask())[0, heads[0]].sum())
        assert pairs <= seen


@pytest.mark.parametrize("causal", [False, True])
def test_values_may_be_wider_than_keys_and_strided(causal):
    leaves = [draw(0, 2, 13, 3, 4), draw(1, 2, 13, 3, 4), draw(2, 2, 13, 3, 7)]
    made, projected = core(3, causal=causal, blocks=3), [x.transpose(1, 2) for x in leaves]
    assert_same(made(*projected, mask=Mask()), made.dense(*projected, mask=Mask()), leaves)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_it_compiles_whole(causal, padded):
    made, leaves = core(3, 20, causal, blocks=4), [draw(i, 2, 3, 17, 4) for i in range(3)]
    valid = torch.arange(17) < torch.tensor([17, 6])[:, None] if padded else None
    compiled = torch.compile(lambda *x: made(*x, mask=Mask(valid)), fullgraph=True, backend="aot_eager")
    assert_same(compiled(*leaves), made(*leaves, mask=Mask(valid)), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_stay_near_float64(dtype):
    tensors = [draw(i, 2, 3, 17, 4).detach() for i in range(3)]
    for causal in (False, True):
        made = core(3, causal=causal, blocks=4)
        out = made(*(x.to(dtype) for x in tensors), mask=Mask())
        assert (
            out.dtype == dtype
            and (out.double() - made(*tensors, mask=Mask())).abs().max() < 10 * torch.finfo(dtype).eps
        )


@pytest.mark.slow
def test_dropout_acts_on_the_weights_in_training_only():
    tensors = [draw(i, 2, 3, 17, 4).detach() for i in range(3)]
    plain, dropping = core(3, blocks=4), core(3, blocks=4, dropout=0.5)
    expected = plain(*tensors, mask=Mask())
    assert torch.allclose(dropping.eval()(*tensors, mask=Mask()), expected, rtol=0, atol=1e-12)
    dropping.train()
    drawn = torch.stack([dropping(*tensors, mask=Mask()) for _ in range(2000)])
    assert not torch.allclose(drawn[0], drawn[1])
    # kept weights are scaled up: right on average
    assert ((drawn.mean(dim=0) - expected).abs() <= 6 * drawn.std(dim=0) / 2000**0.5 + 1e-12).all()


def test_memory_grows_linearly_with_the_sequence_at_a_fixed_block():
    """No tensor of a forward and backward is larger than a small multiple of q: nothing n x n, nor blocks x n."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.numel())
            return out

    for causal in (False, True):
        for n in (512, 2048):
            made, leaves = core(2, n, causal, blocks=n // 64), [draw(i, 1, 2, n, 4) for i in range(3)]
            with Largest() as largest:
                made(*leaves, mask=Mask(torch.ones(1, n, dtype=torch.bool))).sum().backward()
            assert largest.size <= 2 * leaves[0].numel(), (causal, n)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tiles_that_were_found_in_inference_mode_serve_training(backend):
    made, tensors = core(blocks=3, backend=backend, max_length=30), [draw(i, 2, 2, 29, 4) for i in range(3)]
    with torch.inference_mode():
        expected = made(*tensors, mask=Mask())
    out = made(*tensors, mask=Mask())
    out.sum().backward()
    assert torch.equal(out, expected) and all(x.grad is not None and x.grad.abs().max() > 0 for x in tensors[2:])
