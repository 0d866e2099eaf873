"""The loop of `finetune`: optimizers and schedules by name, factors on rates, trackers, early stopping, callbacks."""

import copy
import math
import sys
from types import ModuleType

import pytest
import torch
from accelerate.tracking import GeneralTracker
from support import finetune
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, get_scheduler

import effzoo
from effzoo.errors import IncompatibleError, InputError, OptionError, TrainingError
from effzoo.folder import saving
from effzoo.train import Callback, Optimisation, Saving, checkpoints, optimizers
from effzoo.train.callbacks import OfTransformers
from effzoo.train.schedules import SCHEDULES
from effzoo.train.supervised import Supervised

ROWS = [{"input_ids": [2 + i, 3, 4 + i % 2], "labels": i % 3} for i in range(12)]
PLAIN = {"batch_size": 4, "learning_rate": 1e-2, "progress": False, "log_every": 1, "save_every": None, "clip": None}


@pytest.fixture
def build(tiny):
    def made(peft="lora[rank=2]", **options):
        torch.manual_seed(0)
        return effzoo.build(
            "bert", **{**tiny, "layers": 1, "task": "classification", "num_labels": 3, "peft": peft, **options}
        ).double()

    return made


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "momentum": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "adafactor": torch.optim.Adafactor,
    "adamw": torch.optim.AdamW,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_takes_the_steps_of_that_class(build, tmp_path, name):
    """One batch holds all rows, so that a step is one gradient of their mean loss."""
    model, other = build(), build()
    settings = {**PLAIN, "batch_size": 12, "warmup": 0, "schedule": "constant", "weight_decay": 0.0, "max_steps": 3}
    finetune(model, ROWS, output_dir=tmp_path, optimizer=name, **settings)
    parameters = [p for p in other.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[name]([{"params": parameters, "lr": 1e-2, "weight_decay": 0.0}])
    batch = {key: torch.tensor([row[key] for row in ROWS]) for key in ROWS[0]}
    for _ in range(3):
        optimizer.zero_grad()
        other.train()(**batch).loss.backward()
        optimizer.step()
    for key, value in trained(other).items():
        torch.testing.assert_close(trained(model)[key], value, rtol=1e-9, atol=1e-12)
    again = build()
    finetune(again, ROWS, output_dir=tmp_path / "f", optimizer=OPTIMIZERS[name], **settings)
    for key, value in trained(again).items():
        torch.testing.assert_close(trained(model)[key], value, rtol=1e-9, atol=1e-12)


def test_optimizers_that_cannot_be_are_refused(build, tmp_path):
    with pytest.raises(OptionError, match="there is no optimizer 'adamv'; did you mean 'adamw'.* or a function of"):
        Optimisation(optimizer="adamv")
    with pytest.raises(IncompatibleError, match="run on a GPU; take 'adamw'"):
        finetune(build(), ROWS, output_dir=tmp_path, optimizer="adamw_8bit", max_steps=1, **PLAIN)
    with pytest.raises(OptionError, match="optimizer returns 3; a torch.optim.Optimizer is needed"):
        finetune(build(), ROWS, output_dir=tmp_path, optimizer=lambda groups: 3, max_steps=1, **PLAIN)


def test_adafactor_of_torch_does_not_know_rows_of_other_processes(monkeypatch):
    """It would stop inside of torch in the first step, as its norms of rows are changed in place."""
    monkeypatch.setattr(optimizers, "is_split", lambda _: True)
    with pytest.raises(IncompatibleError, match="does not sum over rows that other processes hold; take 'adamw'"):
        optimizers.make_optimizer("adafactor", [{"params": [torch.nn.Parameter(torch.ones(2, 2))], "lr": 1e-2}])


class Rates(Callback):
    """The learning rate of each parameter by name, at every step."""

    def __init__(self):
        self.seen = []

    def on_gradients(self, loop):
        names = {id(p): name for name, p in loop.model.named_parameters()}
        self.seen.append({names[id(p)]: group["lr"] for group in loop.optimizer.param_groups for p in group["params"]})


def test_factors_on_rates_are_lora_plus(build, tmp_path):
    rates = Rates()
    settings = {**PLAIN, "warmup": 0, "schedule": "constant", "callbacks": [rates], "max_steps": 2}
    finetune(build(), ROWS, output_dir=tmp_path, rates={"*.lora.B": 16, "*": 0.5}, **settings)
    for name, rate in rates.seen[-1].items():
        assert rate == pytest.approx(0.16 if name.endswith(".lora.B") else 0.005), name
    assert any(name.endswith(".lora.B") for name in rates.seen[-1])
    with pytest.raises(OptionError, match=r"rates names '\*.lora.C', which no trained parameter fits"):
        finetune(build(), ROWS, output_dir=tmp_path / "c", rates={"*.lora.C": 2}, **settings)


def test_factors_on_rates_may_name_what_only_the_first_stage_trains(build, tmp_path):
    rates = Rates()
    finetune(build(peft="lt_sft"), ROWS, output_dir=tmp_path, rates={"*.full_weight": 2}, callbacks=[rates],
             max_steps=4, **{**PLAIN, "warmup": 0, "schedule": "constant"})  # fmt: skip
    weight, bias = (rates.seen[0][f"blocks.0.mlp.up.adapters.default.lt_sft.full_{of}"] for of in ("weight", "bias"))
    assert weight == pytest.approx(2 * bias) and len(rates.seen) == 4


def test_factors_on_rates_reach_the_base_layer_by_layer(build, tmp_path):
    rates = Rates()
    model = build(peft=None, layers=2)
    finetune(model, ROWS, output_dir=tmp_path, rates={"blocks.0.*": 0.1}, callbacks=[rates], max_steps=1,
             **{**PLAIN, "warmup": 0})  # fmt: skip
    assert {name.startswith("blocks.0.") for name in rates.seen[0]} == {True, False}
    assert all(
        rate == pytest.approx(1e-3 if name.startswith("blocks.0.") else 1e-2) for name, rate in rates.seen[0].items()
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_that_of_transformers(build, tmp_path, name):
    options = {
        "cosine_with_min_lr": {"min_lr": 1e-3},
        "warmup_stable_decay": {"num_decay_steps": 3},
        "cosine_with_restarts": {"num_cycles": 2},
    }.get(name, {})
    result = finetune(
        build(), ROWS, output_dir=tmp_path, schedule=name, schedule_options=options, warmup=2, max_steps=9, **PLAIN
    )
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-2)
    schedule = get_scheduler(SCHEDULES[name], optimizer, 2, 9, options)
    expected = []
    for _ in range(9):
        optimizer.step()
        schedule.step()
        expected.append(schedule.get_last_lr()[0])
    assert [entry["learning_rate"] for entry in result.history] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        ("linear", {"num_cycles": 2}, r"'linear' does not take the option 'num_cycles'. Options: none"),
        ("constant", {"lr_end": 2}, r"'constant' does not take the option 'lr_end'. Options: none"),
        ("constant", {"last_epoch": 3}, "'constant' does not take the option 'last_epoch'"),
        ("cosine", {"num_cycle": 2}, "'num_cycle'; did you mean 'num_cycles'"),
        ("warmup_stable_decay", {}, "'warmup_stable_decay' needs the option num_decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": 2, "num_stable_steps": 4}, "not take .* 'num_stable_steps'"),
        ("warmup_stable_decay", {"num_decay_steps": 0}, "num_decay_steps is at least 1, got 0"),
        ("warmup_stable_decay", {"num_decay_steps": "2"}, "num_decay_steps takes"),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "linear", "num_cycles": 2}, "num_cycles does"),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "square"}, "Unknown decay type: square"),
        ("cosine_with_min_lr", {}, "needs one of the options min_lr and min_lr_rate"),
        ("cosine_with_min_lr", {"min_lr": 1e-4, "min_lr_rate": 0.1}, "needs one of the options min_lr and min_lr_rate"),
        ("cosine_with_min_lr", {"min_lr": "a"}, r"schedule_options={'min_lr': 'a'}: unsupported"),
        ("cosine_with_min_lr", {"min_lr_rate": 1.5}, "multiplies the learning rate .* is from 0 to 1"),
        ("polynomial", {"power": "x"}, r"schedule_options={'power': 'x'}: unsupported"),
        ("inverse_sqrt", {"timescale": -5}, "multiplies the learning rate .* factor is from 0 to 1|division by zero"),
    ],
)  # fmt: skip
def test_options_that_a_schedule_lacks_or_would_ignore_are_refused(schedule, options, message):
    with pytest.raises(OptionError, match=message):
        Optimisation(schedule=schedule, schedule_options=options)


