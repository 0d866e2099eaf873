"""Our Triton kernels in Triton's interpreter, against the definition in float64. `test_triton.py` runs this in a
process of its own."""

import math
import weakref

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from effzoo.attention import Context, Mask, backends, create, kernel, triton_launch
from effzoo.attention.band import Window
from effzoo.attention.part import OneTile
from effzoo.attention.triton_launch import Hashed, OnePass, TileSizes, TritonTile
from effzoo.errors import OptionError

SMALL = TileSizes(16, 16, 4, 1)
# float32 in kernels against float64: sums of some 50 products of numbers up to 4
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def qkvg(batch, heads, m, s, d, e):
    q = drawn(batch, m, heads, d).transpose(1, 2)  # heads side by side, as projections leave them
    return q, drawn(batch, heads, s, d, seed=1), drawn(batch, heads, s, e, seed=2), drawn(batch, heads, m, e, seed=3)


def seen_by(one, m, s, held=None, columns=None, batch=1):
    """bool[batch, m, s]: the words of `OnePass`, pair by pair."""
    seen = torch.zeros(batch, m, s, dtype=torch.bool)
    for b in range(batch):
        column = set() if columns is None else set(columns[b].tolist())
        for i in range(m):
            for j in range(s):
                near = True
                if one.window is not None:
                    step, gap = one.window.dilation, i // one.window.chunk - j // one.window.chunk
                    near = gap % step == 0 and (one.window.left is None or gap <= one.window.left * step)
                    near = near and (one.window.right is None or -gap <= one.window.right * step)
                ours = j in column or (near and (held is None or bool(held[b, j])))
                seen[b, i, j] = ours and (j <= i or not one.causal)
    return seen[:, None]


def defined(q, k, v, g, bias, scale=None, kept=None):
    """Output, log-sum-exp and gradients in float64; kept: M / the probability of keeping."""
    q, k, v = (x.double().detach().requires_grad_() for x in (q, k, v))
    score = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + bias.double()
    some = (score > -math.inf).any(-1, keepdim=True)
    weights = torch.where(some, score, 0.0).softmax(-1) * some
    out = (weights if kept is None else weights * kept) @ v
    return out.detach(), score.logsumexp(-1).detach(), torch.autograd.grad(out, (q, k, v), g.double())


def additive(seen):
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -math.inf)


def assert_equal(found, wanted, close=CLOSE):
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), **close)


def assert_as_defined(one, q, k, v, g, wanted, close=CLOSE, kept=None, **given):
    """The pass, given what stands last, against the definition with the additive bias `wanted`."""
    out, lse = one.forward(q, k, v, **given)
    found = one.backward(g, q, k, v, out, lse, **given)
    of_out, of_lse, gradients = defined(q, k, v, g, wanted, one.scale, kept)
    assert out.dtype == v.dtype and lse.dtype == torch.float32
    assert_equal((out, lse, *found), (of_out, of_lse, *gradients), close)
    return out, lse


SIGHTS = {
    "all": {},
    "causal": {"causal": True},
    "window": {"window": Window(5, 2)},
    "backward window, causal": {"window": Window(20, 20), "causal": True},
    "dilated": {"window": Window(2, 3, 3)},
    "strided, causal": {"window": Window(None, None, 4), "causal": True},
    "chunks": {"window": Window(1, 1, chunk=8)},
    "chunks, causal": {"window": Window(2, 0, chunk=7), "causal": True},
}


@pytest.mark.parametrize("name", SIGHTS)
@pytest.mark.parametrize("marked", ["plain", "padded", "columns"])
def test_windows(name, marked):
    batch, n = 2, 37
    one = OnePass(**SIGHTS[name], tiles=SMALL)
    held = columns = None
    if marked != "plain":
        held = torch.ones(batch, n, dtype=torch.bool)
        held[0, :9], held[1, 30:] = False, False  # holes in front: queries without a key
    if marked == "columns":
        columns = torch.tensor([[0, 33, 12], [20, n, n]])
    q, k, v, g = qkvg(batch, 1, n, n, 20, 12)
    if held is not None:  # what lies at padding is not read
        nothing = (
            ~held
            if columns is None
            else ~held & ~torch.zeros(batch, n + 1, dtype=torch.bool).scatter_(1, columns, True)[:, :n]
        )
        k, v = (x.masked_fill(nothing[:, None, :, None], math.nan) for x in (k, v))
    bias = additive(seen_by(one, n, n, held, columns, batch))
    clean = [x.nan_to_num(0.0) for x in (k, v)]
    out, lse = one.forward(q, k, v, key_mask=held, columns=columns)
    found = one.backward(g, q, k, v, out, lse, key_mask=held, columns=columns)
    of_out, of_lse, gradients = defined(q, *clean, g, bias)
    dead = of_lse == -math.inf
    assert bool(dead.any()) == (marked == "padded" and name != "all" and name != "chunks")
    assert not out[dead].any() and not found[0][dead].any()
    assert_equal((out, lse, *found), (of_out, of_lse, *gradients))


