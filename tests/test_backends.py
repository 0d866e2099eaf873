"""Backends for CUDA without CUDA: shapes on tensors without values, and values by doubles of the operators with their
demands (tests/doubles.py)."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import AuxOutput, flex_attention
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import effzoo
from effzoo.attention import Context, Mask, backends, choose, flex, tile_map
from effzoo.attention.cuda import Efficient, FlashCuda
from effzoo.attention.kernel import attend
from effzoo.attention.part import Part, Tile, bias_of
from effzoo.errors import OptionError
from tests.doubles import calls, on

KINDS = [
    "full", "longformer[window=6]", "longformer[window=4,dilation=(1,3)]", "local[chunk=4]", "blockwise[blocks=3]",
    "lsh[rounds=2,chunk=4]",
    "lsh[rounds=2,chunk=4,stable=true,count_once=true]", "linformer[k=4]", "perceiver[latents=3]",
]  # fmt: skip
CAUSAL = KINDS[:-2]


def built(kind, **context):
    return effzoo.attention.create(kind, Context(heads=2, head_dim=6, max_length=21, **context)).double()


def inputs(core, mask, n=21):
    used = core.uses(mask)
    return [
        torch.randn(2, 2, n, 6, dtype=torch.float64, requires_grad=True) if name in used else None
        for name in core.projections
    ]


def gradients(out, leaves, direction):
    return [
        torch.zeros_like(x) if g is None else g
        for x, g in zip(leaves, torch.autograd.grad(out, leaves, direction, allow_unused=True), strict=True)
    ]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("kind", "backend"), [*((kind, "efficient") for kind in KINDS), *((kind, "xformers") for kind in KINDS[:7])]
)
def test_every_kind_is_its_definition_by_memory_efficient_attention(kind, backend, causal):
    """With padding, a prefix and global tokens; no plain path is taken."""
    if causal and kind not in CAUSAL:
        return
    with on(backend) as name:
        core = built(kind, causal=causal, backend=name)
        valid = torch.arange(21) < torch.tensor([21, 13])[:, None]
        is_global = (torch.arange(21) == 3).expand(2, 21) if core.knows_globals() else None
        memory = tuple(torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
        for mask in (Mask(decisions={}), Mask(valid, is_global, decisions={})):
            given = inputs(core, mask)
            leaves = [x for x in (*given, *memory) if x is not None]
            out, wanted = (run(*given, mask=mask, memory=memory) for run in (core, core.dense))
            assert (out - wanted).abs().max() < 1e-10
            direction = torch.randn_like(out)
            for mine, theirs in zip(
                gradients(out, leaves, direction), gradients(wanted, leaves, direction), strict=True
            ):
                assert (mine - theirs).abs().max() < 1e-10
        assert {f"{name} forward", f"{name} backward"} == set(calls)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        *((kind, "efficient") for kind in KINDS),
        *((kind, "flash on CUDA") for kind in (KINDS[0], KINDS[1], KINDS[3], KINDS[7])),
    ],
)
def test_the_backward_pass_drops_the_same_weights(kind, backend):
    with on(backend) as name:
        core = built(kind, dropout=0.3, backend=name).train()
        mask = Mask(torch.arange(21) < torch.tensor([21, 13])[:, None] if name == "efficient" else None, decisions={})
        given = inputs(core, mask)
        leaves = [x for x in given if x is not None]

        def run(*leaves):
            torch.manual_seed(5)
            left = iter(leaves)
            return core(*(None if x is None else next(left) for x in given), mask=mask)

        assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
        assert not torch.allclose(run(*leaves), core.eval()(*given, mask=mask))


@pytest.mark.parametrize("kind", [kind for kind in CAUSAL if "blockwise" not in kind])
def test_decoding_by_memory_efficient_attention(kind):
    with on("efficient") as name:
        core = built(kind, causal=True, backend=name).eval()
        given = [None if x is None else x.detach() for x in inputs(core, Mask())]
        _, past = core.step(*(None if x is None else x[:, :, :20] for x in given), mask=Mask(), past=None)
        calls.clear()
        last, _ = core.step(*(None if x is None else x[:, :, 20:] for x in given), mask=Mask(), past=past)
        assert (last - core(*given, mask=Mask())[:, :, 20:]).abs().max() < 1e-10 and calls[0] == "efficient forward"


class Made(TorchDispatchMode):
    """The largest tensor that an operation makes anew."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        had = {
            x.untyped_storage().data_ptr() for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        new = [
            x.numel()
            for x in pytree.tree_leaves(out)
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in had
        ]
        self.largest = max([self.largest, *new])
        return out