class Kept(GeneralTracker):
    name = "kept"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.settings, self.logged, self.finished = None, [], False

    @property
    def tracker(self):
        return None

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step, **_):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_a_tracker_gets_every_entry_of_the_history(build, tmp_path):
    kept = Kept()
    result = finetune(build(), ROWS, evaluate=ROWS[:5], output_dir=tmp_path, log_with=[kept], max_steps=4, **PLAIN)
    merged = {}
    for step, values in kept.logged:
        merged.setdefault(step, {}).update(values)
    for entry in result.history:
        assert {"step": entry["step"], "epoch": entry["epoch"], **merged[entry["step"]]} == entry
    assert kept.finished and kept.settings["seed"] == 0 and kept.settings["learning_rate"] == 1e-2
    kept = Kept()
    with pytest.raises(IncompatibleError, match="should_epoch_stop"):
        finetune(build(), ROWS, output_dir=tmp_path / "b", log_with=[kept], callbacks=[Skip], max_steps=4, **PLAIN)
    assert kept.finished, "also where an error ends the run"


def test_a_tracker_that_is_not_there_is_refused():
    with pytest.raises(OptionError, match="log_with takes names of trackers .* got 'wandbb'; did you mean 'wandb'"):
        Saving(log_with="wandbb")
    with pytest.raises(OptionError, match="log_with='dvclive' is not installed; pip install dvclive"):
        Saving(log_with=["dvclive"])


