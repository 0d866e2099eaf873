"""Adapters whose methods train in stages: in which one they are belongs to them and to their files, and training goes
on from there exactly."""

import json
import shutil

import pytest
import torch
from support import finetune

import effzoo
from effzoo.errors import AdapterError, IncompatibleError, TrainingError, UnknownNameError
from effzoo.peft import training
from effzoo.peft.files import swap_weights
from effzoo.peft.manifest import _hash
from effzoo.peft.stored import stored_tensors
from effzoo.train import checkpoints

METHODS = {  # spec: its stages
    "lt_sft[keep=0.1, l1=0.1]": ["full", "sparse"],
    "diff[keep=0.1, alpha=0.5, penalty=0.001]": ["gates", "fixmask"],
    "far[keep=0.25]": ["prime", "learn"],
    "magnitude[rewind=true, rounds=2, rewind_at=0.2]": ["round 0", "round 1", "round 2"],
    "ipt[dim=5, length=3, hidden=4]": ["subspace", "intrinsic"],
    "routed[of='lt_sft[targets=mlp.*]', experts=2]": ["full", "sparse"],
    "routed[of=('far', 'magnitude[targets=mlp.*]')]": ["prime", "learn"],
    "routed[of=('diff[targets=mlp.up]', 'lora')]": ["gates", "fixmask"],
}
BEGUN = [(spec, number) for spec, stages in METHODS.items() for number in range(len(stages))]
ROWS = [{"input_ids": [2 + i, 3, 4, 5 + i % 3], "labels": i % 3} for i in range(16)]
RUN = {
    "max_steps": 8,
    "batch_size": 4,
    "save_every": 1,
    "keep": None,
    "learning_rate": 1e-2,
    "warmup": 1,
    "progress": False,
    "log_every": 1,
}
IDS = torch.arange(24).reshape(4, 6) % 40 + 2
BATCH = {"input_ids": IDS, "labels": torch.tensor([0, 1, 2, 0])}


def made(tiny, peft=None, **given):
    """Always the same base."""
    torch.manual_seed(0)
    model = effzoo.build("bert", task="classification", num_labels=3, **{**tiny, "layers": 1, **given})
    torch.manual_seed(1)
    return model if peft is None else effzoo.attach(model, peft)


def stages_of(spec):
    return next(stages for known, stages in METHODS.items() if known.partition("[")[0] == spec.partition("[")[0])


def outputs(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def steps(model, number=3):
    """Some steps of gradient descent, which keeps nothing but the tensors."""
    torch.manual_seed(7)
    model.train()
    for step in range(number):
        training.schedule(model, step / number)
        training.loss(model, **BATCH).backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad and p.grad is not None:
                    p.sub_(0.5 * p.grad)
        model.zero_grad()


def trained(model, until):
    """Trained through the stages up to this one, and some steps in it."""
    for stage in training.stages(model)[: until + 1]:
        training.begin(model, stage)
        steps(model)
    return model


def everything(model, name="default"):
    """The tensors of an adapter, which of its parameters are trained, and what is computed."""
    flags = {key: p.requires_grad for key, p in model.named_parameters() if f".adapters.{name}." in key}
    return {key: value.detach().clone() for key, value in stored_tensors(model, name).items()}, flags, outputs(model)


def assert_same(one, other):
    (tensors, flags, out), (theirs, their_flags, their_out) = one, other
    assert tensors.keys() == theirs.keys() and flags == their_flags
    assert all(torch.equal(tensors[key], theirs[key]) for key in tensors)
    assert torch.equal(out, their_out)


def edited(folder, **changes):
    """The manifest of a folder with other entries and the hash that fits them; None takes an entry out."""
    path = folder / "adapter.json"
    content = json.loads(path.read_text())
    content = {key: value for key, value in {**content, **changes}.items() if value is not None}
    content.pop("manifest_sha256")
    path.write_text(json.dumps({**content, "manifest_sha256": _hash(content)}))


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "number"), BEGUN)
def test_an_adapter_is_loaded_in_its_stage_and_trained_on_to_the_same_bits(tiny, tmp_path, spec, number):
    model = trained(made(tiny, spec), number)
    left = METHODS[spec][number:]
    assert [stage.name for stage in training.stages(model)] == left
    effzoo.save_adapter(model, tmp_path)
    loaded = effzoo.load_adapter(made(tiny), tmp_path)
    method = spec.partition("[")[0]
    assert effzoo.status(loaded).stages == effzoo.status(model).stages == {"default": {method: left[0]}}
    assert f"stages     default in stage '{left[0]}' of {method}" in str(effzoo.status(loaded))
    assert_same(everything(loaded), everything(model))
    for stage, other in zip(training.stages(model), training.stages(loaded), strict=True):
        assert stage == other
        for subject in (model, loaded):
            training.begin(subject, stage)  # the one that runs stays as it is
            steps(subject)
        assert_same(everything(loaded), everything(model))
    for subject in (model, loaded):
        training.finish(subject)
        assert not effzoo.status(subject).stages and "stages" not in str(effzoo.status(subject))
    assert_same(everything(loaded), everything(model))
    effzoo.save_adapter(loaded, tmp_path)
    assert torch.equal(outputs(effzoo.load_adapter(made(tiny), tmp_path)), outputs(model))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_stage_is_loaded_in_the_dtype_of_the_adapter_onto_a_base_in_half_precision(tiny, tmp_path, dtype):
    def base():
        return made(tiny).bfloat16()

    model = effzoo.attach(base(), "lt_sft[keep=0.1]", dtype=dtype)
    trained(model, 1)
    effzoo.save_adapter(model, tmp_path)
    loaded = effzoo.load_adapter(base(), tmp_path)
    assert_same(everything(loaded), everything(model))
    assert {p.dtype for key, p in loaded.named_parameters() if "lt_sft" in key} == {getattr(torch, dtype)}