STEPS = [("flash on CUDA", kind, False) for kind in ("full", "longformer[window=32]")]
STEPS += [
    ("efficient", kind, padded)
    for kind in ("full", "longformer[window=32]", "local[chunk=16]")
    for padded in (False, True)
]


@pytest.mark.parametrize(("backend", "kind", "padded"), STEPS)
def test_a_token_makes_no_copy_of_the_cache(backend, kind, padded):
    with on(backend) as name, torch.no_grad():
        core = effzoo.attention.create(
            kind, Context(heads=2, head_dim=8, max_length=64, causal=True, backend=name)
        ).eval()
        new, past = [torch.randn(2, 2, 60, 8) for _ in core.projections], None
        for length in (60, 61, 62):
            valid = torch.arange(length) >= torch.tensor([0, 5])[:, None] if padded else None
            with Made() as made:
                out, past = core.step(*(x[:, :, -1:] if past else x for x in new), mask=Mask(valid), past=past)
        assert out.shape[2] == 1 and made.largest < past["k"].numel() / 2 > 2 * out.numel()


@pytest.mark.parametrize(
    ("kind", "fits"),
    [
        ("full", True),
        ("longformer[window=6]", True),
        ("local[chunk=4]", True),
        ("longformer[window=4,dilation=(1,3)]", False),
    ],
)
def test_the_flash_operators_take_what_has_no_bias(kind, fits):
    """Also a window, which they know; the rest goes to the memory-efficient ones, and is refused when flash is asked
    for."""
    with on("flash on CUDA") as name:
        core = built(kind, backend=name)
        given = inputs(core, Mask())
        leaves = [x for x in given if x is not None]
        if not fits:
            with pytest.raises(OptionError, match="'flash' cannot run here: it takes no bias, which padding"):
                core(*given, mask=Mask())
            return
        out, wanted = (run(*given, mask=Mask()) for run in (core, core.dense))
        direction = torch.randn_like(out)
        for mine, theirs in zip(
            (out, *gradients(out, leaves, direction)), (wanted, *gradients(wanted, leaves, direction)), strict=True
        ):
            assert (mine - theirs).abs().max() < 1e-10
        assert all(call.startswith("flash") for call in calls)
        with pytest.raises(OptionError, match="'flash' cannot run here: it takes no bias"):
            core(*given, mask=Mask(torch.arange(21).expand(2, 21) < 13))


class Strided(effzoo.attention.PredicateAttention):
    """What a user writes."""

    name = "strided"

    def visible(self, query, key, *, head, length):
        return ((query - key) % (2 + head) == 0) & (key < length - 1)