class Worse(Callback):
    """Makes every step after the third a bad one."""

    def on_update(self, loop):
        if loop.step >= 3:
            with torch.no_grad():
                for parameter in loop.trained:
                    parameter.add_(torch.randn_like(parameter))


def test_a_run_ends_after_so_many_evaluations_that_were_no_better(build, tmp_path):
    """And resumed, it stays ended; transformers' callback ends it at the same step."""
    settings = {**PLAIN, "evaluate": ROWS, "evaluate_every": 1, "best": "loss", "max_steps": 12, "save_every": 1}
    ours, theirs = build(), build()
    first = finetune(ours, ROWS, output_dir=tmp_path / "a", patience=2, callbacks=[Worse()], **settings)
    values = [entry["eval_loss"] for entry in first.history]
    best = min(range(len(values)), key=values.__getitem__)
    assert first.steps == best + 3 < 12 and first.best.name == f"checkpoint-{best + 1}"
    assert first.metrics["eval_loss"] == values[best]
    again = finetune(build(), ROWS, output_dir=tmp_path / "a", patience=2, resume=True, **settings)
    assert again.steps == first.steps and again.history == first.history
    stopped = finetune(
        theirs, ROWS, output_dir=tmp_path / "b", callbacks=[Worse(), EarlyStoppingCallback(2)], **settings
    )
    assert stopped.history == first.history
    assert all(torch.equal(value, trained(theirs)[name]) for name, value in trained(ours).items())
    with pytest.raises(OptionError, match="patience=2 counts evaluations that are no better; give best"):
        Saving(patience=2)


def test_early_stopping_goes_on_counting_when_a_run_is_resumed(build, tmp_path):
    settings = {**PLAIN, "evaluate": ROWS, "evaluate_every": 1, "best": "loss", "max_steps": 12, "save_every": 1}
    whole = finetune(
        build(), ROWS, output_dir=tmp_path / "a", callbacks=[Worse(), EarlyStoppingCallback(3)], **settings
    )

    class Interrupt(Callback):
        def on_step_start(self, loop):
            if loop.step == whole.steps - 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(build(), ROWS, output_dir=tmp_path / "b", **settings,
                 callbacks=[Worse(), EarlyStoppingCallback(3), Interrupt()])  # fmt: skip
    resumed = finetune(build(), ROWS, output_dir=tmp_path / "b", resume=True, **settings,
                       callbacks=[Worse(), EarlyStoppingCallback(3)])  # fmt: skip
    assert resumed.steps == whole.steps and resumed.history == whole.history


