"""Adapters whose task heads are for other numbers of labels than the model's: each gives what the model that it was
trained on gives."""

import hashlib
import json
import shutil

import pytest
import safetensors.torch
import torch
from support import finetune

import effzoo
from effzoo.errors import AdapterError, EffzooError, IncompatibleError
from effzoo.sites import sites

SIZES = {
    "layers": 1,
    "dim": 16,
    "heads": 2,
    "mlp": 32,
    "vocab": 30,
    "max_length": 24,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
IDS = torch.arange(12).reshape(3, 4)


def made(labels, task="classification", name="bert", **given):
    """Models of all numbers of labels with the same body."""
    torch.manual_seed(0)
    body = effzoo.build(name, task=task, num_labels=2, **{**SIZES, **given}).state_dict()
    model = effzoo.build(name, task=task, num_labels=labels, **{**SIZES, **given})
    layer = {key for key in body if key.startswith("head.out.")}
    model.load_state_dict({key: value for key, value in body.items() if key not in layer}, strict=False)
    return model.eval()


def shaken(model, name, seed):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".adapters.{name}." in key:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) / 4)
    return model


def saved(folder, adapter, labels, spec="lora[rank=2]", seed=1, **given):
    """An adapter on a base with that many labels: its folder, the model, and what that gives."""
    model = shaken(effzoo.attach(made(labels, **given), spec, name=adapter), adapter, seed)
    return effzoo.save_adapter(model, folder / adapter, name=adapter), model


def of(labels, size=3, task="classification"):
    shape = (size,) if task == "classification" else (size, IDS.shape[1])
    return (
        torch.arange(torch.Size(shape).numel()).reshape(shape) % labels if labels > 1 else torch.linspace(-1, 1, size)
    )


CASES = [
    ("bert", "classification", "lora[rank=2]", {}),
    ("bert", "token_classification", "houlsby[bottleneck=4]", {}),
    ("gpt2", "classification", "prefix[length=2]", {}),
    ("bert", "classification", "full", {}),
    ("bert", "classification", "head", {"head_dense": False, "head_bias": False}),
    ("perceiver-io", "classification", "lora[rank=2]", {"latents": 4}),
]


@pytest.mark.parametrize("name, task, spec, given", CASES)
def test_adapters_for_three_and_five_labels_give_on_one_base_what_each_gave_on_its_own(
    name, task, spec, given, tmp_path
):
    given = {"name": name, "task": task, **given}
    model = made(2, **given)
    bare = model(IDS).logits
    own = {}
    for adapter, labels in (("a", 3), ("b", 5)):
        folder, own[adapter] = saved(tmp_path, adapter, labels, spec, seed=labels, **given)
        effzoo.load_adapter(model, folder)
    for adapter, labels in (("a", 3), ("b", 5), ("a", 3)):
        effzoo.activate(model, adapter)
        targets = of(labels, task=task)
        found, wanted = model(IDS, labels=targets), own[adapter](IDS, labels=targets)
        assert found.logits.shape[-1] == model.num_labels == effzoo.status(model).labels == labels
        assert torch.equal(found.logits, wanted.logits) and torch.equal(found.loss, wanted.loss)
        found.loss.backward()
        wanted.loss.backward()
        grads = {key: p.grad for key, p in own[adapter].named_parameters() if p.grad is not None}
        assert grads and all(torch.equal(dict(model.named_parameters())[key].grad, grad) for key, grad in grads.items())
        model.zero_grad(), own[adapter].zero_grad()
        with effzoo.disabled(model):
            assert torch.equal(model(IDS).logits, bare) and model.num_labels == 2
    effzoo.save_adapter(model, tmp_path / "again", name="b")  # while the other one acts
    again = effzoo.load_adapter(made(4, **given), tmp_path / "again")
    assert torch.equal(again(IDS).logits, own["b"](IDS).logits)
    effzoo.detach(effzoo.detach(model, "a"), "b")
    assert torch.equal(model(IDS).logits, bare) and model.num_labels == model.own_labels == 2
    with pytest.raises(EffzooError, match=r"\[0, 2\)"):
        model(IDS, labels=of(5, task=task))