def test_each_method_of_an_adapter_has_a_stage_of_its_own(tiny, tmp_path):
    model = made(tiny, "lt_sft[keep=0.1, targets=attn.*]|far")
    for name in ("full", "prime", "sparse"):
        training.begin(model, training.Stage(name, 1.0))
        steps(model, 1)
    effzoo.save_adapter(model, tmp_path)
    loaded = effzoo.load_adapter(made(tiny), tmp_path)
    assert effzoo.status(loaded).stages == {"default": {"lt_sft": "sparse", "far": "prime"}}
    assert_same(everything(loaded), everything(model))


def test_a_stage_is_begun_by_its_name_too_and_an_unknown_one_is_refused_with_a_sentence(tiny):
    model, twin = made(tiny, "lt_sft[keep=0.1]"), made(tiny, "lt_sft[keep=0.1]")
    training.begin(model, "full")
    training.begin(twin, training.Stage("full", 1.0))
    assert effzoo.status(model).stages == effzoo.status(twin).stages == {"default": {"lt_sft": "full"}}
    with pytest.raises(UnknownNameError, match="unknown stage 'spares'; did you mean 'sparse'. Known: full, sparse"):
        training.begin(model, "spares")
    with pytest.raises(UnknownNameError, match="unknown stage 'sparse'"):
        training.begin(made(tiny, "lora"), "sparse")


def test_two_adapters_of_one_method_are_in_different_stages_and_only_the_trained_one_moves_on(tiny, tmp_path):
    spec = "magnitude[rewind=true]"
    model = trained(made(tiny, spec), 1)
    one = everything(model)
    effzoo.save_adapter(model, tmp_path / "one")
    trained(effzoo.attach(model, spec, name="b"), 0)
    effzoo.save_adapter(model, tmp_path / "b", name="b")
    two = effzoo.load_adapter(effzoo.load_adapter(made(tiny), tmp_path / "one"), tmp_path / "b")
    assert effzoo.status(two).stages == {"default": {"magnitude": "round 1"}, "b": {"magnitude": "round 0"}}
    effzoo.activate(two, "default", "b")
    with pytest.raises(
        IncompatibleError,
        match=r"different stages before them \(round 0, round 1; round 1\); train one after the other",
    ):
        training.stages(two)
    effzoo.activate(two, "default", "b", train="b")
    for stage in training.stages(two):
        training.begin(two, stage)
        steps(two)
    assert effzoo.status(two).stages["b"] == {"magnitude": "round 1"}
    effzoo.detach(two, "b")
    assert_same(everything(effzoo.activate(two, "default")), one)


def test_a_frozen_adapter_is_not_finished_by_the_run_of_another(tiny, tmp_path):
    model = effzoo.attach(trained(made(tiny, "lt_sft"), 0), "ia3", name="b")
    effzoo.activate(model, "default", "b", train="b")
    before = stored_tensors(model, "default")
    finetune(model, ROWS, output_dir=tmp_path, **{**RUN, "max_steps": 2})
    after = stored_tensors(model, "default")
    assert effzoo.status(model).stages == {"default": {"lt_sft": "full"}} and not effzoo.status(model).finished
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_earlier_stage_is_refused_and_changes_nothing(tiny):
    model = trained(made(tiny, "lt_sft"), 1)
    full = made(tiny, "lt_sft")
    before = everything(model)
    with pytest.raises(TrainingError, match="in stage 'sparse' of lt_sft, and 'full' comes before it; attach it anew"):
        training.begin(model, training.stages(full)[0])
    assert_same(everything(model), before)


