"""Each attention kind equals its dense definition in float64, forward and backward, for drawn lengths and masks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effzoo
from effzoo.attention import AttentionCore, Context, Mask, Part
from effzoo.attention.full import Full
from effzoo.attention.reference import dense
from effzoo.blocks import Attention
from effzoo.blocks.positions import Rotary
from effzoo.errors import IncompatibleError, InputError, OptionError
from effzoo.spec import Spec
from tests.doubles import on


def gradients(out, leaves, direction):
    found = torch.autograd.grad(out, leaves, direction, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


def draw(generator, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


@st.composite
def cases(draw_):
    """(spec, batch, n, causal, backend, kept, share of globals, rows of memory, seed)"""
    kind = draw_(st.sampled_from(["full", "longformer"]))
    spec = "full"
    if kind == "longformer":
        dilation = draw_(st.sampled_from(["1", "3", "(1, 2)", "(4, 1)"]))
        shared = draw_(st.sampled_from(["true", "false"]))
        spec = f"longformer[window={2 * draw_(st.integers(1, 12))},dilation={dilation},global_projections={shared}]"
    global_share = draw_(st.sampled_from([0.0, 0.1, 0.5, 1.0])) if kind == "longformer" else 0.0
    return (
        spec, draw_(st.integers(1, 3)), draw_(st.integers(1, 40) | st.integers(100, 150)), draw_(st.booleans()),
        draw_(st.sampled_from(["auto", "reference", "efficient"])),
        draw_(st.sampled_from([0.0, 0.5, 0.9, 1.0])), global_share, draw_(st.sampled_from([0, 0, 3])),
        draw_(st.integers(0, 10**6)),
    )  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(cases())
def test_equals_its_dense_definition(case):
    spec, batch, n, causal, backend, kept, global_share, rows, seed = case
    with on(backend) as name:
        generator = torch.Generator().manual_seed(seed)
        core = effzoo.attention.create(spec, Context(heads=2, head_dim=4, causal=causal, backend=name))
        valid = torch.rand(batch, n, generator=generator) < kept
        is_global = (torch.rand(batch, n, generator=generator) < global_share) & valid
        mask = Mask(None if kept == 1 else valid, is_global if is_global.any() else None)
        leaves = [draw(generator, batch, 2, n, 4) for _ in core.projections]
        memory = (draw(generator, 2, rows, 4), draw(generator, 2, rows, 4)) if rows else None
        out, expected = core(*leaves, mask=mask, memory=memory), core.dense(*leaves, mask=mask, memory=memory)
        assert out.isfinite().all() and (out - expected).abs().max() < 1e-10
        leaves += memory or ()
        direction = draw(generator, *out.shape).detach()
        for got, want in zip(gradients(out, leaves, direction), gradients(expected, leaves, direction), strict=True):
            assert got.isfinite().all() and (got - want).abs().max() < 1e-10


def test_longformer_definition_counts_by_hand():
    """Window 2, six tokens, token 4 global, token 1 padding: the sets of the paper's section 3.1 written out."""
    core = effzoo.attention.create("longformer[window=2]", Context(heads=1, head_dim=2))
    valid, is_global = torch.ones(1, 6, dtype=torch.bool), torch.zeros(1, 6, dtype=torch.bool)
    valid[0, 1], is_global[0, 4] = False, True
    sees = [{j for j in range(6) if row[j]} for row in core.pattern(6, Mask(valid, is_global))[0, 0].tolist()]
    assert sees == [{0, 4}, {0, 2, 4}, {2, 3, 4}, {2, 3, 4}, {0, 2, 3, 4, 5}, {4, 5}]


@pytest.mark.parametrize("spec", ["full", "longformer[window=4]", "longformer[window=4,dilation=(1,2)]"])
def test_causal_output_does_not_depend_on_the_future(spec):
    """The gradient of output t with respect to any input after t is exactly 0."""
    core = effzoo.attention.create(spec, Context(heads=2, head_dim=4, causal=True))
    generator = torch.Generator().manual_seed(0)
    leaves = [draw(generator, 2, 2, 13, 4) for _ in core.projections]
    is_global = None
    if core.knows_globals():
        is_global = torch.zeros(2, 13, dtype=torch.bool)
        is_global[0, [0, 6]] = is_global[1, 12] = True
    out = core(*leaves, mask=Mask(is_global=is_global))
    for t in range(13):
        for grad in gradients(out[:, :, t].sum(), leaves, None):
            assert (grad[:, :, t + 1 :] == 0).all()


@pytest.mark.parametrize("n", [1, 2, 7, 24])
def test_longformer_with_a_window_over_everything_is_full_attention(n):
    context = Context(heads=2, head_dim=4)
    q, k, v = (draw(torch.Generator().manual_seed(i), 2, 2, n, 4) for i in range(3))
    wide = effzoo.attention.create("longformer[window=64]", context)(q, k, v, mask=Mask())
    assert torch.allclose(wide, effzoo.attention.create("full", context)(q, k, v, mask=Mask()), rtol=0, atol=1e-12)