def two(tmp_path, first=3, second=5, base=3, **given):
    """A base with adapters `a` and `b` loaded, and the models that they were trained on."""
    model, own = made(base, **given), []
    for adapter, labels in (("a", first), ("b", second)):
        folder, trained = saved(tmp_path, adapter, labels, seed=labels, **given)
        own.append(trained)
        effzoo.load_adapter(model, folder)
    return model, *own


def test_by_row_each_row_is_its_own_models_where_sizes_agree_and_refused_where_not(tmp_path):
    model, a, b = two(tmp_path, 5, 5, base=2)
    effzoo.activate(model, rows=["a", "b", "a"])
    assert torch.allclose(
        model(IDS).logits, torch.stack([a(IDS).logits[0], b(IDS).logits[1], a(IDS).logits[2]]), atol=1e-6
    )
    assert model.num_labels == 5
    for rows in (["a", None, "b"], [None, "b", "b"]):
        with pytest.raises(
            IncompatibleError, match=r"heads with 5 \(.*2 \(the bare base\) outputs cannot be computed by row"
        ):
            effzoo.activate(model, rows=rows)
    effzoo.activate(model, "a", "b", combine="average")
    assert model(IDS).logits.shape == (3, 5)
    before = effzoo.status(model), model(IDS).logits
    model, *_ = two(tmp_path)
    effzoo.activate(model, "a")
    before = effzoo.status(model), model(IDS).logits
    for given in ({"rows": ["a", "b", "a"]}, {"combine": "average"}):
        with pytest.raises(IncompatibleError, match=r"heads with 3 \(a\), 5 \(b\) outputs cannot be"):
            effzoo.activate(model, *(() if "rows" in given else ("a", "b")), **given)
    assert effzoo.status(model) == before[0] and torch.equal(model(IDS).logits, before[1])


def test_a_detach_that_leaves_rows_of_two_sizes_is_refused_and_changes_nothing(tmp_path):
    model, *_ = two(tmp_path, 5, 5, base=3)
    effzoo.activate(model, rows=["a", "b", "a"])
    before = model(IDS).logits
    with pytest.raises(IncompatibleError, match="the bare base"):
        effzoo.detach(model, "a")
    assert torch.equal(model(IDS).logits, before) and list(effzoo.attached(model)) == ["a", "b"]


@pytest.mark.parametrize("block", [effzoo.disabled, effzoo.active])
def test_behind_a_block_rows_of_two_sizes_are_refused_and_the_bare_base_is_left(block, tmp_path):
    model, *_ = two(tmp_path, 5, 5, base=3)
    effzoo.activate(model, rows=["a", "b", "a"])
    with (
        pytest.raises(IncompatibleError, match=r"5 \(b\), 3 \(the bare base\) outputs cannot be computed by row"),
        block(model),
    ):
        effzoo.detach(model, "a")
    assert effzoo.status(model).active == () and model.num_labels == 3 and model(IDS).logits.shape == (3, 3)


@pytest.mark.parametrize("how", ["fusion", "routed[router='fixed', frozen=true]"])
def test_a_mixture_and_its_experts_take_the_named_head_in_its_size(how, tmp_path):
    model, _, b = two(tmp_path)
    effzoo.activate(model, "b")
    effzoo.peft.gather(model, ["a", "b"], name="m", how=how, head="b")
    mine, theirs = (dict(sites(model))["head.out"].of(name)["head"] for name in ("m", "b"))
    assert (
        model.num_labels == 5
        and torch.equal(mine.own_weight, theirs.own_weight)
        and torch.equal(mine.own_bias, theirs.own_bias)
    )
    effzoo.peft.extract(model, "m", 1, name="e")
    assert model.num_labels == 5 and torch.equal(model(IDS).logits, b(IDS).logits)


