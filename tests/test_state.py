"""Which adapters a model has and which act: one state, and operations that happen whole or not at all."""

import copy
import io
import pickle

import pytest
import torch

import effzoo
from effzoo.errors import AdapterError, EffzooError, IncompatibleError, OptionError, UnknownNameError
from effzoo.peft.attach import adapter_tensors
from effzoo.peft.state import HERE
from effzoo.quantisation.linear import QuantisedLinear
from effzoo.sites import NOWHERE, Linear, sites
from effzoo.sites.hooks import at_hand

IDS = torch.randint(2, 53, (3, 9), generator=torch.Generator().manual_seed(1))


def build(tiny, *specs, name="bert", task="classification", seed=0, **more):
    """A model in float64 with the specs attached as a, b, ..., moved away from where they start; the last one is
    active."""
    torch.manual_seed(seed)
    model = effzoo.build(name, task=task, **{**tiny, **more}).double().eval()
    for adapter, spec in zip("abcdef", specs, strict=False):
        effzoo.attach(model, spec, name=adapter)
        with torch.no_grad():
            for tensor in adapter_tensors(model, adapter).values():
                if tensor.is_floating_point():
                    tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def out(model):
    return model(input_ids=IDS).logits.detach()


def whole(model):
    """All that an operation could change, in a form that compares."""
    state = vars(model).get(HERE)
    return {
        "status": str(effzoo.status(model)),
        "roster": None if state is None else state.roster.now,
        "merged": None if state is None else [record.name for record in state.merged],
        "tensors": {key: (x.dtype, x.detach().flatten().tolist()) for key, x in model.state_dict().items()},
        "flags": {key: p.requires_grad for key, p in model.named_parameters()},
        "modes": {key: module.training for key, module in model.named_modules()},
        "kinds": {key: type(module) for key, module in model.named_modules()},
        "random": torch.get_rng_state().tolist(),
    }


HOWS = {
    "stack": lambda m: effzoo.activate(m, "a", "b"),
    "average": lambda m: effzoo.activate(m, "a", "b", combine="average"),
    "rows": lambda m: effzoo.activate(m, rows=["a", None, "b"]),
    "scaled": lambda m: effzoo.activate(m, "b", "a", scale={"a": 0.5, "b": -2}),
    "frozen": lambda m: effzoo.activate(m, "a", "b", train="b"),
    "none": lambda m: effzoo.activate(m),
}


@pytest.mark.parametrize("how", HOWS)
def test_what_happens_to_one_adapter_leaves_alone_how_the_others_act(tiny, how, tmp_path):
    model = build(tiny, "lora", "ia3|lora[targets=mlp.up]", "lora|bitfit")
    HOWS[how](model)
    before, said = out(model), effzoo.status(model)
    for change in (
        lambda: effzoo.unmerge(effzoo.merge(model, "c"), "c"),
        lambda: effzoo.peft.finish(model, "c"),
        lambda: effzoo.save_adapter(model, tmp_path, name="c"),
        lambda: effzoo.peft.swap_weights(model, tmp_path, name="c"),
        lambda: effzoo.detach(model, "c"),
    ):
        change()
        assert torch.equal(out(model), before)
        now = effzoo.status(model)
        assert (now.active, now.combine, now.rows, now.scales, now.trainable) == (
            said.active,
            said.combine,
            said.rows,
            said.scales,
            said.trainable,
        )


def test_detaching_an_active_adapter_leaves_the_others_as_they_were(tiny):
    model = build(tiny, "lora", "lora", "lora")
    effzoo.activate(model, "a", "b", "c", combine="average", scale={"b": 0.5, "c": 3.0}, train=("b", "c"))
    effzoo.detach(model, "a")
    said = effzoo.status(model)
    assert (said.active, said.combine, said.scales, said.trainable) == (
        ("b", "c"),
        "average",
        {"b": 0.5, "c": 3.0},
        ("b", "c"),
    )
    effzoo.activate(model, rows=["b", "c", None])
    effzoo.detach(model, "b")
    assert effzoo.status(model).rows == (None, "c", None)


@pytest.mark.parametrize(
    ("how", "merged"),
    [("stack", "a"), ("scaled", "b"), ("frozen", "a"), ("none", "a"), ("none", "b"), ("stack", "c"), ("rows", "c")],
)
def test_unmerging_restores_order_scales_activity_and_what_learns(tiny, how, merged):
    model = build(tiny, "lora[dropout=0.5]", "lora[targets=attn.v]|ia3[targets=mlp.down]", "ia3")
    HOWS[how](model)
    twin, before = out(model), whole(model)
    effzoo.merge(model, merged)
    if merged in before["roster"].names:
        assert torch.allclose(out(model), twin, rtol=0, atol=1e-10)  # what acts is what is merged, at its scale
    effzoo.unmerge(model, merged)
    assert whole(model) == before and torch.equal(out(model), twin)


