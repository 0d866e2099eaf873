"""Models inside `torch.compile`, DistributedDataParallel and DataParallel, and modules around models that are none of
these."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import effzoo
from effzoo.errors import AdapterError
from effzoo.peft.attach import adapter_tensors
from effzoo.wrappers import unwrap

IDS = torch.randint(2, 53, (3, 9), generator=torch.Generator().manual_seed(1))


def build(tiny, name="bert", task="classification", **more):
    torch.manual_seed(0)
    return effzoo.build(name, task=task, **{**tiny, **more}).double().eval()


def shake(model, *names):
    for name in names:
        with torch.no_grad():
            for tensor in adapter_tensors(model, name).values():
                tensor.add_(0.2 * torch.randn_like(tensor))
    return model


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """One process that is a group of one."""
    file = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "compile": lambda m: torch.compile(m, backend="eager"),
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "compiled DistributedDataParallel": lambda m: torch.compile(
        nn.parallel.DistributedDataParallel(m), backend="eager"
    ),
    "DataParallel of compiled": lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_function_sees_through_the_wrappers_of_torch(tiny, wrapper, group, tmp_path):
    model, twin = build(tiny, layers=1), build(tiny, layers=1)
    keys = list(model.state_dict())
    outer = WRAPPERS[wrapper](model)
    assert unwrap(outer) is model
    assert effzoo.attach(outer, "lora", name="a") is outer
    effzoo.attach(twin, "lora", name="a")
    twin.load_state_dict(shake(model, "a").state_dict())
    assert list(effzoo.attached(outer)) == list(effzoo.attached(model)) == ["a"]
    with pytest.raises(AdapterError, match="attached already"):
        effzoo.attach(outer, "lora", name="a")
    assert all(torch.equal(x, twin.state_dict()[key]) for key, x in model.state_dict().items())
    saved = effzoo.save_adapter(outer, tmp_path / "a", name="a")
    for given in (outer, twin):
        assert effzoo.load_adapter(given, saved, name="b") is given
    assert not [key for key in adapter_tensors(outer, "b") if "module" in key or "_orig_mod" in key]
    for look in (effzoo.status, effzoo.account, effzoo.peft.roles, effzoo.peft.learning_rates):
        assert look(outer) == look(twin), look
    assert effzoo.peft.flops(outer, 9) == effzoo.peft.flops(twin, 9)
    assert effzoo.plan(outer, batch=1, length=9) == effzoo.plan(twin, batch=1, length=9)
    assert effzoo.peft.within(outer, "houlsby", 2000) == effzoo.peft.within(twin, "houlsby", 2000)
    assert effzoo.peft.delta(outer, "a").keys() == effzoo.peft.delta(twin, "a").keys()
    examples = [{"input_ids": IDS[0].tolist()}]
    assert torch.equal(effzoo.predict(outer, examples, progress=False), effzoo.predict(twin, examples, progress=False))
    for given in (outer, twin):
        effzoo.peft.swap_weights(given, saved, name="b")
        effzoo.combine(given, {"a": 0.5, "b": 0.5}, name="c", head="a")
        effzoo.peft.gather(given, ["a", "b"], name="d", head="a")
        effzoo.peft.extract(given, "d", 1, name="e")
        with effzoo.active(given, "a", scale=0.5), effzoo.disabled(given):
            assert effzoo.status(given).active == ()
        effzoo.activate(given, "a")
        effzoo.merge(given, "a"), effzoo.unmerge(given, "a")
        effzoo.peft.recast(given, dtype="float64")
        for name in "bcde":
            effzoo.detach(given, name)
    assert effzoo.status(outer) == effzoo.status(twin)
    for name, x in model.state_dict().items():
        assert torch.equal(x, twin.state_dict()[name]) or ".d." in name, name
    effzoo.detach(outer, "a")
    assert list(model.state_dict()) == keys
    effzoo.quantise(outer, 8), effzoo.dequantise(outer)
    assert effzoo.swap_attention(outer, "longformer[window=4]").attention == "longformer[window=4]"
    effzoo.resize_vocabulary(outer, 60)
    assert model.embeddings.token.num_embeddings == 60
    with effzoo.routing.watch(outer):
        assert outer(input_ids=IDS).logits.shape == (3, 2)


def test_training_and_text_through_a_wrapper(tiny, tmp_path):
    model = build(tiny, "gpt2", "causal_lm").float()
    outer = torch.compile(model, backend="eager")
    effzoo.attach(outer, "lora")
    data = [{"input_ids": IDS[0].tolist(), "labels": IDS[0].tolist()}] * 4
    result = effzoo.finetune(outer, data, output_dir=tmp_path, max_steps=1, progress=False)
    names = [
        name
        for path in tmp_path.rglob("*.safetensors")
        for name in __import__("safetensors.torch").torch.load_file(path)
    ]
    assert result.steps == 1 and names and not any("_orig_mod" in name for name in names)
    assert torch.equal(effzoo.generate(outer, IDS, max_new_tokens=3), effzoo.generate(model, IDS, max_new_tokens=3))
    loss = effzoo.peft.loss(outer, input_ids=IDS, labels=IDS)
    assert torch.allclose(loss, model(input_ids=IDS, labels=IDS).loss)
    effzoo.detach(outer, "default")
    assert type(effzoo.convert.to_transformers(outer)).__name__ == "GPT2LMHeadModel"


class Parent(nn.Module):
    """As a trainer's module is around the model that it trains."""

    def __init__(self, model):
        super().__init__()
        self.model = model