class Told(Callback):
    def __init__(self):
        self.events = []

    def on_log(self, loop, entry):
        self.events.append(("log", loop.step, "loss" in entry))

    def on_evaluate(self, loop, metrics):
        self.events.append(("evaluate", loop.step, set(metrics)))

    def on_save(self, loop, checkpoint):
        self.events.append(("save", loop.step, checkpoint.is_dir()))

    def on_step_end(self, loop):
        if loop.step == 2:
            loop.want("evaluate", "save")
        if loop.step == 3:
            loop.stop()

    def close(self):
        self.events.append("closed")


def test_a_callback_steers_the_run(build, tmp_path):
    told = Told()
    settings = {**PLAIN, "evaluate": ROWS, "evaluate_every": None, "log_every": 100, "max_steps": 9}
    result = finetune(build(), ROWS, output_dir=tmp_path, callbacks=[told], **settings)
    evaluated = {"eval_loss", "eval_accuracy"}
    assert told.events == [
        ("log", 2, True), ("log", 2, False), ("evaluate", 2, evaluated), ("save", 2, True),
        ("log", 3, True), ("log", 3, False), ("evaluate", 3, evaluated), "closed",
    ]  # fmt: skip
    assert result.steps == 3 and result.last.name == "checkpoint-2", "save_every is None"


@pytest.mark.parametrize("hook", ["on_step_start", "on_gradients", "on_update", "on_step_end", "on_log", "on_evaluate"])
def test_a_run_that_a_callback_stops_is_logged_evaluated_and_saved_as_at_its_end(build, tmp_path, hook):
    def stop(self, loop, *values):
        loop.stop()

    settings = {**PLAIN, "evaluate": ROWS, "log_every": 2, "evaluate_every": 2, "save_every": 4, "max_steps": 9}
    stopping = type("Stopping", (Callback,), {hook: stop})
    result = finetune(build(), ROWS, output_dir=tmp_path, callbacks=[stopping], **settings)
    step = 2 if hook in ("on_log", "on_evaluate") else 1
    assert result.steps == step and result.last.name == f"checkpoint-{step}"
    assert [entry["step"] for entry in result.history] == [step]
    assert result.metrics["train_loss"] == result.history[0]["loss"] and "eval_loss" in result.metrics


def test_what_cannot_follow_a_step_is_refused(build, tmp_path):
    class Wanting(Callback):
        def on_step_end(self, loop):
            loop.want("evalaute")

    with pytest.raises(OptionError, match="'log', 'evaluate' or 'save', and a callback wants 'evalaute'"):
        finetune(build(), ROWS, output_dir=tmp_path, callbacks=[Wanting], max_steps=1, **PLAIN)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rates": {"*.lora.C": 2}}, "no trained parameter fits"),
        ({"optimizer": "adamw_8bit"}, "run on a GPU"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS.*doesn't support per-parameter options"),
        ({"schedule": "polynomial", "learning_rate": 1e-8}, "schedule 'polynomial' .* lr_end .* must be smaller"),
        (
            {"schedule": "warmup_stable_decay", "schedule_options": {"num_decay_steps": 3}, "warmup": 0},
            "of 2 steps, 0 of them warmup, at most 2 can be decay",
        ),
        (
            {
                "schedule": "warmup_stable_decay",
                "schedule_options": {"num_decay_steps": 1, "warmup_type": "cosine"},
                "warmup": 0,
            },
            "warmup_type does nothing without warmup",
        ),
        (
            {"schedule": "cosine_with_min_lr", "schedule_options": {"min_lr": 0.1}, "max_steps": 9},
            "multiplies the learning rate 0.01 by",
        ),
        ({"rates": {"*": 200.0}, "weight_decay": 1.0}, "weight_decay=1 at learning rate 2 takes all"),
        ({"callbacks": [EarlyStoppingCallback()]}, "requires metric_for_best_model.* best is metric_for_best_model"),
    ],
)
def test_a_run_that_is_refused_leaves_the_checkpoints_of_an_earlier_one(build, tmp_path, given, message):
    settings = {**PLAIN, "save_every": 1, "max_steps": 2}
    finetune(build(), ROWS, output_dir=tmp_path, **settings)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((OptionError, IncompatibleError), match=message):
        finetune(build(), ROWS, output_dir=tmp_path, overwrite=True, **settings | given)
    assert sorted(tmp_path.rglob("*")) == before