@pytest.mark.parametrize("how", ["average", "rows"])
def test_merging_one_that_shares_the_batch_or_a_mean_is_refused_by_what_it_would_mean(tiny, how):
    model = build(tiny, "lora", "lora")
    HOWS[how](model)
    before = whole(model)
    with pytest.raises(AdapterError, match="a merged one acts in full on every row"):
        effzoo.merge(model, "a")
    assert whole(model) == before


ORDERS = [  # stack, what is merged, whether that can come first without changing the outputs
    (("lora", "lora"), "b", True),
    (("lora", "dora"), "b", True),  # LoRA is added to outputs, after every change of the weight
    (("dora", "lora"), "a", True),
    (("dora", "lora"), "b", False),
    (("ia3", "lora[targets=attn.k]"), "a", True),
    (("ia3", "lora[targets=attn.k]"), "b", False),
    # first in the stack, and yet behind: outputs are scaled after every change of a weight
    (("ia3", "full[targets=attn.k]"), "a", False),
    (("full[targets=attn.k]", "ia3"), "a", True),
    (("full[targets=attn.q]", "lora"), "b", False),
    (("houlsby", "lora"), "b", True),  # they hang on different sites
    (("routed[of='lora', experts=2]", "lora"), "b", False),
    (("lora", "routed[of='lora', experts=2]"), "a", True),
    (("bitfit", "ia3"), "b", False),
]


@pytest.mark.parametrize(("specs", "merged", "alike"), ORDERS)
def test_merging_keeps_the_outputs_or_is_refused_with_the_order(tiny, specs, merged, alike):
    model = build(tiny, *specs, task="token_classification")
    other = "b" if merged == "a" else "a"
    # the head of one task can be at work, and that of the merged one would be part of the base
    for _, site in sites(model):
        if site.role.startswith("head.") and "a" in site.adapters:
            del site.adapters[merged]
    effzoo.activate(model, "a", "b")
    before, state = out(model), whole(model)
    try:
        effzoo.merge(model, merged)
    except AdapterError as refusal:
        assert not alike and "whose order counts" in str(refusal) and whole(model) == state
        effzoo.activate(model, merged), effzoo.merge(model, merged), effzoo.activate(model, other)
        # what a mixture does is not known from outside
        assert "routed" in specs[0] or not torch.allclose(out(model), before, rtol=0, atol=1e-6)
    else:
        assert alike and torch.allclose(out(model), before, rtol=0, atol=1e-10)


def test_unmerging_goes_on_with_what_was_activated_since(tiny):
    model = build(tiny, "lora", "lora", "lora")
    effzoo.activate(model, "a", scale=2.0)
    effzoo.merge(model, "a")
    effzoo.activate(model, "c", "b")
    before = out(model)
    effzoo.unmerge(model, "a")
    said = effzoo.status(model)
    assert (
        said.active == ("a", "c", "b")
        and said.scales == {"a": 2.0, "c": 1.0, "b": 1.0}
        and torch.allclose(out(model), before, rtol=0, atol=1e-10)
    )
    effzoo.activate(model, "a")
    effzoo.merge(model, "a")
    effzoo.activate(model, rows=["b", "c", "b"])
    effzoo.unmerge(model, "a")
    assert effzoo.status(model).rows == ("b", "c", "b")
    assert list(effzoo.attached(model)) == ["a", "b", "c"]


def test_an_adapter_comes_back_in_the_mode_and_dtype_that_the_model_has_now(tiny):
    model = build(tiny, "lora[dropout=0.5]", "lora").train()
    effzoo.activate(model, "a")
    effzoo.merge(model, "a")
    model.eval().to(torch.bfloat16)
    effzoo.unmerge(model, "a")
    assert not any(module.training for module in model.modules()) and torch.equal(out(model), out(model))
    assert {p.dtype for key, p in model.named_parameters() if ".adapters." not in key} == {torch.bfloat16}