@pytest.mark.slow
@pytest.mark.parametrize("gradients_too", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [*KINDS[:5], "local[chunk=4,circular=true]", "streaming[window=4,sinks=2]", "strided"])
def test_flex_attention_is_the_definition_of_a_predicate(kind, causal, gradients_too):
    """With padding, global tokens and a prefix; a row without keys is 0."""
    context = Context(heads=2, head_dim=6, max_length=21, causal=causal, backend="flex")
    core = Strided(context) if kind == "strided" else effzoo.attention.create(kind, context)
    valid = torch.arange(21) < torch.tensor([21, 13])[:, None]
    is_global = (torch.arange(21) == 3).expand(2, 21) if core.knows_globals() else None
    prefix = tuple(torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for mask, memory in ((Mask(), None), (Mask(valid, is_global), None), (Mask(valid, is_global), prefix)):
        given = inputs(core, mask)
        leaves = [x for x in (*given, *(memory or ())) if x is not None]
        wanted = core.dense(*given, mask=mask, memory=memory)
        if not gradients_too:
            with pytest.raises(OptionError, match="'flex' cannot run here: it has no backward pass on the CPU"):
                core(*given, mask=mask, memory=memory)
            with torch.no_grad():
                assert (core(*given, mask=mask, memory=memory) - wanted).abs().max() < 1e-10
            continue
        with on("flex with gradients"):
            out = core(*given, mask=mask, memory=memory)
            direction = torch.randn_like(out)
            for mine, theirs in zip(
                (out, *gradients(out, leaves, direction)), (wanted, *gradients(wanted, leaves, direction)), strict=True
            ):
                assert (mine - theirs).abs().max() < 1e-10


def test_xformers_is_taken_when_asked_for_alone():
    with FakeTensorMode():
        half = fake(1, 2, 9, 8, dtype=torch.bfloat16)
        with pytest.raises(
            OptionError,
            match=r"'xformers' cannot run here: xformers is not installed; pip install effzoo\[xformers\], on Linux",
        ):
            choose([Part(half, half, half)], 0.0, "xformers")
        with on("xformers"):
            assert choose([Part(half, half, half)], 0.0, "xformers") == (
                "xformers",
                "asked for: memory-efficient attention of xformers on cuda",
            )
            assert choose([Part(half, half, half)], 0.0)[0] != "xformers"
            with pytest.raises(OptionError, match="'xformers' cannot run here: attention dropout 0.1"):
                choose([Part(half, half, half)], 0.1, "xformers")
    with pytest.raises(OptionError, match="'xformers' cannot run here: it runs on cuda, the tensors are on cpu"):
        effzoo.attention.create("full", Context(heads=2, head_dim=6, backend="xformers"))(
            *(torch.randn(2, 2, 21, 6) for _ in range(3)), mask=Mask()
        )


def test_what_flex_attention_refuses():
    given = [torch.randn(2, 2, 21, 6) for _ in range(3)]
    with pytest.raises(OptionError, match="'flex' cannot run here: attention dropout 0.1"):
        effzoo.attention.create("full", Context(heads=2, head_dim=6, dropout=0.1, backend="flex")).train()(
            *given, mask=Mask()
        )
    with pytest.raises(OptionError, match="'flex' cannot run here: it takes kinds that are a predicate"):
        effzoo.attention.create("lsh[chunk=4]", Context(heads=2, head_dim=6, backend="flex"))(*given[:2], mask=Mask())


def test_block_masks_that_read_nothing_of_the_batch_are_made_once():
    tile_map._cache.clear()
    given = [torch.randn(2, 2, 21, 6) for _ in range(3)]
    for _ in range(2):
        for layer in range(2):
            effzoo.attention.create(
                "local[chunk=4]", Context(heads=2, head_dim=6, layer=layer, layers=2, backend="flex")
            )(*given, mask=Mask())
    assert len(tile_map._cache) == 1


def test_nothing_as_large_as_the_scores_is_kept():
    with on("efficient") as name:
        core, sizes = built("longformer[window=6]", dropout=0.1, backend=name).train(), []
        mask = Mask(torch.arange(21) < torch.tensor([21, 13])[:, None])
        given = inputs(core, mask)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.untyped_storage().nbytes()) or x, lambda x: x
        ):
            core(*given, mask=mask)
    assert max(sizes) <= 2 * 2 * 21 * 8 * 8  # out, whose rows are of 8 numbers


COMPILED = [("full", "efficient"), ("linformer[k=4]", "efficient"), (KINDS[1], "reference"), (KINDS[3], "reference")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "backend", "dropout"),
    [*((*one, p) for one in [*COMPILED, (KINDS[1], "flash on CUDA")] for p in (0.0, 0.3))],
)
def test_compiled_it_is_the_same(kind, backend, dropout):
    torch.compiler.reset()
    with on(backend) as name:
        core = built(kind, dropout=dropout, backend=name).train()
        mask = Mask(None if backend == "flash on CUDA" else torch.arange(21) < torch.tensor([21, 13])[:, None])
        given = inputs(core, mask)
        leaves = [x for x in given if x is not None]
        compiled = torch.compile(lambda *x: core(*x, mask=Mask(mask.valid)), fullgraph=True, backend="aot_eager")

        def run(*leaves):
            torch.manual_seed(5)
            left = iter(leaves)
            return compiled(*(None if x is None else next(left) for x in given))

        if dropout:
            assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
            return
        out, wanted = run(*leaves), core(*given, mask=mask)
        direction = torch.randn_like(out)
        for mine, theirs in zip(
            (out, *gradients(out, leaves, direction)), (wanted, *gradients(wanted, leaves, direction)), strict=True
        ):
            assert (mine - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "keys", "d", "e"), [(100, 100, 64, 64), (1, 37, 20, 12), (33, 5, 8, 3)])