def test_what_fails_in_begin_changes_nothing(tiny, monkeypatch):
    model = trained(made(tiny, "lt_sft"), 0)
    before = everything(model)
    monkeypatch.setattr("effzoo.peft.parameter.lt_sft._drop", lambda modules: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training.begin(model, training.stages(model)[1])
    assert_same(everything(model), before)
    assert effzoo.status(model).stages == {"default": {"lt_sft": "full"}}


@pytest.mark.parametrize("spec", ["lt_sft", "ipt[dim=5]", "magnitude[rewind=true]"])
def test_detached_in_the_second_stage_leaves_the_base(tiny, spec):
    bare = outputs(made(tiny))
    model = trained(made(tiny, spec), 1)
    effzoo.detach(model, "default")
    assert torch.equal(outputs(model), bare) and not effzoo.status(model).stages
    trained(effzoo.attach(model, spec), 0)
    assert list(effzoo.status(model).stages["default"].values()) == [stages_of(spec)[0]]


@pytest.mark.parametrize(
    ("begun", "message"),
    [
        (
            {"lt_sft": "sparser"},
            r"in stage 'sparser' of 'lt_sft', and its stages are 'full' of lt_sft, 'sparse' of lt_sft; save it again",
        ),
        ({"lora": "sparse"}, r"in stage 'sparse' of 'lora', and its stages are"),
        ({"lt_sft": ""}, r"in stage '' of 'lt_sft'"),
        ({"lt_sft": 1}, "begun is the name of a stage for each method, got"),
        (["sparse"], "begun is of type dict, got"),
        ({"lt_sft": "full"}, "does not fit its own spec"),
        ({}, "does not fit its own spec"),
    ],
    ids=str,
)
def test_a_stage_that_is_not_the_one_of_the_file_is_refused(tiny, tmp_path, begun, message):
    effzoo.save_adapter(trained(made(tiny, "lt_sft"), 1), tmp_path)
    edited(tmp_path, begun=begun)
    model = trained(made(tiny, "lt_sft"), 1)
    before = everything(model)
    with pytest.raises(AdapterError, match=message):
        effzoo.load_adapter(model, tmp_path, name="b")
    with pytest.raises(AdapterError):
        swap_weights(model, tmp_path)
    assert list(effzoo.attached(model)) == ["default"] and effzoo.status(model).stages == {
        "default": {"lt_sft": "sparse"}
    }
    assert_same(everything(model), before)


def test_a_finished_adapter_in_a_stage_is_refused(tiny, tmp_path):
    model = trained(made(tiny, "far"), 1)
    training.finish(model)
    effzoo.save_adapter(model, tmp_path)
    edited(tmp_path, begun={"far": "learn"})
    with pytest.raises(AdapterError, match="a finished adapter is in no stage of its training, got"):
        effzoo.load_adapter(made(tiny), tmp_path)


@pytest.mark.parametrize("spec", METHODS)
def test_older_files_that_do_not_say_load_as_they_did(tiny, tmp_path, spec):
    """In the first stage, and finished."""
    model = trained(made(tiny, spec), 0)
    for _ in range(2):
        effzoo.save_adapter(model, tmp_path)
        edited(tmp_path, begun=None)
        loaded = effzoo.load_adapter(made(tiny), tmp_path)
        assert torch.equal(outputs(loaded), outputs(model)) and not effzoo.status(loaded).stages
        assert torch.equal(outputs(swap_weights(model, tmp_path)), outputs(loaded))
        training.finish(model)


@pytest.mark.parametrize("spec", ["lt_sft", "magnitude[rewind=true]", "ipt[dim=5]"])
@pytest.mark.parametrize(("theirs", "ours"), [(0, 1), (1, 0)])
def test_weights_of_another_stage_are_not_swapped_in(tiny, tmp_path, spec, theirs, ours):
    effzoo.save_adapter(trained(made(tiny, spec), theirs), tmp_path)
    model = trained(made(tiny, spec), ours)
    names, before = stages_of(spec), everything(model)
    with pytest.raises(
        AdapterError,
        match=rf"is in stage '{names[theirs]}' of .* in stage '{names[ours]}' of .*; load it with load_adapter",
    ):
        swap_weights(model, tmp_path)
    assert_same(everything(model), before)
    same = trained(made(tiny, spec), theirs)
    steps(same)
    kept = {key: p for key, p in same.named_parameters()}
    swap_weights(same, tmp_path)
    assert_same(everything(same), everything(effzoo.load_adapter(made(tiny), tmp_path)))
    assert all(p is kept[key] for key, p in same.named_parameters())


# finetune


def run(model, folder, **given):
    return finetune(model, ROWS, output_dir=folder, **{**RUN, **given})


def cut(source, folder, step):
    """The folder of a run that was interrupted after this step."""
    shutil.copytree(source, folder)
    shutil.rmtree(folder / "adapter")
    for checkpoint in checkpoints.whole(folder):
        if checkpoints.step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
    return folder


@pytest.mark.parametrize("spec", ["lt_sft[keep=0.1]", "magnitude[rewind=true]", "ipt[dim=5]"])
def test_a_checkpoint_of_the_second_stage_is_an_adapter_and_a_run_that_resumes_ends_the_same(tiny, tmp_path, spec):
    whole = run(made(tiny, spec), tmp_path / "whole")
    names = stages_of(spec)
    second = [entry["step"] for entry in whole.history if entry.get("stage") == names[1]]
    step = second[0]
    loaded = effzoo.load_adapter(made(tiny), tmp_path / "whole" / f"checkpoint-{step}" / "adapter")
    assert list(effzoo.status(loaded).stages["default"].values()) == [names[1]]
    # attached anew, or the adapter as it is in the checkpoint
    for number, model in enumerate([made(tiny, spec), loaded]):
        result = run(model, cut(tmp_path / "whole", tmp_path / f"cut{number}", step), resume=True)
        assert [entry["loss"] for entry in result.history] == [entry["loss"] for entry in whole.history]
        assert (result.weights / "adapter.json").read_bytes() == (whole.weights / "adapter.json").read_bytes()


@pytest.mark.slow
def test_a_run_goes_on_in_the_stage_of_a_loaded_adapter_and_is_resumed(tiny, tmp_path):
    spec = "magnitude[rewind=true, rounds=2]"
    effzoo.save_adapter(trained(made(tiny, spec), 1), tmp_path / "given")

    def given():
        return effzoo.load_adapter(made(tiny), tmp_path / "given")

    whole = run(given(), tmp_path / "whole")
    assert list(dict.fromkeys(entry["stage"] for entry in whole.history if "stage" in entry)) == ["round 1", "round 2"]
    first = effzoo.load_adapter(made(tiny), tmp_path / "whole" / "checkpoint-1" / "adapter")
    masks = [value for key, value in stored_tensors(given(), "default").items() if key.endswith("mask")]
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            masks, [v for k, v in stored_tensors(first, "default").items() if k.endswith("mask")], strict=True
        )
    )
    for step in (2, 7):
        for number, model in enumerate([given(), made(tiny, spec)]):
            result = run(model, cut(tmp_path / "whole", tmp_path / f"cut{step}{number}", step), resume=True)
            assert (result.weights / "adapter.json").read_bytes() == (whole.weights / "adapter.json").read_bytes()