@pytest.mark.slow
def test_a_compiled_model_follows_the_head_that_acts(tmp_path):
    model, a, b = two(tmp_path)
    compiled = torch.compile(model, backend="eager")
    for own, name, labels in ((a, "a", 3), (b, "b", 5), (a, "a", 3)):
        effzoo.activate(compiled, name)
        found = compiled(IDS, labels=of(labels))
        assert torch.equal(found.logits, own(IDS).logits) and compiled.num_labels == labels


def test_in_a_stack_the_last_head_counts(tmp_path):
    model, *_ = two(tmp_path)
    for order, labels in ((("a", "b"), 5), (("b", "a"), 3)):
        effzoo.activate(model, *order)
        hidden = model(IDS).last_hidden_state
        head = dict(sites(model))["head.out"].of(order[-1])["head"]
        dense = dict(sites(model))["head.dense"].of(order[-1])["head"] if "head.dense" in dict(sites(model)) else None
        x = hidden[:, 0] if dense is None else torch.tanh(hidden[:, 0] @ dense.own_weight.T + dense.own_bias)
        assert (
            torch.allclose(model(IDS).logits, x @ head.own_weight.T + head.own_bias, atol=1e-5)
            and model.num_labels == labels
        )


@pytest.mark.parametrize("method", ["lora", "bitfit", "dora", "diff", "magnitude", "supermask", "krona"])
def test_a_method_that_changes_the_models_own_head_needs_a_head_of_that_size(method, tmp_path):
    spec = f"{method}[targets=(attn.q, head.out)]" if method != "bitfit" else "bitfit[targets=(mlp.up, head.out)]"
    folder, _ = saved(tmp_path, "c", 3, spec)
    with pytest.raises(
        AdapterError, match=r"num_labels: 3 in the file, 5 in this model; its methods change this head and bring none"
    ):
        effzoo.load_adapter(made(5), folder)
    model = made(3)
    with pytest.raises(AdapterError, match=r"own head for 3 labels \(head.out\), so the adapter cannot have one for 4"):
        effzoo.attach(model, spec, name="d", num_labels=4)
    assert not effzoo.attached(model)
    effzoo.attach(effzoo.attach(model, spec, name="c"), "lora", name="five", num_labels=5)
    for order in (("c", "five"), ("five", "c")):
        with pytest.raises(
            IncompatibleError,
            match="'c' changes the model's own head, which has 3 outputs, and 'five' brings one with 5",
        ):
            effzoo.activate(model, *order)
    assert effzoo.status(model).active == ("five",)


def test_a_merged_change_of_the_models_head_does_not_come_back_into_a_stack_with_another_head():
    model = effzoo.attach(made(3), "lora[targets=(attn.q, head.out)]", name="c")
    effzoo.merge(model, "c")
    effzoo.attach(model, "lora", name="five", num_labels=5)
    before = model(IDS).logits
    with pytest.raises(IncompatibleError, match="activate only one of them"):
        effzoo.unmerge(model, "c")
    assert torch.equal(model(IDS).logits, before) and effzoo.status(model).merged == ("c",)
    effzoo.activate(model)
    effzoo.unmerge(model, "c")


def test_an_adapter_is_attached_with_a_head_for_other_labels(tmp_path):
    model = made(3)
    bare = model(IDS).logits
    effzoo.attach(model, "lora[rank=2]", name="same", num_labels=3)
    assert torch.equal(dict(sites(model))["head.out"].of("same")["head"].own_weight, model.head.out.weight)
    effzoo.attach(model, "lora[rank=2]", name="b", num_labels=5)
    assert effzoo.status(model).heads == {"base": "3 labels", "same": "3 labels", "b": "5 labels"}
    hung = dict(sites(model))["head.out"].of("b")["head"]
    assert (
        0.01 < float(hung.own_weight.detach().std()) < 0.03 and not hung.own_bias.any() and hung.own_bias.shape == (5,)
    )
    with effzoo.active(model, "same"):
        assert torch.equal(model(IDS).logits, bare)
    effzoo.save_adapter(shaken(model, "b", 4), tmp_path, name="b")
    again = effzoo.load_adapter(made(5), tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits) and again(IDS).logits.shape == (3, 5)
    assert (
        effzoo.account(again).stored == effzoo.account(model).stored
        and effzoo.account(again).changed == effzoo.account(model).changed
    )