def test_merged_weights_that_were_changed_since_are_not_overwritten(tiny):
    model = build(tiny, "lora")
    effzoo.merge(model, "a")
    weight = model.blocks[1].attn.q.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] += 1e-9
    before = whole(model)
    for _ in range(2):
        with pytest.raises(AdapterError, match=r"blocks.1.attn.q.weight was changed after merging"):
            effzoo.unmerge(model, "a")
        assert whole(model) == before
    with torch.no_grad():
        weight.copy_(kept)
    assert list(effzoo.attached(effzoo.unmerge(model, "a"))) == ["a"]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: effzoo.quantise(m, 8),
        lambda m: effzoo.quantise(m, 4),
        lambda m: effzoo.swap_attention(m, "lsh[chunk=4]"),
    ],
)
def test_what_would_lose_the_undo_is_refused_until_it_is_given_up(tiny, change):
    model = build(tiny, "lora")
    bare = {key: x.clone() for key, x in model.state_dict().items() if ".adapters." not in key}
    effzoo.merge(model, "a")
    before = whole(model)
    with pytest.raises(AdapterError, match=r"impossible to take the merged adapter 'a' out again; unmerge it first"):
        change(model)
    assert whole(model) == before
    effzoo.unmerge(model, "a")
    assert all(torch.equal(x, model.state_dict()[key]) for key, x in bare.items())
    effzoo.merge(model, "a")
    effzoo.merge(model, "a", undo=False)
    change(model)
    assert not effzoo.status(model).merged


def test_what_is_merged_elsewhere_does_not_stand_in_the_way(tiny):
    model = build(tiny, "lora[targets=(mlp.up, mlp.down)]")
    for _, site in sites(model):
        if site.role.startswith("head."):
            del site.adapters["a"]
    before = out(model)
    effzoo.merge(model, "a")
    effzoo.swap_attention(model, "longformer[window=64]")
    effzoo.unmerge(model, "a")
    assert torch.allclose(out(model), before, rtol=0, atol=1e-10) and effzoo.status(model).active == ("a",)


# refusals


def _failing_save(model, folder):
    effzoo.save_adapter(model, folder, name="a")
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    effzoo.load_adapter(model, folder, name="new")


REFUSED = {
    "attach a name that is there": lambda m, _: effzoo.attach(m, "lora", name="a"),
    "attach what hangs nowhere": lambda m, _: effzoo.attach(m, "lora|ia3[targets=nope]", name="new"),
    "attach what is refused after it has listened": lambda m,
    _: effzoo.attach(m, "routed[of='ipt', experts=2]", name="new"),
    "attach half of it": lambda m, _: effzoo.attach(m, "pissa|lora[init=pissa, rank=300]", name="new"),
    "attach past a rank": lambda m, _: effzoo.attach(m, "houlsby|lora[init=pissa, rank=300]", name="new"),
    "load a damaged file": _failing_save,
    "activate twice": lambda m, _: effzoo.activate(m, "a", "a"),
    "activate an unknown one": lambda m, _: effzoo.activate(m, "a", "z"),
    "activate what is no name": lambda m, _: effzoo.activate(m, ["a"]),
    "activate rows of an unknown one": lambda m, _: effzoo.activate(m, rows=["a", "z"]),
    "activate no rows": lambda m, _: effzoo.activate(m, rows=[]),
    "activate rows and a mean": lambda m, _: effzoo.activate(m, rows=["a"], combine="average"),
    "scale a prompt": lambda m, _: effzoo.activate(m, "c", scale=0.5),
    "scale by nan": lambda m, _: effzoo.activate(m, "a", scale=float("nan")),
    "scale by infinity": lambda m, _: effzoo.activate(m, "a", scale={"a": float("-inf")}),
    "scale by text": lambda m, _: effzoo.activate(m, "a", scale="2"),
    "scale another": lambda m, _: effzoo.activate(m, "a", scale={"b": 2}),
    "train another": lambda m, _: effzoo.activate(m, "a", train="b"),
    "train an unknown one": lambda m, _: effzoo.activate(m, "a", train=("z",)),
    "merge what is no change of a weight": lambda m, _: effzoo.merge(m, "c"),
    "unmerge what is not merged": lambda m, _: effzoo.unmerge(m, "a"),
    "swap under an adapter": lambda m, _: effzoo.swap_attention(m, "lsh[chunk=4]"),
    "combine what is no change": lambda m, _: effzoo.combine(m, {"a": 1.0, "c": 1.0}, name="new", head="a"),
    "combine under a name that is there": lambda m, _: effzoo.combine(m, {"a": 1.0}, name="b", head="a"),
    "combine in an unknown way": lambda m, _: effzoo.combine(m, {"a": 1.0, "b": 1.0}, name="new", head="a", how="mean"),
    "combine without a head": lambda m, _: effzoo.combine(m, {"a": 1.0, "b": 1.0}, name="new"),
    "gather a name that is there": lambda m, _: effzoo.peft.gather(m, ["a", "b"], name="a"),
    "gather one that puts rows in front": lambda m, _: effzoo.peft.gather(m, ["a", "c"], name="new", head="a"),
    "extract of what has no experts": lambda m, _: effzoo.peft.extract(m, "a", 0, name="new"),
    "finish an unknown one": lambda m, _: effzoo.peft.finish(m, "a", "z"),
}  # fmt: skip