@pytest.mark.parametrize("m, s", [(1, 33), (33, 1), (17, 40)])
def test_other_numbers_of_keys_than_of_queries(m, s):
    q, k, v, g = qkvg(1, 2, m, s, 8, 8)
    for one in (OnePass(scale=0.3, tiles=SMALL), OnePass(True, Window(4, 4), tiles=SMALL)):
        assert_as_defined(one, q, k, v, g, additive(seen_by(one, m, s)))


@pytest.mark.parametrize("shape", [(2, 1, 1, 21), (1, 1, 19, 21), (2, 2, 19, 21), (1, 1, 1, 1)])
def test_a_bias(shape):
    q, k, v, g = qkvg(2, 2, 19, 21, 16, 16)
    bias = drawn(*shape, seed=5)
    if shape[-1] > 1:
        bias[..., 3:9] = -math.inf
    assert_as_defined(OnePass(tiles=SMALL), q, k, v, g, bias, bias=bias)


def widened(x):
    return (
        TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if x.dtype.scalar == tl.bfloat16
        else x
    )


@pytest.mark.parametrize("dtype, close", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision_sums_in_float32(dtype, close, monkeypatch):
    multiply = InterpreterBuilder.create_dot  # it keeps bfloat16 as whole numbers of 16 bits, and would multiply these
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: multiply(self, widened(a), widened(b), *rest)
    )
    q, k, v, g = (x.to(dtype) for x in qkvg(1, 1, 70, 70, 64, 64))
    one = OnePass(True, Window(30, 0), tiles=TileSizes(32, 16, 4, 1))
    _, lse = assert_as_defined(one, q, k, v, g, additive(seen_by(one, 70, 70)), {"rtol": close, "atol": close})
    assert_equal([lse], [defined(q, k, v, g, additive(seen_by(one, 70, 70)))[1]])


@pytest.mark.parametrize("d, e", [(1, 1), (33, 5), (128, 128), (5, 128)])
def test_widths(d, e):
    assert_as_defined(OnePass(tiles=SMALL), *qkvg(1, 1, 18, 18, d, e), torch.zeros(1, 1, 18, 18))


def philox(first, second, key):
    """Philox 2x32 with 7 rounds, in whole numbers of Python: Salmon et al. 2011."""
    for _ in range(7):
        product = first * 0xD256D193
        first, second = (product >> 32) ^ key ^ second, product & 0xFFFFFFFF
        key = (key + 0x9E3779B9) & 0xFFFFFFFF
    return first


def test_philox_is_the_published_one():
    # known answers of Random123 for philox2x32 with 7 rounds
    assert philox(0, 0, 0) == 0x257A3673 and philox(0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF) == 0xAB302C4D