def test_a_run_that_cannot_be_resumed_leaves_the_stage(tiny, tmp_path):
    run(made(tiny, "lt_sft"), tmp_path / "whole")
    model = trained(made(tiny, "lt_sft"), 1)
    before = everything(model)
    with pytest.raises(
        TrainingError,
        match="is in stage 'full' of lt_sft, but the adapter 'default' of this model is in stage 'sparse' of lt_sft",
    ):
        run(model, cut(tmp_path / "whole", tmp_path / "early", 2), resume=True)
    with pytest.raises(TrainingError, match="belongs to another run: seed was 0 and is now 3"):
        run(model, cut(tmp_path / "whole", tmp_path / "other", 7), resume=True, seed=3)
    assert effzoo.status(model).stages == {"default": {"lt_sft": "sparse"}}
    assert_same(everything(model), before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "number"), [(spec, number) for spec, number in BEGUN if not spec.startswith(("ipt", "routed"))]
)
def test_merged_it_is_what_it_would_be_finished_and_unmerged_it_is_in_its_stage(tiny, spec, number):
    model, finished, twin = (trained(made(tiny, spec), number) for _ in range(3))
    before, stages = everything(model), effzoo.status(model).stages
    training.finish(finished)
    for subject in (model, finished):
        effzoo.merge(subject)
    assert all(torch.equal(x, finished.state_dict()[key]) for key, x in model.state_dict().items())
    assert not effzoo.status(model).stages
    effzoo.unmerge(model)
    assert effzoo.status(model).stages == stages and stages and not effzoo.status(model).finished
    assert_same(everything(model), before)
    for stage in training.stages(twin):
        for subject in (model, twin):
            training.begin(subject, stage)
            steps(subject)
    assert_same(everything(model), everything(twin))


def test_a_merge_that_is_refused_after_finishing_leaves_the_stage(tiny):
    model = trained(made(tiny, "lt_sft"), 0)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    flags = everything(model)[1]
    with pytest.raises(AdapterError, match="would write NaN"):
        effzoo.merge(model)
    assert effzoo.status(model).stages == {"default": {"lt_sft": "full"}} and everything(model)[1] == flags