@pytest.mark.cover()
@pytest.mark.parametrize("how", ["average", "rows", "scaled"])
@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_operation_changes_nothing(tiny, what, how, tmp_path):
    model = build(tiny, "lora[dropout=0.1]", "ia3", "prompt[length=2]|adamix").train()
    HOWS[how](model)
    model.blocks[1].mlp.eval()
    before = whole(model)
    with pytest.raises(EffzooError):
        REFUSED[what](model, tmp_path)
    after = whole(model)
    for part in before:
        assert after[part] == before[part], part


def test_an_operation_that_fails_in_the_middle_changes_nothing(tiny, monkeypatch):
    """Whatever breaks: an error of someone's method, the interrupt key."""
    model = build(tiny, "lora", "adamix", "lora")
    effzoo.activate(model, "a", "c", combine="average")
    before = whole(model)
    finish = effzoo.peft.get("adamix").finish
    monkeypatch.setattr(
        effzoo.peft.get("adamix"),
        "finish",
        lambda self, modules: (finish(self, modules), (_ for _ in ()).throw(KeyboardInterrupt)),
    )
    with pytest.raises(KeyboardInterrupt):
        effzoo.peft.finish(model, "b")
    assert whole(model) == before
    monkeypatch.setattr(QuantisedLinear, "numbers", lambda self: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError):
        effzoo.quantise(model, 8)
    assert whole(model) == before
    effzoo.activate(model, "a")
    before = whole(model)
    copied, count = torch.Tensor.copy_, [0]

    def breaking(self, other, *rest):
        count[0] += 1
        if count[0] == 3:
            raise RuntimeError("the third tensor cannot be written")
        return copied(self, other, *rest)

    monkeypatch.setattr(torch.Tensor, "copy_", breaking)
    with pytest.raises(RuntimeError, match="third"):
        effzoo.merge(model, "a")
    monkeypatch.undo()
    assert whole(model) == before


# scales


SCALABLE = [
    "lora",
    "lora[targets=embed.token]",
    "lora[init=loftq]",
    "dora",
    "krona",
    "ia3",
    "bitfit",
    "norms",
    "full",
    "diff",
    "intrinsic[dim=8]",
]


@pytest.mark.slow
@pytest.mark.parametrize("spec", SCALABLE)
@pytest.mark.parametrize("scale", [0.5, -1.5, 0.0])
def test_a_scale_multiplies_the_change_of_the_weights(tiny, spec, scale):
    """theta + s delta, written into the base by hand; task heads count in full."""
    model = build(tiny, spec, task="token_classification")
    change = effzoo.peft.delta(model, "a")
    twin = copy.deepcopy(model)
    effzoo.detach(twin, "a")
    with torch.no_grad():
        for key, own in dict(twin.named_parameters()).items():
            if key in change:
                own.add_(change[key] * (1.0 if key.startswith("head.") else scale))
    effzoo.activate(model, "a", scale=scale)
    assert torch.allclose(out(model), out(twin), rtol=0, atol=1e-10)
    before, bits = out(model), {key: x.clone() for key, x in model.state_dict().items()}
    effzoo.merge(model, "a")
    assert torch.allclose(out(model), before, rtol=0, atol=1e-10)
    effzoo.unmerge(model, "a")
    assert effzoo.status(model).scales == {"a": scale}
    now = model.state_dict()
    assert all(torch.equal(bits[key], now[key]) for key in bits.keys() & now.keys()) and (
        now.keys() == bits.keys() or spec == "diff"
    )  # it is finished