@pytest.mark.parametrize(
    "around", [nn.Sequential, Parent, lambda m: torch.compile(Parent(m)), lambda m: nn.ModuleList([m])]
)
@pytest.mark.parametrize("empty", [True, False])
def test_other_modules_around_a_model_are_refused_and_nothing_is_lost(tiny, around, empty, tmp_path):
    model = build(tiny, layers=1)
    if not empty:
        effzoo.attach(model, "lora")
    before, outer = copy.deepcopy(model.state_dict()), around(model)
    operations = [
        lambda: effzoo.attach(outer, "lora"), lambda: effzoo.detach(outer, "default"), lambda: effzoo.activate(outer),
        lambda: effzoo.merge(outer),
        lambda: effzoo.unmerge(outer), lambda: effzoo.save_adapter(outer, tmp_path),
        lambda: effzoo.load_adapter(outer, tmp_path),
        lambda: effzoo.status(outer), lambda: effzoo.attached(outer), lambda: effzoo.account(outer),
        lambda: effzoo.plan(outer, length=9),
        lambda: effzoo.quantise(outer), lambda: effzoo.dequantise(outer), lambda: effzoo.swap_attention(outer, "full"),
        lambda: effzoo.predict(outer, []),
        lambda: effzoo.generate(outer, IDS), lambda: effzoo.finetune(outer, [], output_dir=tmp_path),
        lambda: effzoo.peft.roles(outer),
        lambda: effzoo.disabled(outer).__enter__(), lambda: effzoo.active(outer).__enter__(),
        lambda: effzoo.convert.to_transformers(outer),
    ]  # fmt: skip
    for number, operation in enumerate(operations):
        with pytest.raises(AdapterError, match="is a module around a model; give the model itself, its '(0|model)'"):
            operation()
            raise AssertionError(number)
    assert (
        all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
        and model.state_dict().keys() == before.keys()
    )
    assert list(effzoo.attached(model)) == ([] if empty else ["default"])


@pytest.mark.slow
@pytest.mark.parametrize("path", ["blocks.0", "blocks.0.attn.q"])
def test_a_part_that_is_compiled_on_its_own_is_to_be_compiled_in_place(tiny, path, tmp_path):
    model = build(tiny, layers=1)
    parent, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    inner = getattr(parent, name)
    setattr(parent, name, torch.compile(inner, backend="eager"))
    for operation in (
        lambda: effzoo.attach(model, "lora"),
        lambda: effzoo.status(model),
        lambda: effzoo.quantise(model),
    ):
        with pytest.raises(AdapterError, match=f"{path} is compiled as a module of its own"):
            operation()
    setattr(parent, name, inner)
    inner.compile(backend="eager")
    before = model(input_ids=IDS).logits
    shake(effzoo.attach(model, "lora"), "default")
    assert not any("_orig_mod" in key for key in model.state_dict()) and not torch.allclose(
        model(input_ids=IDS).logits, before
    )
    effzoo.detach(model, "default")
    assert torch.allclose(model(input_ids=IDS).logits, before, atol=1e-12)


def test_ddp_refuses_to_train_what_it_would_not_synchronise(tiny, group, monkeypatch):
    model = shake(effzoo.attach(effzoo.attach(build(tiny), "lora", name="a"), "lora", name="b"), "a", "b")
    outer = nn.parallel.DistributedDataParallel(model)
    monkeypatch.setattr(type(outer.process_group), "size", lambda self: 2)
    compiled = torch.compile(outer, backend="eager")
    for operation in (
        lambda: effzoo.attach(outer, "lora", name="c"),
        lambda: effzoo.activate(outer, "a"),
        lambda: effzoo.activate(compiled, "a", "b"),
    ):
        with pytest.raises(AdapterError, match="change the model first, and wrap it then"):
            operation()
        assert (
            list(effzoo.attached(model)) == ["a", "b"]
            and effzoo.status(model).active == ("b",) == effzoo.status(model).trainable
        )
    effzoo.activate(outer, "a", "b", train="b")  # frozen beside what it knows
    assert effzoo.status(model).active == ("a", "b")