def test_shapes_and_dtypes_of_torchs_operators_for_cuda(dtype, rows, keys, d, e):
    q, k, v = (
        torch.empty(2, 3, size, width, dtype=dtype, device="meta") for size, width in ((rows, d), (keys, d), (keys, e))
    )
    biases = [
        None,
        *(torch.empty(shape, dtype=dtype, device="meta") for shape in ((2, 1, 1, keys), (1, 3, rows, keys))),
    ]
    tried = [(Efficient(None, 0.1), bias) for bias in biases] + (
        [(FlashCuda(None, dropout=0.1), None)] if dtype != torch.float32 else []
    )
    for kernel, bias in tried:
        tile = Tile(q, k, v, bias, False)
        out, lse = kernel.forward(tile, 0)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((2, 3, rows, e), dtype, (2, 3, rows), torch.float32)
        found = kernel.backward(tile, 0, torch.empty_like(out), out, lse)
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in (q, k, v)]


def fake(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="cuda")


def test_what_is_chosen_on_cuda_and_why(monkeypatch):
    with FakeTensorMode():
        half, single, double = (
            fake(1, 2, 9, 8, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)
        )
        plain, padded = Part(half, half, half), Part(half, half, half, fake(1, 1, 1, 9, dtype=torch.bfloat16))
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
        monkeypatch.setattr(backends, "has_no_flash", backends.has_no_flash.__wrapped__)  # which remembers no answer
        assert (
            choose([plain], 0.0)[0] == "efficient"
            and "this build of torch has none for CUDA" in choose([plain], 0.0)[1]
        )
        monkeypatch.setattr(backends, "has_no_flash", lambda device: "")
        assert choose([plain], 0.0) == ("flash", "fused flash attention on cuda")
        assert choose([plain, padded], 0.0) == (
            "efficient",
            "fused memory-efficient attention on cuda; not 'flash': it takes no bias, which padding and the tiles of "
            "some kinds need; "
            "not 'triton': it is for a band or rounds of hashing in one pass, and there is none",
        )  # fmt: skip
        assert (
            choose([plain], 0.1)[0] == "flash"
            and choose([padded], 0.1)[0] == choose([Part(single, single, single)], 0.0)[0] == "efficient"
        )
        name, reason = choose([Part(double, double, double)], 0.0)
        assert name == "reference" and "'efficient': on cuda it takes bfloat16, float16, float32, got float64" in reason
        wide = fake(1, 1, 4, 264, dtype=torch.bfloat16)
        assert "at most 256 numbers, got 264" in choose([Part(wide, wide, wide)], 0.0)[1]
        for backend, part, dropout, told in [
            ("flash", padded, 0.0, "it takes no bias"), ("flex", plain, 0.1, "attention dropout 0.1"),
            ("efficient", Part(double, double, double), 0.0, "float64"),
        ]:  # fmt: skip
            with pytest.raises(
                OptionError,
                match=f"backend '{backend}' cannot run here: .*{told}.*; use backend='auto', which is '.*' here",
            ):
                choose([part], dropout, backend)