@pytest.mark.parametrize(
    "spec",
    [
        "houlsby[bottleneck=3]",
        "parallel[bottleneck=3]",
        "llama_adapter",
        "routed[of='lora', experts=2]",
        "pals",
        "fusion[of='pfeiffer']",
    ],
)
def test_a_scale_multiplies_what_is_added_to_an_output(tiny, spec):
    """At one site y + s (y' - y); at scale 0 the model is the bare base, at 1 the adapter itself."""
    model = build(tiny, spec, task="token_classification", layers=1)
    whole_, heads = out(model), {key: x for key, x in adapter_tensors(model, "a").items() if key.startswith("head.")}
    assert torch.equal(out(effzoo.activate(model, "a", scale=1)), whole_)
    bare = copy.deepcopy(model)
    effzoo.detach(bare, "a")
    with torch.no_grad():
        for key, x in heads.items():
            bare.get_parameter(key.replace(".adapters.a.head.own_", ".")).copy_(x)
    assert torch.allclose(
        out(effzoo.activate(model, "a", scale=0.0)), out(bare), rtol=0, atol=1e-12
    ) and not torch.allclose(whole_, out(bare))
    effzoo.activate(model, "a", scale=0.25)
    for _, site in sites(model):
        modules = list(site.hung("a"))
        if modules and not site.role.startswith("head.") and type(site).__name__ == "Branch" and "routed" not in spec:
            x, y = (torch.randn(2, 5, 16, dtype=torch.float64) for _ in range(2))
            expected = y
            for module in modules:
                if not hasattr(module, "mix"):
                    expected = expected + 0.25 * (module.after(x, expected, NOWHERE) - expected)
            if not any(hasattr(module, "mix") for module in modules):
                assert torch.allclose(site(x, y), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spec", ["prompt", "prefix", "deep_prompt", "p_tuning", "ipt", "ladder", "lora|prefix", "mam"])
def test_what_adds_nothing_has_no_scale(tiny, spec):
    model = build(tiny, spec)
    before = whole(model)
    with pytest.raises(AdapterError, match=r"has no scale of 0.5: what \w+ puts in at .* is there or not"):
        effzoo.activate(model, "a", scale=0.5)
    assert whole(model) == before
    effzoo.activate(model, "a", scale=1)


def test_scales_in_a_mean_and_in_a_stack(tiny):
    """For changes of weights at one site: W + (s_a D_a + s_b D_b) / 2, and without the half."""
    model = build(tiny, "lora[targets=attn.q]", "lora[targets=attn.q]")
    x, q = torch.randn(4, 16, dtype=torch.float64), model.blocks[0].attn.q
    D = {name: q.of(name)["lora"].B @ q.of(name)["lora"].A for name in "ab"}
    for combine, share in (("average", 0.5), ("stack", 1.0)):
        effzoo.activate(model, "a", "b", combine=combine, scale={"a": 0.5, "b": 3})
        expected = torch.nn.functional.linear(x, q.weight + share * (0.5 * D["a"] + 3 * D["b"]), q.bias)
        assert torch.allclose(q(x), expected, rtol=0, atol=1e-12)
    effzoo.activate(model, rows=["a", "b", None, "b"], scale={"a": 0.5, "b": 3})
    changed = [0.5 * D["a"], 3 * D["b"], 0 * D["a"], 3 * D["b"]]
    expected = torch.stack(
        [torch.nn.functional.linear(row, q.weight + own, q.bias) for row, own in zip(x, changed, strict=True)]
    )
    assert torch.allclose(q(x), expected, rtol=0, atol=1e-12)


# contexts


def test_contexts_restore_everything_also_after_an_error(tiny):
    model = build(tiny, "lora", "ia3", "prefix")
    effzoo.activate(model, "b", "a", combine="average", train="a")
    for entered in (
        lambda: effzoo.active(model, "c"),
        lambda: effzoo.active(model, "a", scale=0.5),
        lambda: effzoo.disabled(model),
    ):
        before, output = whole(model), out(model)
        with entered():
            assert not torch.allclose(out(model), output)
        assert whole(model) == before and torch.equal(out(model), output)
        with pytest.raises(ZeroDivisionError), entered():
            1 / 0  # noqa: B018
        assert whole(model) == before and torch.equal(out(model), output)
    with pytest.raises(UnknownNameError), effzoo.active(model, "z"):
        raise AssertionError("not reached")
    assert whole(model) == before


def test_contexts_nest_and_outlive_what_is_attached_and_detached_inside(tiny):
    model = build(tiny, "lora", "ia3")
    effzoo.activate(model, "a", "b")
    with effzoo.disabled(model):
        with effzoo.active(model, "b", scale=2.0):
            assert effzoo.status(model).scales == {"b": 2.0}
        assert effzoo.status(model).active == ()
        effzoo.detach(model, "b")
        effzoo.attach(model, "lora", name="new")
    said = effzoo.status(model)
    assert said.active == ("a",) and set(said.attached) == {"a", "new"}


@pytest.mark.parametrize("entered", [effzoo.disabled, lambda m: effzoo.active(m, "b")], ids=["disabled", "active"])
@pytest.mark.parametrize("inside", ["attach", "activate", "unmerge", "finish", "detach", "change all"])
def test_behind_a_context_learns_what_learned_before_whatever_was_done_inside(tiny, entered, inside):
    model = build(tiny, "diff[targets=attn.q]", "ia3", "lora", layers=1)
    effzoo.merge(model, "c")
    effzoo.activate(model, "a", "b", train="a")
    done = {
        "attach": lambda: effzoo.attach(model, "bitfit", name="new"),
        "activate": lambda: effzoo.activate(model, "b"),
        "unmerge": lambda: effzoo.unmerge(model, "c"),
        "finish": lambda: effzoo.peft.finish(model, "a"),
        "detach": lambda: effzoo.detach(model, "a"),
        "change all": lambda: (
            effzoo.detach(model, "a"),
            effzoo.detach(model, "b"),
            effzoo.attach(model, "bitfit", name="new"),
        ),
    }
    with entered(model):
        done[inside]()
    said = effzoo.status(model)
    learning = {key.split(".adapters.")[1][0] for key, p in model.named_parameters() if p.requires_grad}
    left = tuple(name for name in ("a", "b") if name in said.attached)
    assert said.active == left and said.trainable == tuple(sorted(learning)) == left[: left.count("a")]
    assert vars(model)[HERE].roster.now.trained == learning


def test_what_was_merged_in_a_context_comes_back_learning_where_it_acts_again(tiny):
    model = build(tiny, "lora", "ia3", layers=1)
    with effzoo.active(model, "a"):
        effzoo.merge(model, "a")
    effzoo.detach(model, "b")
    effzoo.unmerge(model, "a")
    said = effzoo.status(model)
    assert said.active == said.trainable == ("a",) and vars(model)[HERE].roster.now.trained == {"a"}


@pytest.mark.parametrize("entered", [effzoo.disabled, effzoo.active])
def test_the_base_is_frozen_behind_a_context_just_when_something_is_attached(tiny, entered):
    model = build(tiny, layers=1)
    flags = [p.requires_grad for p in model.parameters()]
    with entered(model):
        effzoo.attach(model, "lora", name="a")
    assert not any(p.requires_grad for p in model.parameters())
    with entered(model):
        effzoo.detach(model, "a")
    assert [p.requires_grad for p in model.parameters()] == flags and all(flags)


def test_disabled_is_the_bare_base_and_leaves_alone_what_is_trained(tiny):
    bare = build(tiny, "lora", "prefix")
    model = copy.deepcopy(bare)
    effzoo.detach(bare, "a"), effzoo.detach(bare, "b")
    flags = [p.requires_grad for p in model.parameters()]
    with effzoo.disabled(model):
        assert torch.equal(out(model), out(bare)) and flags == [p.requires_grad for p in model.parameters()]


def test_an_active_adapter_can_be_frozen(tiny):
    model = build(tiny, "lora", "ia3", "lora")
    effzoo.activate(model, "a", "b", train="b")
    both = out(model)
    assert effzoo.status(model).trainable == ("b",)
    model(input_ids=IDS, labels=torch.tensor([0, 1, 0])).loss.backward()
    assert {key.split(".adapters.")[1][0] for key, p in model.named_parameters() if p.grad is not None} == {"b"}
    effzoo.activate(model, "a", "b", train=())
    assert not any(p.requires_grad for p in model.parameters()) and torch.equal(out(model), both)


# status


def test_status_is_what_is_there(tiny):
    model = build(tiny, "lora", "prefix", "ia3", "lora")
    assert effzoo.status(model).active == ("d",)
    effzoo.merge(model, "d")
    effzoo.activate(model, "c", "a", scale={"a": 0.5}, train="a")
    said = effzoo.status(model)
    assert (
        said.attached == {"a": "lora", "b": "prefix", "c": "ia3"}
        and said.active == ("c", "a")
        and said.combine == "stack"
        and said.rows is None
    )
    assert (
        said.scales == {"c": 1.0, "a": 0.5}
        and said.trainable == ("a",)
        and said.merged == ("d",)
        and said.untouched is None
    )
    parameters = dict(model.named_parameters())
    assert sum(row.tensors for row in said.tensors) == len(parameters)
    assert sum(row.numbers for row in said.tensors) == sum(p.numel() for p in parameters.values())
    assert sum(row.trainable_numbers for row in said.tensors) == sum(
        p.numel() for p in parameters.values() if p.requires_grad
    )
    text = str(said)
    for line in (
        "attached   a (lora), b (prefix), c (ia3)",
        "active     c then 0.5 a",
        "trainable  a",
        "merged     d",
        "base attn.q",
    ):
        assert line in text
    assert "average" not in text and "a and b, the mean of them" in str(
        effzoo.status(effzoo.activate(model, "a", "b", combine="average"))
    )
    assert "a, c, by row: c, -, a" in str(effzoo.status(effzoo.activate(model, rows=["c", None, "a"]))).replace(
        "c, a, by row", "a, c, by row"
    )


# copies and files of the whole model


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    "twin_of",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_has_a_state_of_its_own(tiny, how, twin_of):
    model = build(tiny, "lora", "ia3", "lora")
    effzoo.merge(model, "c")
    HOWS[how](model)
    twin, before, output = twin_of(model), whole(model), out(model)
    assert whole(twin) == before and torch.equal(out(twin), output)
    effzoo.activate(twin, "a", scale=3.0)
    effzoo.unmerge(twin, "c")
    effzoo.detach(twin, "a")
    assert whole(model) == before and torch.equal(out(model), output)
    effzoo.unmerge(model, "c")
    assert list(effzoo.attached(twin)) == ["b", "c"]


def test_no_batch_outlives_its_pass(tiny):
    """The context of a call is gone with it, also where an adapter is detached or refused."""
    torch.manual_seed(0)
    fresh = effzoo.build("bert", task="classification", **tiny)
    model = copy.deepcopy(fresh)
    for spec in (
        "routed[of='lora[rank=2]', experts=2]",
        "fusion[of='pfeiffer', experts=2]",
        "routed[of='prefix', experts=2, level=example]",
    ):
        effzoo.attach(model, spec)
        model(IDS, labels=torch.tensor([0, 1, 0])).loss.backward()
        assert at_hand() is NOWHERE
        effzoo.detach(model, "default")
    with pytest.raises(EffzooError):
        effzoo.attach(model, "routed[of='ipt', experts=2]")
    assert len(pickle.dumps(model)) < len(pickle.dumps(fresh)) + 10_000


def test_parts_of_a_model_do_not_take_over_its_adapters(tiny):
    model = build(tiny, "lora")
    before = whole(model)
    with pytest.raises(AdapterError, match="carries adapters of another model"):
        effzoo.attach(model.blocks, "lora", name="b")
    assert whole(model) == before


def test_rows_that_are_not_the_batch_are_refused_wherever_they_come(tiny):
    for spec in ("prefix", "prompt", "lora", "houlsby", "head"):
        model = build(tiny, spec, spec)
        effzoo.activate(model, rows=["a", "b"])
        with pytest.raises(IncompatibleError, match="as many choices as the batch has rows"):
            model(input_ids=IDS)


ALL_LINEAR = [
    ("bert", "longformer[window=4]"),
    ("llama", "full"),
    ("bert", "linformer[k=4]"),
    ("albert", "full"),
    ("gpt2", "lsh[chunk=4]"),
]


@pytest.mark.parametrize(("name", "attention"), ALL_LINEAR)
def test_all_linear_is_every_linear_layer_of_the_blocks(tiny, name, attention):
    task = "causal_lm" if name in ("llama", "gpt2") else "classification"
    more = {"kv_heads": 1} if name == "llama" else {}
    model = effzoo.build(name, attention=attention, task=task, **tiny, **more)
    effzoo.attach(model, "lora[targets=all-linear]")
    hung = {path for path, _ in effzoo.attached(model)["default"].places["lora"]}
    linear = {path for path, site in sites(model) if isinstance(site, Linear)}
    assert (
        hung == {path for path in linear if path.startswith("blocks.")}
        and len(hung) >= 6
        and (hung < linear or task == "causal_lm")
    )
    with pytest.raises(OptionError, match="two 'lora' modules"):
        effzoo.attach(model, "lora[targets=all-linear]|lora[targets=attn.o]", name="b")
    effzoo.attach(model, "lora[targets=(all-linear, embed.token)]", name="b")
    assert "embed.token" in {role for _, role in effzoo.attached(model)["b"].places["lora"]}


def made_for_modes():
    torch.manual_seed(0)
    return effzoo.build(
        "bert", task="classification", layers=1, dim=16, heads=2, mlp=32, vocab=30, max_length=24
    ).eval()


def test_a_model_made_in_inference_mode_is_refused_outside_and_serves_inside(tmp_path):
    with torch.inference_mode():
        model = made_for_modes()
    for act in (lambda: effzoo.attach(model, "lora"), lambda: effzoo.attach(model, "prompt")):
        with pytest.raises(AdapterError, match=r"made inside torch.inference_mode"):
            act()
        assert not effzoo.attached(model)
    effzoo.save_adapter(effzoo.attach(made_for_modes(), "lora"), tmp_path)
    with torch.inference_mode():
        effzoo.load_adapter(model, tmp_path)
        effzoo.unmerge(effzoo.merge(model))
        effzoo.detach(model, "default")


@pytest.mark.parametrize("spec", ["lora", "dora", "prompt[length=4]", "full[targets=mlp.*]", "houlsby"])
def test_an_adapter_that_is_attached_or_loaded_in_inference_mode_learns_later(spec, tmp_path):
    effzoo.save_adapter(effzoo.attach(made_for_modes(), spec), tmp_path)
    attached, loaded = made_for_modes(), made_for_modes()
    with torch.inference_mode():
        effzoo.attach(attached, spec)
        effzoo.load_adapter(loaded, tmp_path)
    for model in (attached, loaded):
        model(input_ids=torch.arange(6)[None], labels=torch.tensor([1])).loss.backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize("finished", [False, True])
def test_a_packed_adapter_that_is_loaded_in_inference_mode_works_outside(finished, tmp_path):
    saved = effzoo.attach(made_for_modes(), "diff[targets=attn.q]")
    with torch.no_grad():
        for tensor in adapter_tensors(saved, "default").values():
            tensor.add_(torch.randn_like(tensor))
    if finished:
        effzoo.peft.finish(saved)
    effzoo.save_adapter(saved, tmp_path)
    loaded = made_for_modes()
    with torch.inference_mode():
        effzoo.load_adapter(loaded, tmp_path)
    ids = torch.arange(6)[None]
    assert torch.equal(loaded.eval()(input_ids=ids).logits, saved.eval()(input_ids=ids).logits)
    loaded(input_ids=ids, labels=torch.tensor([1])).loss.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in loaded.parameters())


