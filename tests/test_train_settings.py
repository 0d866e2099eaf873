"""Every argument of `finetune` and `predict`: a value at or past an edge is refused in a sentence, or trained with as
it says."""

import dataclasses
import inspect
import math
import pathlib

import numpy as np
import pytest
import torch
from support import finetune

import effzoo
from effzoo.errors import EffzooError, OptionError, TrainingError
from effzoo.train import Callback, Distillation, Optimisation, Saving
from effzoo.train.settings import MOVED

ROWS = [{"input_ids": [2 + i, 3, 4], "labels": i % 3} for i in range(6)]
NAN, INF = float("nan"), float("inf")
POOL = [
    None, True, False, 0, -1, 2.5, NAN, INF, -INF, 1j, 2**70, -(2**70), 1e308, -0.5, "", "x", b"x", [], (1,), {},
    {1: 2}, object(), 10**400, np.float32("nan"), torch.tensor([1, 2]), np.arange(3), range,
]  # fmt: skip


def same(*values):
    """Whether a drawn value is one of these, of the same type."""
    return lambda drawn: any(type(drawn) is type(value) and drawn == value for value in values)


def is_callable(drawn):
    return drawn is None or callable(drawn)


TAKEN = {  # what each argument may be of the pool; the other values are refused
    "train": same(), "model": same(), "evaluate": same(None), "output_dir": same("x"), "epochs": same(2.5),
    "max_steps": same(None),
    "batch_size": same(), "eval_batch_size": same(None), "gradient_accumulation": same(),
    "learning_rate": same(None, 2.5, 2**70, 1e308),
    "teacher": same(None), "distillation": same(None), "weight_decay": same(0, 2.5), "warmup": same(0),
    "schedule": same(), "optimizer": same(), "rates": same({}), "schedule_options": same({}), "log_with": same([]),
    "patience": same(None),
    "clip": same(None, 2.5), "precision": same(), "calibration_batches": same(), "seed": same(0),
    "evaluate_every": same(None),
    "save_every": same(None), "keep": same(None), "best": same(None), "log_every": same(None),
    "resume": same(True, False),
    "overwrite": same(True, False), "progress": same(True, False), "optimisation": same(), "saving": same(),
    "recompute": same(), "sequence_ranks": same(), "packing": same(True, False),
    "group_by_length": same(True, False), "num_workers": same(0), "collator": is_callable, "callbacks": same([]),
    "metrics": is_callable,
}  # fmt: skip


def classifier(tiny, **options):
    return effzoo.build(
        "bert", **{**tiny, "layers": 1, "task": "classification", "num_labels": 3, "peft": "lora", **options}
    )


@pytest.fixture
def train(tiny, tmp_path):
    def run(**given):
        given = {"model": classifier(tiny), "train": ROWS, "output_dir": tmp_path, "progress": False, **given}
        if "saving" not in given:
            given = {"save_every": None, **given}
        if "epochs" not in given:
            given = {"max_steps": 2, **given}
        return finetune(given.pop("model"), given.pop("train"), **given)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", TAKEN)
def test_what_an_argument_cannot_be_is_refused_in_a_sentence(train, tmp_path, name):
    for value in POOL:
        if not TAKEN[name](value):
            with pytest.raises(EffzooError) as told:
                train(**{name: value})
            assert " " in str(told.value) and not list(tmp_path.iterdir()), f"{name}={value!r}: {told.value}"


def test_every_setting_is_among_them():
    fields = [field.name for settings in (Optimisation, Saving) for field in dataclasses.fields(settings)]
    assert set(TAKEN) == {*inspect.signature(effzoo.finetune).parameters, *fields}


@pytest.mark.parametrize("name", MOVED)
def test_a_keyword_of_earlier_versions_names_the_new_one(tiny, tmp_path, name):
    with pytest.raises(OptionError) as told:
        effzoo.finetune(classifier(tiny), ROWS, output_dir=tmp_path, **{name: 1})
    taker = "recompute='blocks'" if name == "gradient_checkpointing" else f"({name}=...)"
    assert f"finetune has no {name} any more; write " in str(told.value) and str(told.value).endswith(taker)


@pytest.mark.parametrize("value", POOL, ids=lambda value: type(value).__name__)  # a repr may hold an address
def test_what_predict_cannot_take_is_refused_in_a_sentence(tiny, value):
    model, good = classifier(tiny), {"batch_size": 4, "precision": "float32", "progress": False}
    assert {"model", "examples", *good} == set(inspect.signature(effzoo.predict).parameters)
    for name in ("model", "examples", *good):
        if name == "progress" and isinstance(value, bool):
            continue
        given = {"model": model, "examples": ROWS, **good, name: value}
        with pytest.raises(EffzooError):
            effzoo.predict(given.pop("model"), given.pop("examples"), **given)


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"epochs": 0.5, "batch_size": 1}, 3),
        ({"epochs": np.float32(1), "batch_size": np.int64(4)}, 2),
        ({"batch_size": 2**31 - 1, "eval_batch_size": 2**31 - 1, "evaluate": ROWS}, 2),
        ({"gradient_accumulation": 100, "warmup": 0.999, "weight_decay": 2.5, "clip": 1e6, "schedule": "constant"}, 2),
        ({"seed": 2**32 - 1, "warmup": 1, "evaluate_every": 2**31 - 1, "evaluate": ROWS, "log_every": 2**31 - 1}, 2),
        ({"max_steps": 1}, 1),
    ],
)
def test_values_at_the_edge_train(train, tiny, given, steps):
    model = classifier(tiny)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    result = train(model=model, **given)
    assert result.steps == steps and math.isfinite(result.metrics["train_loss"]) and result.metrics["train_loss"] > 0
    now = dict(model.named_parameters())
    assert any(not torch.equal(now[name], value) for name, value in before.items()), "something was learned"
    assert all(bool(torch.isfinite(p).all()) for p in now.values())


