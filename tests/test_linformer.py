"""Linformer: the dense definition, the `linformer` package, the two orders of projecting, sharing, segments,
padding."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linformer.linformer import LinformerSelfAttention

import effzoo
from effzoo.attention import Context, Mask
from effzoo.blocks import Attention
from effzoo.errors import IncompatibleError, InputError, OptionError
from effzoo.sites import sites
from effzoo.spec import parse_one
from tests.doubles import on

SHARINGS, PROJECTIONS = ("none", "headwise", "key_value", "layerwise"), ("linear", "mean", "conv")


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


def core(spec, max_length=24, heads=3, noise=0.3, **context):
    """A core in float64 whose E and F are random around their start."""
    made = effzoo.attention.create(spec, Context(heads=heads, head_dim=4, max_length=max_length, **context)).double()
    made.initialise()  # again, in float64
    for seed, parameter in enumerate(made.parameters()):
        parameter.data += noise * draw(seed, *parameter.shape).detach()
    return made


@st.composite
def cases(draw_):
    """(spec, batch, queries, source length, kept, rows of memory, backend, seed)"""
    spec = {
        "name": "linformer",
        "k": draw_(st.integers(1, 30)),
        "sharing": draw_(st.sampled_from(SHARINGS)),
        "projection": draw_(st.sampled_from(PROJECTIONS)),
    }
    kept, rows = draw_(st.sampled_from([0.0, 0.5, 0.9, 1.0])), draw_(st.sampled_from([0, 3]))
    backend = draw_(st.sampled_from(["auto", "reference", "efficient"]))
    return (
        spec,
        draw_(st.integers(1, 3)),
        draw_(st.integers(1, 24)),
        draw_(st.integers(1, 24)),
        kept,
        rows,
        backend,
        draw_(st.integers(0, 999)),
    )


@settings(max_examples=200, deadline=None)
@given(cases())
def test_equals_its_dense_definition_also_across_two_sequences(case):
    spec, batch, n, source, kept, rows, backend, seed = case
    with on(backend) as name:
        made = core(spec, backend=name)
        leaves = [draw(seed, batch, 3, n, 4), draw(seed + 1, batch, 3, source, 4), draw(seed + 2, batch, 3, source, 4)]
        valid = torch.rand(batch, source, generator=torch.Generator().manual_seed(seed)) < kept
        memory = (draw(3, 3, rows, 4), draw(4, 3, rows, 4)) if rows else None
        out, expected = (f(*leaves, mask=Mask(None if kept == 1 else valid), memory=memory) for f in (made, made.dense))
        assert_same(out, expected, [*leaves, *made.parameters(), *(memory or ())])
        if not rows:
            assert (out[~valid.any(dim=1)] == 0).all() or kept == 1


@pytest.mark.parametrize("sharing", SHARINGS)
def test_with_e_and_f_the_identity_it_is_full_attention(sharing):
    """k = max_length starts with E = F = I, without any mask: the anchor."""
    made = core({"name": "linformer", "k": 24, "sharing": sharing}, noise=0.0)
    leaves = [draw(i, 2, 3, 24, 4) for i in range(3)]
    full = effzoo.attention.create("full", Context(heads=3, head_dim=4))
    assert_same(made(*leaves, mask=Mask()), full(*leaves, mask=Mask()), leaves)


@pytest.mark.parametrize(("max_length", "k"), [(24, 8), (24, 24), (10, 4), (7, 3)])
def test_a_linear_projection_starts_as_the_mean_over_segments_of_max_length(max_length, k):
    made = core(f"linformer[k={k}]", max_length, noise=0.0)
    bounds = [row * max_length // k for row in range(k + 1)]
    for site in (made.E, made.F):
        for row, weights in enumerate(site.weight.tolist()):
            inside = range(bounds[row], bounds[row + 1])
            assert weights == [1 / len(inside) if j in inside else 0.0 for j in range(max_length)]
    if max_length % k == 0:
        leaves = [draw(i, 2, 3, max_length, 4) for i in range(3)]
        for projection in ("mean", "conv"):
            other = core(f"linformer[k={k}, projection={projection}]", max_length, noise=0.0)
            assert_same(other(*leaves, mask=Mask()), made(*leaves, mask=Mask()), leaves)


def test_the_start_survives_the_models_own_initialisation(tiny):
    tiny["attention"] = "linformer[k=8]"
    weight = effzoo.build("bert", **tiny).blocks[1].attn.core.E.weight
    assert torch.equal(weight, torch.eye(8).repeat_interleave(8, dim=1) / 8)


@pytest.mark.parametrize(
    ("sharing", "matrices"), [("none", 12 * 4 * 2), ("headwise", 24), ("key_value", 12), ("layerwise", 1)]
)
def test_twelve_layers_hold_as_many_matrices_as_the_paper_counts(sharing, matrices):
    """Section 4: 24, 12 and 1 distinct projections for headwise, key-value and layerwise sharing in 12 layers."""
    sizes = {"dim": 16, "layers": 12, "heads": 4, "mlp": 16, "vocab": 20, "max_length": 32}
    model = effzoo.build("bert", attention={"name": "linformer", "k": 5, "sharing": sharing}, **sizes)
    plain = effzoo.build("bert", **sizes)
    more = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert more == matrices * 5 * 32
    assert sum(site.role in ("attn.E", "attn.F") for _, site in sites(model)) == matrices


@pytest.mark.parametrize("projection", ["mean", "conv"])
def test_means_have_no_parameters_and_convolutions_one_kernel(projection):
    made = core(f"linformer[k=5, projection={projection}]")
    assert sum(p.numel() for p in made.parameters()) == (0 if projection == "mean" else 2 * 5)  # ceil(24 / 5) = 5


def test_a_model_with_one_matrix_for_all_layers_copies_saves_and_loads_as_one(tmp_path, tiny):
    tiny["attention"] = "linformer[k=8, sharing=layerwise]"
    model = effzoo.build("bert", **tiny, peft=None).eval()
    names = [name for name, _ in model.named_parameters() if ".core." in name]
    assert names == ["blocks.0.attn.core.E.weight"] == [key for key in model.state_dict() if ".core." in key]
    ids = torch.randint(53, (2, 20))
    twin = copy.deepcopy(model)
    weight = twin.blocks[0].attn.core.E.weight
    assert twin.blocks[1].attn.core._sites("v")[0].weight is weight is not model.blocks[0].attn.core.E.weight
    before = model(ids).last_hidden_state
    torch.nn.init.normal_(weight)
    assert torch.equal(model(ids).last_hidden_state, before) and not torch.allclose(twin(ids).last_hidden_state, before)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(ids).last_hidden_state, before)

    effzoo.attach(model, "lora[rank=2, targets=attn.E]")
    assert len([name for name, p in model.named_parameters() if p.requires_grad]) == 2
    torch.nn.init.normal_(model.blocks[0].attn.core.E.adapters.default.lora.B, std=10)
    changed = model(ids).last_hidden_state
    assert (changed - before).abs().max() > 1e-3
    effzoo.save_adapter(model, tmp_path)
    effzoo.load_adapter(twin, tmp_path)
    assert torch.equal(twin(ids).last_hidden_state, changed)


def layer(spec, bias=True, dim=12, max_length=24, noise=0.3):
    made = (
        Attention(dim, parse_one(spec), Context(heads=3, head_dim=4, max_length=max_length), bias=bias).double().eval()
    )
    for seed, parameter in enumerate(made.parameters()):
        parameter.data += noise * draw(seed, *parameter.shape).detach()
    return made


def spied(monkeypatch, made):
    """The lengths of the sequences that the key and value sites are called with: none when the layer compresses
    first."""
    seen = []
    for name in ("k", "v"):
        getattr(made, name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("n", [7, 24])
@pytest.mark.parametrize(
    "spec",
    [
        "linformer[k=5]",
        "linformer[k=5, sharing=key_value]",
        "linformer[k=6, projection=conv]",
        "linformer[k=5, projection=mean]",
    ],
)
def test_both_orders_of_projecting_are_one_function(monkeypatch, spec, n, padded, bias):
    """(E x) W + (E 1) b = E (x W + b), with rows at padding left out of both."""
    made, x = layer(spec, bias), draw(0, 3, n, 12)
    mask = Mask(torch.arange(n) < torch.tensor([n, max(1, n // 2), 0])[:, None] if padded else None)
    leaves = [x, *made.parameters()]
    seen = spied(monkeypatch, made)
    first = made(x, mask)
    assert seen == []
    monkeypatch.setattr(type(made.core), "_compresses_first", lambda *_: False)
    last = made(x, mask)
    assert seen == [n, n]
    assert_same(first, last, leaves)


@pytest.mark.parametrize("seed", range(2))
def test_the_cheaper_order_is_chosen_and_projecting_comes_first_where_it_must(monkeypatch, seed):
    x = draw(seed, 2, 24, 12)
    for spec, n, expected in (
        ("linformer[k=5]", 24, []),
        ("linformer[k=5]", 4, [4, 4]),
        ("linformer[k=5, sharing=none]", 24, [24, 24]),
    ):
        made = layer(spec)
        seen = spied(monkeypatch, made)
        made(x[:, :n], Mask())
        assert seen == expected, (spec, n)
    for targets, expected in (
        ("attn.k", [24]),
        ("(attn.k, attn.v)", [24, 24]),
        ("attn.E", [24]),
        ("(attn.E, attn.F)", [24, 24]),
        ("attn.q", []),
    ):
        made = effzoo.attach(layer("linformer[k=5]"), f"lora[rank=2, targets={targets}]")
        seen = spied(monkeypatch, made)
        made(x, Mask())
        assert seen == expected, targets


def test_one_product_serves_keys_and_values_where_f_is_e(monkeypatch):
    x, products = draw(0, 2, 24, 12), []
    compress = effzoo.attention.linformer.Linformer._compress
    monkeypatch.setattr(
        effzoo.attention.linformer.Linformer, "_compress", lambda *given: products.append(given[2]) or compress(*given)
    )
    for sharing, expected in (("headwise", 2), ("key_value", 1), ("layerwise", 1)):
        layer({"name": "linformer", "k": 5, "sharing": sharing}, bias=False)(x, Mask())
        assert len(products) == expected, sharing
        products.clear()


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("projection", ["linear", "conv"])
def test_low_rank_changes_of_e_are_not_ignored_and_merge_exactly(sharing, projection):
    """A module with `after` on E acts although E is sliced: LoRA's output equals that of the merged weight, for a short
    input."""
    made = layer({"name": "linformer", "k": 5, "sharing": sharing, "projection": projection})
    x, mask = draw(0, 2, 11, 12), Mask(torch.arange(11) < torch.tensor([11, 6])[:, None])
    plain = made(x, mask)
    effzoo.attach(made, "lora[rank=2, targets=attn.E]")
    for name, parameter in made.named_parameters():
        if name.endswith("lora.B"):
            parameter.data.normal_()
    changed = made(x, mask)
    assert (changed - plain).abs().max() > 1e-3
    effzoo.merge(made)
    assert (made(x, mask) - changed).abs().max() < 1e-10


def test_the_keys_of_a_model_with_rotary_positions_are_not_compressed_before_they_are_turned():
    model = (
        effzoo.build(
            "bert",
            dim=16,
            layers=1,
            heads=2,
            mlp=16,
            vocab=20,
            max_length=32,
            attention="linformer[k=4]",
            positions="rotary",
        )
        .double()
        .eval()
    )
    attn = model.blocks[0].attn
    x, mask = draw(0, 2, 32, 16), Mask(position_ids=torch.arange(32)[None])
    out = attn(x, mask)
    q, k, v = (
        attn.project(name, x, Mask(position_ids=mask.position_ids))
        if name != "v"
        else attn.v(x).unflatten(-1, (2, 8)).transpose(1, 2)
        for name in "qkv"
    )
    assert k.shape[2] == 32
    expected = attn.o(attn.core.dense(q, k, v, mask=Mask()).transpose(1, 2).flatten(2))
    assert (out - expected).abs().max() < 1e-10


@pytest.mark.parametrize("sharing", SHARINGS)
def test_grouped_heads_of_the_key_side_are_repeated_after_they_are_compressed(sharing):
    context = Context(heads=4, head_dim=4, max_length=24)
    made = Attention(12, parse_one(f"linformer[k=5, sharing={sharing}]"), context, kv_heads=2).double().eval()
    for parameter in made.core.parameters():
        torch.nn.init.normal_(parameter)
    x, mask = draw(0, 2, 11, 12), Mask(torch.arange(11) < torch.tensor([11, 6])[:, None])
    q, k, v = (getattr(made, name)(x).unflatten(-1, (-1, 4)).transpose(1, 2) for name in "qkv")
    k, v = (y.repeat_interleave(2, dim=1) for y in (k, v))
    expected = made.o(made.core.dense(q, k, v, mask=mask).transpose(1, 2).flatten(2))
    assert_same(made(x, mask), expected, [x, *made.parameters()])


def test_cross_attention_with_as_many_source_positions_as_rows_is_still_compressed():
    """A source of k positions: its shape alone would not tell whether it was compressed."""
    made = (
        Attention(12, parse_one("linformer[k=5]"), Context(heads=3, head_dim=4, max_length=24), source_dim=10)
        .double()
        .eval()
    )
    for parameter in made.core.parameters():
        torch.nn.init.normal_(parameter)
    for source_length in (5, 4, 24):
        x, source = draw(0, 2, 7, 12), draw(1, 2, source_length, 10)
        q, k, v = (
            getattr(made, name)(y).unflatten(-1, (3, 4)).transpose(1, 2)
            for name, y in (("q", x), ("k", source), ("v", source))
        )
        expected = made.o(made.core.dense(q, k, v, mask=Mask()).transpose(1, 2).flatten(2))
        assert (made(x, Mask(), source=source) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("share_kv", [False, True])
@pytest.mark.parametrize("n", [1, 11, 24])
def test_equals_the_linformer_package(share_kv, n):
    """Random weights copied; forward and all gradients, also for inputs shorter than its length."""
    theirs = LinformerSelfAttention(12, 24, k=5, heads=3, share_kv=share_kv).double().eval()
    ours = layer({"name": "linformer", "k": 5, "sharing": "key_value" if share_kv else "headwise"}, bias=False)
    ours.o.bias = torch.nn.Parameter(theirs.to_out.bias.detach().clone())
    pairs = [
        (ours.q.weight, theirs.to_q.weight),
        (ours.k.weight, theirs.to_k.weight),
        (ours.o.weight, theirs.to_out.weight),
    ]
    turned = [(ours.core.E.weight, theirs.proj_k)]
    if share_kv:
        ours.v = ours.k  # the package then has one projection for keys and values
    else:
        pairs.append((ours.v.weight, theirs.to_v.weight))
        turned.append((ours.core.F.weight, theirs.proj_v))
    for our, their in [*pairs, *[(our, their.T) for our, their in turned]]:
        our.data.copy_(their)
    x = draw(0, 2, n, 12)
    out, expected = ours(x, Mask()), theirs(x)
    assert (out - expected).abs().max() < 1e-10
    direction = draw(1, *out.shape).detach()
    found = gradients(out, [x, ours.o.bias, *(our for our, _ in [*pairs, *turned])], direction)
    wanted = gradients(expected, [x, theirs.to_out.bias, *(their for _, their in [*pairs, *turned])], direction)
    for our, their in zip(found, wanted, strict=True):
        assert (our - (their if our.shape == their.shape else their.T)).abs().max() < 1e-10


def test_what_stands_under_padding_is_unseen_even_when_it_is_not_a_number():
    for projection in PROJECTIONS:
        made, x = layer({"name": "linformer", "k": 5, "projection": projection}), draw(0, 2, 11, 12)
        mask = Mask(torch.arange(11) < torch.tensor([11, 6])[:, None])
        broken = torch.where(mask.valid[..., None], x, torch.nan)
        out, other = (made(y, mask)[mask.valid] for y in (x, broken))
        assert torch.equal(out, other)


def test_the_mean_is_over_the_tokens_that_are_there():
    """max_length 8, k = 2: segments of 4; the first holds tokens 1 and 3, the second none, so every query returns their
    mean."""
    made = core("linformer[k=2, projection=mean]", max_length=8, heads=1)
    q, k, v = (draw(i, 1, 1, 8, 4) for i in range(3))
    valid = torch.zeros(1, 8, dtype=torch.bool)
    valid[0, [1, 3]] = True
    assert torch.allclose(
        made(q, k, v, mask=Mask(valid)), (v[:, :, 1:2] + v[:, :, 3:4]).expand(-1, -1, 8, -1) / 2, rtol=0, atol=1e-12
    )


def test_layers_differ_in_k():
    assert [core("linformer[k=(8, 4)]", layer=i, layers=2).E.weight.shape[0] for i in range(2)] == [8, 4]


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("linformer[k=0]", OptionError, "k is at least 1, got 0"),
        ("linformer[k=(4, 4, 4)]", OptionError, "one per layer \\(2 layers\\), got \\(4, 4, 4\\)"),
        (
            "linformer[k=(4, 8), sharing=layerwise]",
            OptionError,
            "layers that share one matrix have one k.*sharing='key_value'",
        ),
        ("linformer[sharing=heads]", OptionError, "'none' or 'headwise' or 'key_value' or 'layerwise'"),
    ],
)
def test_options_that_cannot_be_are_refused_with_what_can(spec, error, message):
    with pytest.raises(error, match=message):
        effzoo.attention.create(spec, Context(heads=2, head_dim=4, layers=2))


def test_causal_is_refused_with_the_reason_and_longer_inputs_with_the_length():
    with pytest.raises(
        IncompatibleError,
        match="cannot be causal: it mixes past and future when it projects the sequence; use it in an encoder",
    ):
        effzoo.build("gpt2", attention="linformer", dim=16, layers=1, heads=2, mlp=16, vocab=20)
    with pytest.raises(InputError, match="up to max_length 24 positions, got 25; build the model with max_length=25"):
        core("linformer[k=4]")(*(draw(i, 1, 3, 25, 4) for i in range(3)), mask=Mask())


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", ["linformer[k=4]", "linformer[k=4, sharing=none]", "linformer[k=4, sharing=key_value, projection=mean]"]
)
@pytest.mark.parametrize("padded", [True, False])
def test_projecting_and_attending_compile_whole(spec, padded):
    made, x = layer(spec), draw(0, 2, 11, 12)
    valid = torch.arange(11) < torch.tensor([11, 6])[:, None] if padded else None

    def run(x):
        mask = Mask(valid)
        projected = [
            made.core.project(name, x, getattr(made, name), mask).unflatten(-1, (3, 4)).transpose(1, 2)
            for name in "qkv"
        ]
        return made.core(*projected, mask=mask)

    assert_same(
        torch.compile(run, fullgraph=True, backend="aot_eager")(x),
        run(x),
        [x, *made.core.parameters(), *made.k.parameters()],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_stay_near_float64(dtype):
    tensors = [draw(i, 2, 3, 24, 4).detach() for i in range(3)]
    for projection in PROJECTIONS:
        made = core({"name": "linformer", "k": 5, "projection": projection}, noise=0.1)
        expected = made(*tensors, mask=Mask())
        out = made.to(dtype)(*(x.to(dtype) for x in tensors), mask=Mask())
        assert out.dtype == dtype and (out.double() - expected).abs().max() < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_autocast_reaches_the_kernel_in_one_dtype(sharing, projection):
    made = layer({"name": "linformer", "k": 5, "sharing": sharing, "projection": projection}, noise=0.1).float()
    x, mask = draw(0, 2, 11, 12).float(), Mask(torch.arange(11) < torch.tensor([11, 6])[:, None])
    with torch.autocast("cpu", torch.bfloat16):
        out = made(x, mask)
    assert out.dtype == torch.bfloat16 and (out - made(x, mask)).abs().max() < 20 * torch.finfo(torch.bfloat16).eps


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["linformer[k=5]", "linformer[k=5, projection=mean]"])
def test_dropout_acts_on_the_weights_in_training_only(spec):
    tensors = [draw(i, 2, 3, 24, 4).detach() for i in range(3)]
    plain, dropping = core(spec), core(spec, dropout=0.5)
    assert torch.allclose(dropping.eval()(*tensors, mask=Mask()), plain(*tensors, mask=Mask()), rtol=0, atol=1e-12)
    dropping.train()
    drawn = torch.stack([dropping(*tensors, mask=Mask()) for _ in range(4000)])
    assert not torch.allclose(drawn[0], drawn[1])
    assert (drawn.mean(dim=0) - plain(*tensors, mask=Mask())).abs().max() < 6 * (drawn.std(dim=0) / 4000**0.5).max()