def test_on_the_meta_device_what_needs_content_is_a_sentence(tmp_path):
    effzoo.save_adapter(effzoo.attach(made_for_modes(), "lora"), tmp_path)
    model = effzoo.attach(made_for_modes().to("meta"), "lora")
    for act in (
        lambda: effzoo.merge(model),
        lambda: effzoo.save_adapter(model, tmp_path / "other"),
        lambda: effzoo.load_adapter(model, tmp_path, name="second"),
    ):
        with pytest.raises(AdapterError, match="meta device, which holds shapes alone"):
            act()
    assert list(effzoo.attached(model)) == ["default"]


def test_the_base_is_frozen_again_when_the_last_adapter_went_between_merge_and_unmerge():
    model = effzoo.build("bert", layers=1, dim=16, heads=2, mlp=32, vocab=50, max_length=32)
    for name in "ab":
        effzoo.attach(model, "lora[rank=2]", name=name)
    effzoo.merge(model, "a")
    effzoo.detach(model, "b")
    effzoo.unmerge(model, "a")
    assert not [key for key, p in model.named_parameters() if p.requires_grad and ".adapters." not in key]
    effzoo.detach(model, "a")
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("spec", ["diff[targets=attn.q]", "adamix", "lt_sft"])
def test_finishing_an_adapter_that_does_not_learn_lets_nothing_learn(spec):
    model = effzoo.build("bert", layers=1, dim=16, heads=2, mlp=32, vocab=50, max_length=32)
    effzoo.attach(model, spec, name="a")
    effzoo.attach(model, "lora[rank=2]", name="b")
    effzoo.peft.finish(model, "a")
    assert effzoo.status(model).trainable == ("b",)
    assert not [key for key, p in model.named_parameters() if p.requires_grad and ".adapters.a." in key]


def test_an_order_that_counts_is_seen_beside_what_cannot_be_merged():
    torch.manual_seed(0)
    model = made_for_modes().double()
    for name, spec in (("a", "ia3"), ("b", "lora[rank=2]"), ("d", "routed[of='lora[rank=1]', experts=2]")):
        effzoo.attach(model, spec, name=name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".adapters." in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.arange(12).view(2, 6)
    effzoo.activate(model, "a", "b", "d")
    with pytest.raises(AdapterError, match="whose order counts"):
        effzoo.merge(model, "b")
    before = model(x).logits
    assert torch.allclose(effzoo.merge(model, "a")(x).logits, before, rtol=0, atol=1e-10)