def drawn_mask(one, batch, heads, m, s):
    keep = min(round((1 - one.dropout) * 2**31), 2**31 - 1)
    kept = torch.zeros(batch, heads, m, s, dtype=torch.float64)
    for row in range(batch * heads):
        of_head = philox(one.seed % 2**31, row, one.seed // 2**31)
        for i in range(m):
            for j in range(s):
                kept[row // heads, row % heads, i, j] = (philox(i, j, of_head) >> 1) < keep
    return kept * 2**31 / keep


@pytest.mark.parametrize("name", ["all", "dilated", "chunks, causal"])
def test_dropout_drops_the_same_weights_backward(name):
    n, columns = 35, torch.tensor([[4, 30], [35, 0]])
    one = OnePass(**SIGHTS[name], dropout=0.3, seed=2**40 + 3, tiles=SMALL)
    bias, kept = additive(seen_by(one, n, n, None, columns, 2)), drawn_mask(one, 2, 2, n, n)
    assert abs(float((kept > 0).double().mean()) - 0.7) < 0.03
    q, k, v, g = qkvg(2, 2, n, n, 8, 8)
    assert_as_defined(one, q, k, v, g, bias, kept=kept, columns=columns)


def test_dropout_does_not_depend_on_the_tiles():
    q, k, v, _ = qkvg(1, 2, 40, 40, 8, 8)
    outs = [
        OnePass(dropout=0.5, seed=seed, tiles=tiles).forward(q, k, v)[0]
        for seed, tiles in ((1, SMALL), (1, TileSizes(32, 64, 4, 1)), (2, SMALL))
    ]
    torch.testing.assert_close(outs[0], outs[1])
    assert (outs[0] - outs[2]).abs().max() > 0.1


def test_parts_merge():
    """A window, and a memory that all queries see: each backward with the output and log-sum-exp of both."""
    q, k, v, g = qkvg(1, 2, 30, 30, 16, 16)
    memory = drawn(1, 2, 5, 16, seed=7), drawn(1, 2, 5, 16, seed=8)
    near, far = OnePass(window=Window(3, 3), tiles=SMALL), OnePass(tiles=SMALL)
    held = torch.ones(1, 30, dtype=torch.bool)
    held[:, 20:] = False
    (one_out, one_lse), (two_out, two_lse) = near.forward(q, k, v, key_mask=held), far.forward(q, *memory)
    out, lse = kernel.merge((one_out, one_lse[..., None]), (two_out, two_lse[..., None]))
    one, two = near.backward(g, q, k, v, out, lse[..., 0], key_mask=held), far.backward(g, q, *memory, out, lse[..., 0])
    keys, values = torch.cat([k, memory[0]], dim=2), torch.cat([v, memory[1]], dim=2)
    bias = torch.cat([additive(seen_by(near, 30, 30, held)), torch.zeros(1, 1, 30, 5)], dim=-1)
    of_out, of_lse, (of_q, of_k, of_v) = defined(q, keys, values, g, bias)
    assert_equal((out, lse[..., 0], one[0] + two[0]), (of_out, of_lse, of_q))
    assert_equal((*one[1:], *two[1:]), (of_k[:, :, :30], of_v[:, :, :30], of_k[:, :, 30:], of_v[:, :, 30:]))


def test_the_gradient_of_a_column_is_added_up_in_parts(monkeypatch):
    monkeypatch.setattr(triton_launch, "SPAN", 16)
    one, columns = OnePass(True, Window(2, 0, 2), tiles=SMALL), torch.tensor([[0, 21, 50], [50, 7, 3]])
    assert_as_defined(one, *qkvg(2, 2, 50, 50, 8, 8), additive(seen_by(one, 50, 50, None, columns, 2)), columns=columns)


def test_a_kernel_of_tiles():
    q, k, v, g = qkvg(1, 2, 20, 20, 8, 8)
    bias = additive(torch.arange(20) % 3 > 0)[None, None, None].float()
    tiling, own = OneTile(True), TritonTile()
    out, lse = tiling.forward(own, q, k, v, bias)
    found = tiling.backward(own, g, q, k, v, out, lse, bias)
    of_out, of_lse, gradients = defined(q, k, v, g, additive(torch.ones(20, 20, dtype=torch.bool).tril()) + bias)
    assert_equal((out, lse[..., 0], *found), (of_out, of_lse, *gradients))


def test_nothing_to_see_and_nobody_to_look():
    for m, s in ((3, 0), (0, 3)):
        q, k, v, g = qkvg(1, 1, m, s, 8, 8)
        out, lse = OnePass(tiles=SMALL).forward(q, k, v)
        found = OnePass(tiles=SMALL).backward(g, q, k, v, out, lse)
        assert not out.any() and (lse == -math.inf).all() and not any(x.any() for x in found)


def test_what_is_refused():
    wide, double = drawn(1, 1, 4, 200), drawn(1, 1, 4, 8, dtype=torch.float64)
    with pytest.raises(OptionError, match="heads of at most 128 numbers, not 200"):
        OnePass().forward(wide, wide, wide)
    with pytest.raises(OptionError, match=r"no torch\.float64"):
        OnePass().forward(double, double, double)
    with pytest.raises(OptionError, match=r"of one dtype, got torch\.float32, torch\.float16 and torch\.float32"):
        OnePass().forward(wide[..., :8], wide[..., :8].half(), wide[..., :8])
    with pytest.raises(OptionError, match=r"below 1, got 1\.0"):
        OnePass(dropout=1.0).forward(*(drawn(1, 1, 4, 8),) * 3)


OPTIONS = [
    "",
    "within_buckets=true",
    "count_once=true, look_back=0",
    "within_buckets=true, count_once=true, look_forward=1",
    "stable=true, count_once=true",
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_rounds_of_hashing(options, causal):
    """Against the kind's own plain rounds: gathered, masked by a bias, merged."""
    n, length = 27, 20
    spec = ", ".join(filter(None, ("rounds=2, chunk=6, buckets=4", options)))
    core = create(f"lsh[{spec}]", Context(heads=1, head_dim=8, causal=causal, max_length=32)).double()
    valid = torch.arange(n) < torch.tensor([n, length])[:, None]
    qk, v, g = (drawn(2, 1, n, 8, seed=seed) for seed in range(3))
    k, buckets = core._keys(qk.double()).float(), core._buckets(qk.double(), Mask(valid))
    one = Hashed(
        core.chunk,
        core.before,
        core.after,
        core.within_buckets,
        core.count_once,
        core.stable,
        causal,
        scale=1.0,
        tiles=SMALL,
    )
    out, lse = one.forward(qk, k, v, buckets, valid)
    found = one.backward(g, qk, k, v, out, lse, buckets, valid)
    leaves = [x.double().requires_grad_() for x in (qk, k, v)]
    part = core.part(*leaves, buckets)
    of_out, of_lse = kernel.attended(part, backend="reference")
    assert_equal(
        (out, lse, *found), (of_out.detach(), of_lse[..., 0], *torch.autograd.grad(of_out, leaves, g.double()))
    )


def test_rounds_of_hashing_with_a_memory_and_dropout():
    """The derivative along a direction equals the difference of two forward passes that drop the same weights; memory
    is a part of its own."""
    n, buckets = 20, torch.randint(3, (3, 1, 2, 20), generator=torch.Generator().manual_seed(0))
    q, k, v, g = qkvg(1, 2, n, n, 8, 8)
    one = Hashed(4, within=True, dropout=0.25, seed=11, tiles=SMALL)
    memory = drawn(1, 2, 3, 8, seed=7), drawn(1, 2, 3, 8, seed=8)

    def whole(q, k, v):
        (near, near_lse), (far, far_lse) = one.forward(q, k, v, buckets), OnePass(tiles=SMALL).forward(q, *memory)
        return kernel.merge((near, near_lse[..., None]), (far, far_lse[..., None]))

    out, lse = whole(q, k, v)
    of_q, of_k, of_v = one.backward(g, q, k, v, out, lse[..., 0], buckets)
    for place, gradient in ((1, of_k), (2, of_v)):
        direction, step = drawn(1, 2, n, 8, seed=9), 1e-2
        moved = [
            [x + sign * step * direction if index == place else x for index, x in enumerate((q, k, v))]
            for sign in (1, -1)
        ]
        slope = sum(sign * float((whole(*x)[0].double() * g).sum()) for sign, x in zip((1, -1), moved, strict=True)) / (
            2 * step
        )
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=2e-3, abs=2e-3)
    assert (
        of_q.isfinite().all()
        and (one.forward(q, k, v, buckets)[0] - Hashed(4, within=True, tiles=SMALL).forward(q, k, v, buckets)[0])
        .abs()
        .max()
        > 0.1
    )


def test_parts_of_the_one_softmax_are_what_kinds_make():
    """Longformer's own rows in one pass: its window and its global columns, against the kind itself."""
    n, heads = 40, 2
    core = create(
        "longformer[window=6, global_projections=false]", Context(heads=heads, head_dim=8, causal=True, max_length=64)
    ).double()
    valid, is_global = torch.arange(n)[None] < 33, (torch.arange(n) % 17 == 3)[None]
    q, k, v, _ = qkvg(1, heads, n, n, 8, 8)
    one = OnePass(True, core.window_of(0), tiles=SMALL)
    out, _ = one.forward(q, k, v, key_mask=valid, columns=torch.tensor([[3, 20, n]]))
    mask = Mask(valid, is_global & valid)
    whole = core.dense(q.double(), k.double(), v.double(), mask=mask)
    rows = ~is_global[0] & valid[0]
    assert_equal([out[:, :, rows]], [whole[:, :, rows]])


@pytest.fixture
def launched(monkeypatch):
    """The backend on the CPU; what every launch of a kernel was given."""
    monkeypatch.setitem(backends.TAKES, ("triton", "cpu"), backends.HALF + backends.SINGLE)
    calls, start = [], triton_launch.started

    def started(name, programs, device, given):
        calls.append({"kernel": name, **given})
        start(name, programs, device, given)

    monkeypatch.setattr(triton_launch, "started", started)
    return calls


KINDS = {  # and what of it the kernels compute in one pass
    "full": None,
    "longformer[window=6]": "Columns",
    "longformer[window=4, dilation=(1, 3)]": "Columns",
    "longformer[window=6, global_projections=false]": "Columns",
    "local[chunk=5]": "WINDOW",
    "streaming[window=4, sinks=3]": "Columns",
    "local[chunk=4, look_back=0, look_forward=1]": "WINDOW",
    "local[chunk=4, circular=true, look_forward=1]": None,
    "blockwise[blocks=3]": None,
    "blockwise[block=8, blocks=5]": None,
    "linformer[k=4]": None,
    "perceiver[latents=3]": None,
    "lsh[rounds=2, chunk=4]": "Order",
    "lsh[rounds=1, chunk=4, look_forward=1, buckets=4]": "Order",
    "lsh[rounds=2, chunk=4, count_once=true]": "Order",
    "lsh[rounds=2, chunk=4, within_buckets=true, buckets=4]": "Order",
    "lsh[rounds=2, chunk=4, stable=true, count_once=true, buckets=4]": "Order",
    "lsh[rounds=2, chunk=4, circular=true]": None,
}
CAUSAL = [kind for kind in KINDS if not kind.startswith(("linformer", "perceiver"))]


def pair(kind, n=23, **context):
    """A kind in float32 by the kernels, and in float64."""
    single, double = (
        create(kind, Context(heads=2, head_dim=6, max_length=n, **context, **own))
        for own in ({"backend": "triton"}, {})
    )
    double.load_state_dict(single.state_dict())
    return single.eval(), double.double().eval()


def given_to(core, mask, n=23):
    used = core.uses(mask)
    return [
        drawn(2, n, 2, 6, seed=seed).transpose(1, 2) if name in used else None
        for seed, name in enumerate(core.projections)
    ]


def leaves_of(given, dtype):
    return [None if x is None else x.detach().to(dtype).requires_grad_() for x in given]


@pytest.mark.parametrize(
    ("kind", "causal"),
    [
        *((kind, index % 2 == 1 and kind in CAUSAL) for index, kind in enumerate(KINDS)),
        *((kind, True) for kind in CAUSAL[::4]),
    ],
)
def test_whole_kinds_by_the_kernels(kind, causal, launched):
    """Padding, global tokens and a prefix, forward and backward: the definition in float64."""
    single, double = pair(kind, causal=causal)
    is_global = (torch.arange(23) % 11 == 3).expand(2, 23).clone()
    is_global[1] &= torch.arange(23) < 5
    mask = Mask(
        torch.arange(23) < torch.tensor([23, 15])[:, None], is_global if single.knows_globals() else None, decisions={}
    )
    prefix, given, results = (drawn(2, 5, 6, seed=20), drawn(2, 5, 6, seed=21)), given_to(single, mask), []
    for run, dtype in ((single, torch.float32), (double.dense, torch.float64)):
        leaves, memory = leaves_of(given, dtype), leaves_of(prefix, dtype)
        out = run(*leaves, mask=mask, memory=tuple(memory))
        wanted = [x for x in (*leaves, *memory) if x is not None]
        found = torch.autograd.grad(out, wanted, drawn(*out.shape, seed=30).to(dtype), allow_unused=True)
        results.append([out, *(torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True))])
    assert_equal(*results)
    whole = [call for call in launched if call["Order"] is not None or call["Columns"] is not None or call["WINDOW"]]
    sort = KINDS[kind]
    assert bool(whole) == (sort is not None) and (
        sort is None or any(call[sort] is not None and call[sort] is not False for call in whole)
    )


@pytest.mark.parametrize(
    "kind", ["full", "longformer[window=4, dilation=(1, 3)]", "local[chunk=5]", "lsh[rounds=2, chunk=4]"]
)
def test_decoding_by_the_kernels(kind, launched):
    single, double = pair(kind, causal=True)
    given = given_to(single, Mask())
    _, past = single.step(*(None if x is None else x[:, :, :22] for x in given), mask=Mask(), past=None)
    last, _ = single.step(*(None if x is None else x[:, :, 22:] for x in given), mask=Mask(), past=past)
    wanted = double.dense(*(None if x is None else x.double() for x in given), mask=Mask())
    assert_equal([last], [wanted[:, :, 22:]])


@pytest.mark.parametrize(
    "kind",
    ["full", "longformer[window=4, dilation=(1, 3)]", "local[chunk=5]", "lsh[rounds=2, chunk=4, count_once=true]"],
)
def test_whole_kinds_drop_the_same_weights_backward(kind, launched):
    """The derivative along a direction equals the difference of two forward passes with the same seed."""
    core, _ = pair(kind, dropout=0.25)
    core.train()
    valid, is_global = torch.arange(23) < torch.tensor([23, 15])[:, None], (torch.arange(23) == 3).expand(2, 23)
    mask = Mask(valid, is_global if core.knows_globals() else None, decisions={})
    given, prefix = given_to(core, mask), (drawn(2, 5, 6, seed=20), drawn(2, 5, 6, seed=21))

    def run(*leaves):
        torch.manual_seed(5)
        left = iter(leaves)
        return core(*(None if x is None else next(left) for x in given), mask=mask, memory=prefix)

    leaves = [x for x in leaves_of(given, torch.float32) if x is not None]
    out, directions = run(*leaves), [drawn(*x.shape, seed=40 + index) for index, x in enumerate(leaves)]
    g = drawn(*out.shape, seed=30)
    gradients = torch.autograd.grad(out, leaves, g)
    assert {"DROPOUT": True}.items() <= launched[0].items() and (out - run(*leaves)).abs().max() == 0
    assert (out - core.eval()(*given, mask=mask, memory=prefix)).abs().max() > 0.1
    core.train()
    with torch.no_grad():
        moved = [
            run(*(x + sign * 1e-2 * direction for x, direction in zip(leaves, directions, strict=True)))
            for sign in (1, -1)
        ]
    slope = float(((moved[0] - moved[1]).double() * g).sum()) / 2e-2
    assert slope == pytest.approx(
        sum(float((x * y).sum()) for x, y in zip(gradients, directions, strict=True)), rel=5e-3
    )


def test_no_dropout_no_bias_and_no_gathered_column_is_kept(launched):
    """Of a band with padding, global tokens and dropout, the backward pass needs q, k, v, out, the log-sum-exp, which
    keys are held, and where the columns are."""
    core, _ = pair("longformer[window=6, global_projections=false]", dropout=0.1)
    mask = Mask(torch.arange(23) < torch.tensor([23, 15])[:, None], (torch.arange(23) == 3).expand(2, 23), decisions={})
    q, k, v = leaves_of(given_to(core, mask), torch.float32)
    held = weakref.WeakSet()

    class Held:
        def __init__(self, x):
            self.storage = x.untyped_storage()
            held.add(self)

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda x: x):
        core.train()
        out = core.attend(core.part(q, k, v, *core.tile_inputs(mask, 2, 23), mask=mask), core._beside(q, k, v, mask))
    sizes = {x.storage.data_ptr(): x.storage.nbytes() for x in held}
    assert out.requires_grad and sum(sizes.values()) == 4 * q.numel() * 4 + 2 * 2 * 23 * 4 + 2 * 23 + 2 * 1 * 8


def test_what_a_kind_cannot_have_is_said(launched):
    core = create("full", Context(heads=1, head_dim=200, backend="triton"))
    x = drawn(1, 1, 4, 200)
    with pytest.raises(
        OptionError,
        match="backend 'triton' cannot run here: .*heads of at most 128 numbers, not 200; use backend='auto'",
    ):
        core(x, x, x, mask=Mask())
    core = create("full", Context(heads=1, head_dim=8, backend="triton"))
    x = drawn(1, 1, 4, 8, dtype=torch.float64)
    with pytest.raises(
        OptionError, match="backend 'triton' cannot run here: on cpu it takes bfloat16, float16, float32, got float64"
    ):
        core(x, x, x, mask=Mask())