def test_ddp_refuses_what_it_never_saw_and_takes_what_it_knows(tiny, group, monkeypatch):
    """An adapter that was merged when the wrapper was made is unknown to it, though its tensors were trainable all the
    time; one that was merged since, or was frozen for a while, is known."""
    model = shake(effzoo.attach(effzoo.attach(build(tiny), "lora", name="a"), "ia3", name="b"), "a", "b")
    effzoo.activate(model, "a", "b")
    effzoo.merge(model, "a")
    outer = nn.parallel.DistributedDataParallel(model)
    monkeypatch.setattr(type(outer.process_group), "size", lambda self: 2)
    around = torch.compile(outer, backend="eager")
    weights, output = copy.deepcopy(model.state_dict()), model(input_ids=IDS).logits
    for wrapper in (outer, around, nn.DataParallel(outer)):
        with pytest.raises(
            AdapterError, match=r"would make blocks.*\.adapters\.a\.lora\..* trainable.*wrapper\.module.*wrap it then"
        ):
            effzoo.unmerge(wrapper, "a")
    assert list(effzoo.status(model).merged) == ["a"] and all(
        torch.equal(x, weights[key]) for key, x in model.state_dict().items()
    )
    assert torch.equal(model(input_ids=IDS).logits, output)
    effzoo.activate(around)
    assert effzoo.status(model).trainable == ()
    effzoo.activate(around, "b")  # known, and trained again
    effzoo.unmerge(unwrap(around), "a")
    effzoo.activate(model, "a", "b")
    again = nn.parallel.DistributedDataParallel(model)
    effzoo.merge(again, "a")
    effzoo.unmerge(again, "a")  # this one knows it
    assert effzoo.status(model).trainable == ("a", "b")


@pytest.mark.parametrize("operation", [effzoo.merge, effzoo.unmerge])
def test_a_merge_or_unmerge_that_ddp_refuses_leaves_the_weights_as_they_were(tiny, group, monkeypatch, operation):
    model = shake(effzoo.attach(build(tiny), "lora", name="a"), "a")
    if operation is effzoo.unmerge:
        effzoo.merge(model, "a")
    outer = nn.parallel.DistributedDataParallel(model)
    monkeypatch.setattr(type(outer.process_group), "size", lambda self: 2)
    before, output = {key: x.clone() for key, x in model.state_dict().items()}, model(input_ids=IDS).logits
    with pytest.raises(AdapterError, match="change the model first, and wrap it then"):
        operation(outer, "a")  # the base would learn again, or the adapter
    assert before.keys() == model.state_dict().keys() and all(
        torch.equal(x, before[key]) for key, x in model.state_dict().items()
    )
    assert torch.equal(model(input_ids=IDS).logits, output)


# compiled models see what changes


def agree(compiled, model, **inputs):
    inputs = inputs or {"input_ids": IDS}
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.allclose(compiled(**inputs).logits, expected, rtol=0, atol=1e-10)
    return expected


@pytest.mark.slow
def test_a_compiled_model_sees_every_change(tiny):
    """Activity, scales, order, rows, what is attached, merged and detached: no graph of before is used."""
    torch._dynamo.reset()
    model = build(tiny, "gpt2", "causal_lm", layers=1)  # its head is tied to a table that differs by row
    compiled = torch.compile(model, backend="eager", dynamic=False)
    seen = [agree(compiled, model)]
    for adapter in "ab":
        effzoo.attach(compiled, "lora[targets=embed.token]|ia3", name=adapter)
        shake(model, adapter)
        seen.append(agree(compiled, model))
    for change in (
        lambda: effzoo.activate(compiled, "a", "b"),
        lambda: effzoo.activate(model, "a", "b", scale={"a": 0.5}),
        lambda: effzoo.activate(compiled, "a", "b", combine="average"),
        lambda: effzoo.activate(model, rows=["a", "b", None]),
        lambda: effzoo.activate(model, rows=["b", "b", "a"]),
        lambda: effzoo.activate(compiled, "a", scale=2.0),
    ):
        change()
        seen.append(agree(compiled, model))
    with effzoo.disabled(model):
        assert torch.allclose(agree(compiled, model), seen[0], atol=1e-12)
    effzoo.detach(compiled, "b")
    agree(compiled, model)
    effzoo.detach(model, "a")
    assert torch.allclose(agree(compiled, model), seen[0], atol=1e-12)
    torch._dynamo.reset()
    assert all(not torch.allclose(one, other) for number, one in enumerate(seen) for other in seen[:number])


@pytest.mark.slow
def test_weights_are_swapped_under_a_compiled_model_without_compiling_anew(tiny, tmp_path):
    torch._dynamo.reset()
    model = build(tiny)
    folders = []
    for number in range(3):
        other = shake(effzoo.attach(copy.deepcopy(model), "lora|houlsby[bottleneck=3]"), "default")
        folders.append((effzoo.save_adapter(other, tmp_path / str(number)), other(input_ids=IDS).logits.detach()))
    effzoo.load_adapter(model, folders[0][0])
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    with torch.no_grad():
        compiled(input_ids=IDS)
        compiled_before = counter.frame_count
        for folder, expected in (*folders[1:], folders[0]):
            effzoo.peft.swap_weights(compiled, folder)
            assert torch.allclose(compiled(input_ids=IDS).logits, expected, rtol=0, atol=1e-10)
    assert counter.frame_count == compiled_before == 1
    torch._dynamo.reset()