def test_longformer_with_all_tokens_global_is_full_attention_with_the_global_projections():
    core = effzoo.attention.create("longformer[window=2]", Context(heads=2, head_dim=4))
    tensors = [draw(torch.Generator().manual_seed(i), 2, 2, 9, 4) for i in range(6)]
    out = core(*tensors, mask=Mask(is_global=torch.ones(2, 9, dtype=torch.bool)))
    assert torch.allclose(out, dense(*tensors[3:], torch.ones(9, 9, dtype=torch.bool)), rtol=0, atol=1e-12)


def test_longformer_dilation_counts_by_hand():
    """Window 2 and dilation 3 on the second head: i - 3, i and i + 3, as in the kernel of allenai/longformer with
    one-sided window 1."""
    core = effzoo.attention.create("longformer[window=2,dilation=(1,3)]", Context(heads=2, head_dim=2))
    sees = [{j for j in range(8) if row[j]} for row in core.pattern(8, Mask())[0, 1].tolist()]
    assert sees == [{0, 3}, {1, 4}, {2, 5}, {0, 3, 6}, {1, 4, 7}, {2, 5}, {3, 6}, {4, 7}]


def test_longformer_dilation_is_a_sliding_window_over_each_residue_class():
    """Dilation D on x is window attention on x[r::D] for every r: the permutation that makes dilation free."""
    q, k, v = (draw(torch.Generator().manual_seed(i), 1, 1, 23, 4) for i in range(3))
    dilated = effzoo.attention.create("longformer[window=4,dilation=3]", Context(heads=1, head_dim=4))(
        q, k, v, mask=Mask()
    )
    plain = effzoo.attention.create("longformer[window=4]", Context(heads=1, head_dim=4))
    for r in range(3):
        assert torch.allclose(
            dilated[:, :, r::3], plain(*(x[:, :, r::3] for x in (q, k, v)), mask=Mask()), rtol=0, atol=1e-13
        )


def test_longformer_without_global_projections_has_three():
    core = effzoo.attention.create("longformer[window=2,global_projections=false]", Context(heads=1, head_dim=2))
    assert core.projections == {"q": "query", "k": "key", "v": "value"}
    model = effzoo.build(
        "longformer",
        attention="longformer[window=2,global_projections=false]",
        dim=16,
        layers=1,
        heads=2,
        mlp=16,
        vocab=20,
    )
    assert not [name for name, _ in model.named_parameters() if "_global" in name]


def test_full_attention_crosses_to_a_source_of_another_length():
    core = effzoo.attention.create("full", Context(heads=2, head_dim=4))
    q = draw(torch.Generator().manual_seed(0), 2, 2, 13, 4)
    (k, v) = (draw(torch.Generator().manual_seed(i), 2, 2, 7, 4) for i in (1, 2))
    valid = torch.arange(7) < torch.tensor([7, 3])[:, None]
    expected = dense(q, k, v, valid[:, None, None, :])
    assert torch.allclose(core(q, k, v, mask=Mask(valid)), expected, rtol=0, atol=1e-13)


def test_rows_of_a_batch_do_not_touch_each_other():
    """Ragged rows with different global tokens equal each row alone, without its padding (as allenai/longformer tests
    it)."""
    core = effzoo.attention.create("longformer[window=4]", Context(heads=2, head_dim=4))
    lengths, globals_ = [11, 6, 1], [[0, 7], [2], []]
    tensors = [draw(torch.Generator().manual_seed(i), 3, 2, 11, 4) for i in range(6)]
    valid = torch.arange(11) < torch.tensor(lengths)[:, None]
    is_global = torch.zeros(3, 11, dtype=torch.bool)
    for row, where in enumerate(globals_):
        is_global[row, where] = True
    together = core(*tensors, mask=Mask(valid, is_global))
    for row, n in enumerate(lengths):
        alone = core(
            *(x[row : row + 1, :, :n] for x in tensors),
            mask=Mask(is_global=is_global[row : row + 1, :n] if globals_[row] else None),
        )
        assert torch.allclose(together[row : row + 1, :, :n], alone, rtol=0, atol=1e-12)


def test_windows_differ_by_layer():
    cores = [
        effzoo.attention.create("longformer[window=(2, 8)]", Context(heads=1, head_dim=2, layer=layer, layers=2))
        for layer in range(2)
    ]
    assert [int(core.pattern(20, Mask())[0, 0, 10].sum()) for core in cores] == [3, 9]