def test_when_our_own_kernels_are_taken(monkeypatch):
    """Rounds of hashing, and a band that has padding or holes: what torch's flash operators do not compute, in one
    pass."""
    monkeypatch.setattr(backends.triton_launch, "_installed", lambda: True)
    monkeypatch.setattr(backends, "has_no_flash", lambda device: "")

    def chosen(kind, dtype=torch.bfloat16, held=None, dropout=0.0, width=8, backend="auto"):
        core = effzoo.attention.create(kind, Context(heads=2, head_dim=width))
        hashed = kind.startswith("lsh")
        tiling = None if hashed else core.tilings(90, Mask(), torch.device("cpu"))[0][1]
        with FakeTensorMode(allow_non_fake_inputs=True):
            q, held = fake(1, 2, 90, width, dtype=dtype), held and fake(1, 90, dtype=torch.bool)
            part = (
                core.part(q, q, q, fake(2, 1, 2, 90, dtype=torch.int16))
                if hashed
                else Part(q, q, q, tiling=tiling, inputs=[held])
            )
            return choose([part], dropout, backend)

    band, dilated, chunks = "longformer[window=6]", "longformer[window=6,dilation=2]", "local[chunk=8]"
    hashed = "lsh[chunk=8,rounds=2]"
    assert chosen(band)[0] == chosen(band, dropout=0.1)[0] == "flash"
    for told in (chosen(band, held=True), chosen(dilated), chosen(chunks, held=True, dropout=0.1), chosen(hashed)):
        told_why = "; not 'flash': it takes no bias, which padding and the tiles of some kinds need"
        assert told == ("triton", f"our own Triton kernels, which no card has run yet, on cuda{told_why}")
    assert chosen(hashed, torch.float32)[0] == "triton"
    name, reason = chosen(band, torch.float32, held=True)
    assert name == "efficient" and reason.endswith("not 'triton': in float32 it does without tensor cores")
    name, reason = chosen("lsh[chunk=8,rounds=2,circular=true]")
    assert name == "efficient" and reason.endswith(
        "not 'triton': it is for a band or rounds of hashing in one pass, and there is none"
    )
    name, reason = chosen(hashed, width=200)
    assert name == "efficient" and reason.endswith(
        "not 'triton': the Triton kernels take heads of at most 128 numbers, not 200"
    )
    assert chosen("local[chunk=8,circular=true]", backend="triton") == (
        "triton",
        "asked for: our own Triton kernels, which no card has run yet, on cuda",
    )
    monkeypatch.setattr(backends.triton_launch, "_installed", lambda: False)
    assert chosen(hashed)[0] == "efficient" and chosen(hashed)[1].endswith(
        "not 'triton': triton is not installed; pip install effzoo[triton]"
    )
    with pytest.raises(
        OptionError,
        match=r"'triton' cannot run here: triton is not installed; pip install effzoo\[triton\]; use backend='auto'",
    ):
        chosen(hashed, backend="triton")


def test_names_of_no_backend_are_refused_with_those_of_all(tiny):
    with pytest.raises(
        OptionError,
        match="backend 'sdpa' is not one of auto, reference, flash, blocks, efficient, flex, triton, xformers",
    ):
        effzoo.build("bert", **tiny, backend="sdpa")


@pytest.mark.parametrize("backend", ["efficient", "flash"])
def test_expanded_and_strided_tensors_are_read_right(backend):
    """Views with odd strides and offsets, a bias of every broadcast shape, gradients that are one number expanded."""
    q = torch.randn(2, 3, 9, 17, dtype=torch.float64)[..., 1::2].requires_grad_()
    k = torch.randn(1, 1, 11, 8, dtype=torch.float64).expand(2, 3, 11, 8).requires_grad_()
    v = torch.randn(2, 3, 8, 11, dtype=torch.float64).mT
    v.requires_grad_()
    for shape in ((1, 1, 1, 11), (2, 1, 9, 11), (1, 3, 1, 11), (1, 1, 9, 1)):
        bias = bias_of(torch.rand(shape) < 0.7, torch.float64)
        wanted = torch.autograd.grad(attend(Part(q, k, v, bias), backend="reference").sum(), [q, k, v])
        with on(backend) as name:
            found = torch.autograd.grad(attend(Part(q, k, v, bias), backend=name).sum(), [q, k, v])
        for mine, theirs in zip(found, wanted, strict=True):
            assert (mine - theirs).abs().max() < 1e-12


@pytest.mark.slow
def test_the_predicates_of_heads_that_differ_compile(monkeypatch):
    """Compiled FlexAttention makes no tensor of an option; on the CPU it has no log-sum-exp either."""
    compiled = torch.compile(flex_attention)

    def run(q, k, v, score, blocks, scale, return_aux):
        return compiled(q, k, v, score, blocks, scale), AuxOutput(lse=torch.zeros(q.shape[:-1]))

    monkeypatch.setattr(flex, "_run", lambda on_cuda: run)
    core = effzoo.attention.create("blockwise[blocks=3]", Context(heads=2, head_dim=16, backend="flex"))
    # a multiple of the 128 positions of its blocks: compiled for the CPU, torch 2.13 reads past the last key at other
    # lengths
    given = [torch.randn(2, 2, 128, 16) for _ in range(3)]
    mask = Mask(torch.arange(128) < torch.tensor([128, 75])[:, None])
    with torch.no_grad():
        assert (core(*given, mask=mask) - core.dense(*given, mask=mask)).abs().max() < 1e-5