def test_callbacks_may_be_others_when_a_run_is_resumed(build, tmp_path):
    class Counting(Callback):
        def __init__(self, start):
            self.count = start

        def state(self):
            return {"count": self.count}

        def load(self, state):
            self.count = state["count"]

    settings = {**PLAIN, "save_every": 1, "max_steps": 2}
    finetune(build(), ROWS, output_dir=tmp_path, callbacks=[Told(), Counting(3), Counting(4)], **settings)
    others = [Counting(0), Told(), Counting(0), Counting(9)]
    finetune(build(), ROWS, output_dir=tmp_path, callbacks=others, resume=True, **settings)
    assert [callback.count for callback in others if isinstance(callback, Counting)] == [3, 4, 9]


def test_an_evaluation_without_a_value_is_no_better(build, tmp_path, caplog):
    settings = {**PLAIN, "evaluate": ROWS, "evaluate_every": 1, "best": "f1", "patience": 3, "max_steps": 9}
    values = iter([0.5, math.nan, 0.4, math.nan])
    result = finetune(build(), ROWS, output_dir=tmp_path / "a", metrics=lambda _: {"f1": next(values)}, **settings)
    assert result.steps == 4 and result.best.name == "checkpoint-1"
    result = finetune(build(), ROWS, output_dir=tmp_path / "b", metrics=lambda _: {"f1": math.nan}, **settings)
    assert result.steps == 3 and result.best is None
    assert "best='f1' was a number in no evaluation that counts, so the last weights stay" in caplog.text


@pytest.mark.parametrize(("given", "message"), [(3, "numbers by name, got 3"), ({"f1": "x"}, "numbers by name, got")])
def test_metrics_that_are_no_numbers_are_refused(build, tmp_path, given, message):
    with pytest.raises(OptionError, match=message):
        finetune(build(), ROWS, evaluate=ROWS, output_dir=tmp_path, metrics=lambda _: given, max_steps=1, **PLAIN)


def test_metrics_need_a_row_of_logits_for_each_example(build, tmp_path):
    def first_alone(rows):
        return {key: torch.tensor([rows[0][key]]) for key in rows[0]}

    with pytest.raises(InputError, match="the collator makes 1 rows of 4 examples"):
        finetune(build(), ROWS, evaluate=ROWS, output_dir=tmp_path, collator=first_alone, metrics=lambda _: {},
                 max_steps=1, **PLAIN)  # fmt: skip


class Events(TrainerCallback):
    """The names of what is called, with the step and what the state says."""

    def __init__(self):
        self.calls = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(args, state, control, **given):
            logs = {key for key in given.get("logs", {}) if key in ("loss", "eval_loss")}
            self.calls.append((name, state.global_step, state.max_steps, round(state.epoch or 0, 6), frozenset(logs)))

        return note


class Rows(Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return {key: torch.tensor(value) for key, value in ROWS[index].items()}


def test_callbacks_of_transformers_are_called_as_a_trainer_calls_them(build, tmp_path):
    theirs, ours = Events(), Events()
    model = build()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "theirs"), max_steps=5, per_device_train_batch_size=4, logging_steps=1, use_cpu=True,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=3, report_to="none", disable_tqdm=True,
        remove_unused_columns=False, label_names=["labels"],
    )  # fmt: skip
    wrapped, data = Supervised(copy.deepcopy(model).float()), {"train_dataset": Rows(), "eval_dataset": Rows()}
    wrapped.accepts_loss_kwargs = False  # its loss is a plain mean
    Trainer(wrapped, arguments, callbacks=[theirs], **data).train()
    finetune(
        model, ROWS, evaluate=ROWS, output_dir=tmp_path / "ours", callbacks=[ours], max_steps=5,
        **{**PLAIN, "evaluate_every": 2, "save_every": 3},
    )  # fmt: skip
    left_out = {"on_init_end", "on_prediction_step", "on_substep_end"}
    expected = [call for call in theirs.calls if call[0] not in left_out]
    last = [call for call in expected if call[0] == "on_log"][-1]  # of its speed, after the last step
    expected.remove(last)
    assert ours.calls == expected