class Plain(AttentionCore):
    """Full attention, as someone else may write it."""

    name = "plain"

    def forward(self, q, k, v, *, mask):
        return self.attend(Part(q, k, v, mask.key_bias(q.dtype), causal=self.context.causal))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"supports_causal": False}, "`supports_causal`, which nobody reads; did you mean 'not_causal'\\?"),
        ({"row_side": ("q",)[0]}, "`row_side`, which nobody reads.*it may declare name, paper"),
        ({"not_casual": "it sees all"}, "`not_casual`, which nobody reads; did you mean 'not_causal'\\?"),
        ({"projection": {"q": "query"}}, "`projection`, which nobody reads; did you mean 'projections'\\?"),
    ],
)
def test_a_declaration_that_nobody_reads_is_refused(given, said):
    """A kind that says in vain that it cannot be causal would be used in decoders."""
    kind = type("Misspelt", (Plain,), given)
    with pytest.raises(OptionError, match=f"attention 'plain': it declares {said}"):
        kind(Context(heads=2, head_dim=4, causal=True))
    # other attributes are the kind's business
    type("Own", (Plain,), {"unit": "words", "twice": True, "Side": str})(Context(heads=2, head_dim=4))


@pytest.mark.parametrize(
    ("old", "new"), [("rows", "forward_at"), ("alone", "attend_memory"), ("layouts", "tilings"), ("sight", "window_of")]
)
def test_a_method_under_its_old_name_is_refused_with_the_new_one(old, new):
    kind = type("Old", (Plain,), {old: lambda self, *given: None})
    with pytest.raises(OptionError, match=f"attention 'plain': it defines `{old}`, which is `{new}"):
        kind(Context(heads=2, head_dim=4))


@pytest.mark.parametrize("given", [("q", "k", "v"), {"q": "query", "k": "key", "v": "values"}])
def test_projections_say_what_they_are(given):
    kind = type("Tuple", (Plain,), {"projections": given})
    with pytest.raises(
        OptionError, match="projections say what each is, 'query', 'key', 'value' or 'query and key', as in .*got"
    ):
        kind(Context(heads=2, head_dim=4))


def test_values_are_known_by_what_is_said_of_them_and_not_by_their_names():
    """Another name for q, k and v: the same output in a layer with rotary positions, norms of heads, values of another
    width and one key head."""

    class Renamed(Plain):
        name = "renamed"
        projections = {"value_of_interest": "query", "asked": "key", "told": "value"}

        def forward(self, value_of_interest, asked, told, *, mask):
            return super().forward(value_of_interest, asked, told, mask=mask)

    context, x = Context(heads=2, head_dim=4), torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0)).double()
    layers = []
    for kind in (Plain, Renamed):
        with effzoo.scope():
            effzoo.attention.register("mine")(kind)
            torch.manual_seed(0)
            rotary = Rotary(4)
            layers.append(
                Attention(8, Spec("mine"), context, kv_heads=1, rotary=rotary, qk_norm=1e-6, value_dim=6).double()
            )
    mask = Mask(position_ids=torch.arange(7)[None])
    outs = [layer(x, mask) for layer in layers]
    assert outs[0].abs().max() > 1e-3 and torch.equal(*outs)


def test_a_kind_without_memory_is_refused_a_prefix_and_computes_without_one():
    with effzoo.scope():
        effzoo.attention.register("mine")(Plain)
        model = effzoo.build("bert", attention="mine", dim=16, layers=1, heads=2, mlp=16, vocab=20)
        ids = torch.ones(1, 4, dtype=torch.long)
        model(ids)
        with pytest.raises(IncompatibleError, match="takes no memory, as its forward has no parameter `memory`"):
            effzoo.attach(model, "prefix[length=2]")(ids)


def test_a_kind_has_the_outputs_at_few_positions_and_the_steps_that_belong_to_its_forward():
    class Twice(Full):
        def forward(self, q, k, v, *, mask, memory=None):
            return 2 * super().forward(q, k, v, mask=mask, memory=memory)

    assert Full.decodes() and effzoo.attention.create("full", Context(heads=1, head_dim=2)).has_forward_at
    assert not Twice.decodes() and not Twice(Context(heads=1, head_dim=2)).has_forward_at


def test_full_attention_refuses_global_tokens():
    model = effzoo.build("bert", dim=16, layers=1, heads=2, mlp=16, vocab=20)
    with pytest.raises(
        InputError, match="'full' has no global tokens; leave global_attention_mask out, or use 'longformer'"
    ):
        model(torch.ones(1, 4, dtype=torch.long), global_attention_mask=torch.ones(1, 4))


@pytest.mark.parametrize("spec", ["full", "longformer[window=4]"])
def test_dropout_acts_in_training_only_and_by_the_global_generator(spec):
    core = effzoo.attention.create(spec, Context(heads=2, head_dim=4, dropout=0.5))
    q, k, v = (draw(torch.Generator().manual_seed(i), 2, 2, 9, 4) for i in range(3))
    state = torch.get_rng_state()
    evaluated = core.eval()(q, k, v, mask=Mask())
    assert torch.equal(torch.get_rng_state(), state)
    trained = core.train()(q, k, v, mask=Mask())
    assert not torch.allclose(trained, evaluated) and (core.eval()(q, k, v, mask=Mask()) == evaluated).all()