ROWS = [{"input_ids": row.tolist(), "labels": number + 2} for number, row in enumerate(IDS)]


def test_training_prediction_and_resuming_read_the_labels_of_the_active_head(tmp_path):
    def fresh(base, labels):
        torch.manual_seed(1)
        return effzoo.attach(made(base), "lora[rank=2]", name="b", num_labels=labels)

    given = {
        "max_steps": 4,
        "batch_size": 3,
        "save_every": 2,
        "keep": None,
        "learning_rate": 1e-2,
        "progress": False,
        "evaluate": ROWS,
    }
    whole = fresh(3, 5)
    finetune(whole, ROWS, output_dir=tmp_path / "whole", **given)
    logits = effzoo.predict(whole, [{"input_ids": row["input_ids"]} for row in ROWS])
    assert logits.shape == (3, 5) and torch.allclose(logits, whole.eval()(IDS).logits, atol=1e-6)
    folder = shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(folder / "checkpoint-4"), shutil.rmtree(folder / "adapter")
    with pytest.raises(EffzooError, match="adapters was .*'b': 5.* and is now .*'b': 6"):
        finetune(fresh(3, 6), ROWS, output_dir=folder, resume=True, **given)
    again = fresh(3, 5)
    finetune(again, ROWS, output_dir=folder, resume=True, **given)
    assert torch.equal(again.eval()(IDS).logits, whole(IDS).logits)
    effzoo.activate(again)
    again.requires_grad_(True)
    with pytest.raises(EffzooError, match="the model has 3 classes"):
        finetune(again, ROWS, output_dir=tmp_path / "base", **given)


def test_files_of_peft_bring_heads_of_any_size(tmp_path):
    model = shaken(
        effzoo.attach(made(3, name="roberta"), "lora[rank=2, targets=attn.q]", name="b", num_labels=5), "b", 2
    )
    effzoo.save_adapter(model, tmp_path, name="b", format="peft")
    for base in (3, 5, 2):
        again = effzoo.load_adapter(made(base, name="roberta"), tmp_path)
        assert torch.equal(again(IDS).logits, model(IDS).logits) and again.num_labels == 5