def test_a_run_of_more_steps_than_can_be_counted_is_refused(train):
    with pytest.raises(OptionError, match=r"epochs=1e\+308 of 1 steps are more than 2,147,483,647 steps"):
        train(epochs=1e308)


def test_a_warmup_that_takes_all_steps_is_refused(train):
    with pytest.raises(OptionError, match="warmup of 2 steps takes all 2 steps"):
        train(warmup=2, max_steps=2)


@pytest.mark.parametrize("name", ["labels", "logits", "temperature", "share", "layers"])
@pytest.mark.parametrize("value", [NAN, INF, -1.0, 1j, "x", True, -1, [1.5], None], ids=repr)
def test_settings_of_distillation_are_refused_in_a_sentence(name, value):
    if not (name == "layers" and value is None):
        with pytest.raises(OptionError, match="distillation"):
            Distillation(**{name: value}).pairs(1, 1)


def test_a_file_is_no_output_folder(train, tmp_path):
    file = pathlib.Path(tmp_path) / "file"
    file.write_text("x")
    with pytest.raises(OptionError, match="and .*file is a file"):
        train(output_dir=file)


@pytest.mark.parametrize(
    "settings", [{"log_every": 100}, {"evaluate": ROWS}, {"save_every": 1}, {"evaluate": ROWS, "best": "loss"}]
)
def test_weights_that_are_no_numbers_are_never_a_result(train, tmp_path, settings):
    """The last step makes them: its loss is still finite, and nothing that follows would log another one."""
    with pytest.raises(TrainingError, match="is not finite after step 1|loss of the evaluation is nan at step 1"):
        train(learning_rate=1e308, weight_decay=0, max_steps=1, **settings)
    assert not list(tmp_path.rglob("*.safetensors"))


class Spoil(Callback):
    """Makes a weight, or the gradient of one, no number in a step; keeps the weights of every update."""

    def __init__(self, step, what):
        self.at, self.what, self.updates = step, what, []

    def on_step_start(self, loop):
        if loop.step + 1 == self.at:
            parameter = next(p for p in loop.model.parameters() if p.requires_grad)
            if self.what == "gradient":
                parameter.register_hook(lambda gradient: gradient * INF)
            else:
                parameter.data[0] = NAN

    def on_update(self, loop):
        self.updates.append([p.detach().clone() for p in loop.model.parameters() if p.requires_grad])


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize(
    ("what", "named"), [("weight", "loss is nan"), ("gradient", "norm of the gradient is (nan|inf)")]
)
def test_a_step_whose_loss_or_gradient_is_no_number_is_not_taken(train, tiny, tmp_path, what, named, clip):
    """The next log is far away, and the loss may still be a number."""
    model, spoil = classifier(tiny), Spoil(3, what)
    with pytest.raises(TrainingError, match=f"the {named} at step 3 with learning rate"):
        train(model=model, max_steps=6, log_every=100, clip=clip, callbacks=[spoil])
    assert len(spoil.updates) == 2 and not list(tmp_path.rglob("*.safetensors"))
    if what == "gradient":
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(torch.equal(now, before) for now, before in zip(trained, spoil.updates[-1], strict=True))


def test_a_run_whose_weights_grow_without_end_stops_in_its_second_step(train, tiny):
    with pytest.raises(TrainingError, match="the (loss|norm of the gradient) is (nan|inf) at step 2"):
        train(model=classifier(tiny), max_steps=9, log_every=100, learning_rate=1e30, clip=None, warmup=0)


def test_the_last_step_is_logged_so_that_the_mean_is_over_all_steps(train):
    result = train(max_steps=3, log_every=2)
    assert [entry["step"] for entry in result.history] == [2, 3]
    assert result.metrics["train_loss"] == pytest.approx(
        (2 * result.history[0]["loss"] + result.history[1]["loss"]) / 3
    )


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (5, 1), (25, 2), (99, 9), (100, 10), (4000, 10)])
def test_a_short_run_is_logged_often_enough_for_a_curve(steps, every):
    assert Saving().logs_every(steps) == every and Saving(log_every=7).logs_every(steps) == 7


def test_a_best_metric_that_no_evaluation_gives_is_named(train):
    with pytest.raises(
        TrainingError,
        match=r"best='acuracy' is no metric of the evaluation; did you mean 'accuracy'\? Metrics: loss, accuracy",
    ):
        train(evaluate=ROWS, best="acuracy")
    result = train(evaluate=ROWS, best="undefined", metrics=lambda _: {"undefined": NAN})
    assert result.best is None, "a metric that is undefined throughout chooses nothing"


def test_a_weight_decay_that_takes_all_of_a_weight_is_refused(train):
    with pytest.raises(OptionError, match="takes all of every weight in one step; give less than 10"):
        train(weight_decay=10, learning_rate=0.1)