class Skip(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_epoch_stop = True


def test_a_callback_of_transformers_may_have_been_in_another_run(build, tmp_path):
    class Once(TrainerCallback):
        stopped = False

        def on_step_end(self, args, state, control, **_):
            control.should_training_stop, self.stopped = not self.stopped, True

    callbacks = [OfTransformers([Once()])]
    runs = [finetune(build(), ROWS, output_dir=tmp_path / str(i), callbacks=callbacks, max_steps=3, **PLAIN)
            for i in range(2)]  # fmt: skip
    assert [result.steps for result in runs] == [1, 3]


def test_what_a_callback_of_transformers_cannot_ask_for_is_refused(build, tmp_path):
    with pytest.raises(IncompatibleError, match="should_epoch_stop, and a run here is counted in steps"):
        finetune(build(), ROWS, output_dir=tmp_path, callbacks=[Skip], max_steps=2, **PLAIN)
    with pytest.raises(OptionError, match="callbacks is a list of effzoo.train.Callback and transformers.Train"):
        finetune(build(), ROWS, output_dir=tmp_path, callbacks=[print], max_steps=2, **PLAIN)


def test_the_norm_of_the_gradients_is_that_before_clipping(build, tmp_path):
    free = finetune(build(), ROWS, output_dir=tmp_path / "a", max_steps=1, **PLAIN)
    cut = finetune(build(), ROWS, output_dir=tmp_path / "b", max_steps=1, **{**PLAIN, "clip": 1e-3})
    assert free.history[0]["grad_norm"] == cut.history[0]["grad_norm"] > 1e-3
    assert math.isfinite(free.history[0]["grad_norm"])


def test_a_result_names_the_index_of_a_model_in_several_files(build, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "LIMIT", 4000)
    model, other = build(peft=None), build(peft=None)
    result = finetune(model, ROWS, output_dir=tmp_path, max_steps=1, **PLAIN)
    assert result.weights == tmp_path / "model.safetensors.index.json" and result.weights.is_file()
    checkpoints.load_weights(other, tmp_path)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


class Coded(torch.Tensor):
    """A tensor of codes and a scale, as the optimizers of torchao keep them."""

    @staticmethod
    def __new__(cls, codes, scale, dtype):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype)

    def __init__(self, codes, scale, dtype):
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func is torch.ops.aten.detach.default
        return cls(args[0].codes, args[0].scale, args[0].dtype)

    def __tensor_flatten__(self):
        return ["codes", "scale"], [self.dtype]

    @classmethod
    def __tensor_unflatten__(cls, parts, context, size=None, stride=None):
        return cls(parts["codes"], parts["scale"], *context)


def test_states_that_are_codes_come_back_as_they_were(tmp_path, monkeypatch):
    """torchao 0.18 itself was run by hand: its AdamW in 8 and 4 bits trains and resumes to the same bits."""
    module = ModuleType("torchao.double")
    module.Coded = Coded
    monkeypatch.setitem(sys.modules, "torchao.double", module)
    monkeypatch.setattr(Coded, "__module__", "torchao.double")
    state = {0: {"exp_avg": Coded(torch.arange(6).to(torch.uint8), torch.tensor([0.5]), torch.bfloat16), "step": 3}}
    checkpoints.write_state(tmp_path, {"optimizer": {"state": state}})
    back = checkpoints.read_state(tmp_path)["optimizer"]["state"][0]
    assert type(back["exp_avg"]) is Coded and back["step"] == 3 and back["exp_avg"].dtype == torch.bfloat16
    assert torch.equal(back["exp_avg"].codes, torch.arange(6).to(torch.uint8)) and back["exp_avg"].scale == 0.5
    text = (tmp_path / "state.json").read_text()
    (tmp_path / "state.json").write_text(text.replace("torchao.double", "os.double"))
    with pytest.raises(TrainingError, match="a state is of class os.double:Coded, which is none of torchao"):
        checkpoints.read_state(tmp_path)


def test_a_collator_that_fails_on_the_evaluation_says_of_which_data(build, tmp_path):
    def collate(examples):
        batch = {key: torch.tensor([row[key] for row in examples]) for key in ("input_ids", "labels")}
        return {"input_ids": batch["input_ids"]} if len(examples) == 2 else batch

    with pytest.raises(InputError, match="what the collator returns for evaluate has no labels"):
        finetune(build(), ROWS, evaluate=ROWS[:6], output_dir=tmp_path, collator=collate, max_steps=1, **PLAIN)