def test_a_damaged_head_of_another_size_is_refused(tmp_path):
    folder, _ = saved(tmp_path, "b", 5)
    manifest = json.loads((folder / "adapter.json").read_text())
    tensors = safetensors.torch.load_file(folder / manifest["tensors"])
    model = made(3)
    for key, value in (
        ("head.out.adapters.head.own_weight", torch.zeros(4, 16)),
        ("head.out.adapters.head.own_bias", torch.zeros(4)),
    ):
        content = safetensors.torch.save(tensors | {key: value})
        digest = hashlib.sha256(content).hexdigest()
        said = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
        said |= {"tensors": f"adapter-{digest[:16]}.safetensors", "sha256": digest, "size": len(content)}
        said["manifest_sha256"] = hashlib.sha256(
            json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()
        (folder / said["tensors"]).write_bytes(content)
        (folder / "adapter.json").write_text(json.dumps(said))
        with pytest.raises(AdapterError, match="has shape"):
            effzoo.load_adapter(model, folder)
        assert not effzoo.attached(model) and model.num_labels == 3


def test_regression_and_classes_are_told_apart_by_the_head_that_acts(tmp_path):
    model, number, _ = two(tmp_path, 1, 3, base=3)
    assert effzoo.status(model).heads == {"base": "3 labels", "a": "regression", "b": "3 labels"}
    effzoo.activate(model, "a")
    wanted = torch.tensor([0.5, -2.0, 1.0])
    assert torch.allclose(model(IDS, labels=wanted).loss, ((number(IDS).logits[:, 0] - wanted) ** 2).mean())
    assert "heads      base: 3 labels, a: regression, b: 3 labels; now 1" in str(effzoo.status(model))
    effzoo.activate(model, "b")
    with pytest.raises(EffzooError, match="labels are integers"):
        model(IDS, labels=wanted)
    for given in ({"rows": ["a", "b", "b"]}, {"combine": "average"}):
        with pytest.raises(IncompatibleError, match=r"1 \(a\), 3 \(b\)"):
            effzoo.activate(model, *(() if "rows" in given else ("a", "b")), **given)


def test_merging_needs_a_base_with_as_many_labels(tmp_path):
    model, a, b = two(tmp_path)
    before = model(IDS).logits
    with pytest.raises(
        AdapterError, match=r"'b' has a task head for 5 labels, .* is for 3: .* num_labels=5 and merge it there"
    ):
        effzoo.merge(model, "b")
    with pytest.raises(AdapterError, match="for 5 labels"):
        effzoo.peft.delta(model, "b")
    assert torch.equal(model(IDS).logits, before)
    there = effzoo.merge(effzoo.load_adapter(made(5), tmp_path / "b"), "b")
    assert torch.allclose(there(IDS).logits, b(IDS).logits, atol=1e-5)
    effzoo.activate(model, "b", "a")
    with pytest.raises(AdapterError, match="whose order counts"):  # behind b's head, a's would be lost
        effzoo.merge(model, "a")
    effzoo.activate(model, "a")
    effzoo.merge(model, "a")
    assert torch.allclose(model(IDS).logits, a(IDS).logits, atol=1e-5)
    effzoo.unmerge(model, "a")
    assert torch.equal(model(IDS).logits, a(IDS).logits)


def test_combine_takes_the_head_of_the_adapter_that_is_named(tmp_path):
    model, a, b = two(tmp_path)
    effzoo.combine(model, {"a": 0.0, "b": 1.0}, name="five", head="b")
    assert model.num_labels == 5 and torch.allclose(model(IDS).logits, b(IDS).logits, atol=1e-5)
    effzoo.combine(model, {"a": 1.0, "b": 0.0}, name="three", head="a")
    assert model.num_labels == 3 and torch.allclose(model(IDS).logits, a(IDS).logits, atol=1e-5)


def test_swapped_weights_are_of_the_attached_heads_size(tmp_path):
    model, *_ = two(tmp_path)
    effzoo.activate(model, "b")
    other, trained = saved(tmp_path / "other", "b", 5, seed=9)
    effzoo.peft.swap_weights(model, other, name="b")
    assert torch.equal(model(IDS).logits, trained(IDS).logits)
    with pytest.raises(
        AdapterError,
        match=r"shape \(5, 16\).* needs \(3, 16\): heads for other numbers of labels; load_adapter attaches one",
    ):
        effzoo.peft.swap_weights(model, other, name="a")


@pytest.mark.parametrize("labels", [0, -1, 2.5, True, "5", 2**41, float("nan")])
def test_a_number_of_labels_that_is_none_is_refused(labels):
    model = made(3)
    with pytest.raises((EffzooError, TypeError), match="num_labels"):
        effzoo.attach(model, "lora", num_labels=labels)
    assert not effzoo.attached(model)


def test_too_many_labels_and_models_without_labels_are_refused():
    with pytest.raises(EffzooError, match="bytes"):
        effzoo.attach(made(3), "lora", num_labels=2**39)
    with pytest.raises(AdapterError, match="num_labels=5: this model has no classification head"):
        effzoo.attach(effzoo.build("bert", **SIZES), "lora", num_labels=5)
