"""`finetune` makes the calls that a loop of one's own makes: calibration, stages, schedules, penalties, two passes,
rates, finishing; and resumes."""

import dataclasses
import io
import json
import math
import os
import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import finetune, launcher
from torch import nn  # noqa: F401 - for the toy
from torch.nn import functional as F
from transformers import TrainerCallback

import effzoo
from effzoo.errors import IncompatibleError, OptionError, TrainingError
from effzoo.peft import PeftModule, Stage, TrainingHooks, training  # noqa: F401 - for the toy
from effzoo.sites import sites
from effzoo.train import Callback, checkpoints
from effzoo.train.batches import Order, Pad
from effzoo.train.stages import StageSpan, stage_spans

CALLS = []

TOY = '''
class Shift(PeftModule):
    """y + scale * dial * (dense shift), later the half of it that moved most; two training
    passes in a row differ by `apart`."""

    def __init__(self, width, apart):
        super().__init__()
        self.dense = nn.Parameter(torch.zeros(width))
        self.few = None
        self.apart, self.passes = apart, 0
        self.register_buffer("places", None)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("dial", torch.ones(()))

    def shift(self):
        if self.few is None:
            return self.dense
        return self.places.new_zeros(self.places.numel() * 2, dtype=self.few.dtype).index_add(0, self.places, self.few)

    def after(self, x, y, context):
        self.passes += self.training
        sign = 1 if self.passes % 2 else -1
        dial = 1.0 if self.dial is None else self.dial
        slope = torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)  # a constant would vanish in the norm behind
        drawn = sign * self.apart * slope * (self.shift() + 1).exp() if self.training else 0.0
        return y + self.scale * dial * self.shift() + drawn

    def narrow(self, noise):
        values, places = self.dense.detach().abs().topk(self.dense.numel() // 2)
        self.places = places
        self.few = nn.Parameter(self.dense.detach()[places] + noise * torch.randn(len(places)))
        self.dense = None

@effzoo.peft.register("toy")
class Toy(TrainingHooks):
    """Every hook. noise: of what `begin` draws at random."""

    default_targets = ("mlp.down",)
    learning_rate = 3e-3
    rates = {"few": 4.0}

    def __init__(self, *, staged: bool = True, consistency: float = 0.5, noise: float = 0.0, weight: float = 0.3):
        super().__init__()
        self.stages = (Stage("wide", 1), Stage("narrow", 1)) if staged else ()
        self.consistency, self.noise, self.weight = consistency, noise, weight
        self.schedule_ends = 0.5

    def make(self, site):
        return Shift(site.out_features, 0.2 if self.consistency else 0.0)

    def calibrate(self, model, modules, batches):
        batches = list(batches)
        keys, ids = [sorted(batch) for batch in batches], [batch["input_ids"].tolist() for batch in batches]
        CALLS.append(("calibrate", keys, ids, model.training))
        ids = torch.cat([batch["input_ids"].flatten() for batch in batches])
        for module in modules.values():
            module.scale.fill_(1.0 + ids[ids > 0].double().mean() / 53)
        model(**batches[0]).loss.backward()

    def schedule(self, modules, progress):
        CALLS.append(("schedule", progress))
        for module in modules.values():
            module.dial.fill_(1.0 + progress)

    def penalty(self, modules):
        return self.weight * torch.stack([(module.shift() - 0.1).square().sum() for module in modules.values()]).sum()

    def begin(self, stage, modules):
        CALLS.append(("begin", stage))
        if stage == "narrow":
            for module in modules.values():
                if module.few is None:
                    module.narrow(self.noise)

    def finish(self, modules):
        CALLS.append(("finish", sorted(modules)))
        for module in modules.values():
            if module.dial is not None:
                module.scale, module.dial = module.scale * module.dial, None

@effzoo.peft.register("look")
class Look(TrainingHooks):
    """Looks at data and changes nothing."""

    default_targets = ("mlp.down",)

    def make(self, site):
        return Shift(site.out_features, 0.0)

    def calibrate(self, model, modules, batches):
        assert len(list(batches)) == len(list(batches)) > 0
'''


@pytest.fixture(autouse=True)
def toy():
    """The toy method, known during the test."""
    CALLS.clear()
    with effzoo.scope():
        exec(TOY, {**globals()})
        yield


@pytest.fixture
def build(tiny):
    """A model, the same one for the same arguments."""

    def made(peft="toy", task="classification", name="bert", dtype=torch.float64, **options):
        torch.manual_seed(0)
        model = effzoo.build(name, **{**tiny, "task": task, "num_labels": 3, **options}).to(dtype)
        return effzoo.attach(model, peft) if peft else model

    return made


def rows(task="classification", count=22):
    draw, found = torch.Generator().manual_seed(0), []
    for _ in range(count):
        ids = torch.randint(2, 53, (int(torch.randint(4, 12, (1,), generator=draw)),), generator=draw).tolist()
        keep = torch.rand(len(ids), generator=draw) < torch.rand(1, generator=draw)
        labels = [token % 3 if one else -100 for token, one in zip(ids, keep.tolist(), strict=True)]
        found.append({"input_ids": ids, "labels": ids[0] % 3 if task == "classification" else labels})
    return found


def shifts(model):
    return {
        path: site.of("default")["toy"]
        for path, site in sites(model)
        if "default" in site.adapters and "toy" in site.of("default")
    }


def tensors(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


PLAIN = {
    "progress": False,
    "log_every": 1,
    "warmup": 0,
    "schedule": "constant",
    "clip": None,
    "weight_decay": 0.0,
    "save_every": None,
}


# the calls


def test_every_hook_is_called_when_it_should_be_and_with_what_it_should_get(build, tmp_path):
    model, data = build(), rows()
    finetune(
        model, data, evaluate=data[:5], output_dir=tmp_path, max_steps=7, batch_size=3, gradient_accumulation=2,
        calibration_batches=2, evaluate_every=2, seed=4, **PLAIN,
    )  # fmt: skip
    calibrate, *others = CALLS
    first = Order(22, 3, seed=4).global_batches()[:4]
    given = [
        Pad("classification", 0, ("input_ids",))([data[i] for i in batch])["input_ids"].tolist() for batch in first
    ]
    assert calibrate == ("calibrate", calibrate[1], given, False), (
        "in evaluation mode, the batches of the first two steps, each of batch_size"
    )
    assert all(
        {"input_ids", "labels"} <= set(keys) <= {"input_ids", "labels", "attention_mask"} for keys in calibrate[1]
    )
    assert others == [
        ("begin", "wide"), *(("schedule", step / 4) for step in range(4)), ("begin", "narrow"),
        *(("schedule", step / 3) for step in range(3)), ("finish", ["blocks.0.mlp.down", "blocks.1.mlp.down"]),
    ]  # fmt: skip


def test_nothing_is_calibrated_again_on_resuming_and_a_number_of_batches_is_asked_for(build, tmp_path):
    finetune(build(), rows(), output_dir=tmp_path, max_steps=4, **{**PLAIN, "save_every": 1})
    checkpoints.remove(tmp_path / "checkpoint-4")
    CALLS.clear()
    finetune(build(), rows(), output_dir=tmp_path, max_steps=4, resume=True, **{**PLAIN, "save_every": 1})
    assert [call[0] for call in CALLS] == ["begin", "begin", "schedule", "finish"]
    with pytest.raises(TrainingError, match="calibration_batches was 8 and is now 3"):
        finetune(build(), rows(), output_dir=tmp_path, max_steps=4, resume=True, calibration_batches=3, **PLAIN)
    with pytest.raises(OptionError, match="calibration_batches is at least 1, got 0"):
        finetune(build(), rows(), output_dir=tmp_path / "other", max_steps=4, calibration_batches=0, **PLAIN)
    with pytest.raises(IncompatibleError, match="toy chooses by looking at data, but there is none"):
        training.calibrate(build(), [])


def test_calibration_reads_data_for_those_who_look_and_leaves_the_random_numbers_alone(build, tmp_path):
    """A collator that draws: the masks of the run are those of a run that calibrates on another number of batches."""
    seen = []

    def collate(found):
        ids = torch.tensor([row["input_ids"][:4] for row in found])
        seen.append(ids)
        return {
            "input_ids": ids.where(torch.rand(ids.shape) > 0.3, 1),
            "labels": torch.tensor([row["labels"] for row in found]),
        }

    losses = []
    for count in (1, 5):
        seen.clear()
        settings = {**PLAIN, "calibration_batches": count, "collator": collate, "batch_size": 3}
        result = finetune(build("look"), rows(), output_dir=tmp_path, max_steps=3, **settings)
        losses.append([entry["loss"] for entry in result.history])
        assert len(seen) == 1 + count + 3, "the check of the collator, calibration, three steps"
    assert losses[0] == losses[1]
    seen.clear()
    finetune(build("lora"), rows(), output_dir=tmp_path, max_steps=3, collator=collate, batch_size=3, **PLAIN)
    assert len(seen) == 4, "LoRA does not look"


class Begun(Callback):
    def on_start(self, loop):
        self.setup = loop.setup


STARTS = ["prefix[length=40]", "fish[keep=0.1]", "lora[init=eva]", "sparse_adapter"]


def documents(count):
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 20, (count,), generator=draw).tolist()
    ids = [torch.randint(2, 53, (n,), generator=draw).tolist() for n in lengths]
    return [{"input_ids": row, "labels": row} for row in ids]


def started(tiny, peft, batches):
    """The tensors of an adapter of a decoder, calibrated on batches where there are some."""
    torch.manual_seed(0)
    model = effzoo.build("gpt2", task="causal_lm", **{**tiny, "max_length": 32, "dropout": 0.0})
    effzoo.attach(model.double(), peft)
    if batches:
        effzoo.peft.calibrate(model, batches)
    return model, {key: value for key, value in model.state_dict().items() if ".adapters." in key}


@pytest.mark.parametrize("peft", STARTS)
@pytest.mark.parametrize("how", [{"packing": True}, {"group_by_length": True}, {}], ids=str)
def test_a_start_does_not_depend_on_how_a_step_is_spread(tiny, tmp_path, peft, how):
    """Steps of 4 rows in 1, 2 or 4 processes, of 1, 2 or 4 accumulated batches: of all the same examples."""
    (model, fresh), begun, starts = started(tiny, peft, ()), Begun(), []
    finetune(model, documents(61), output_dir=tmp_path, max_steps=1, batch_size=4, calibration_batches=2,
             callbacks=[begun], **how, **PLAIN)  # fmt: skip
    for processes, accumulation in ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2)):
        optimisation = dataclasses.replace(begun.setup.optimisation, gradient_accumulation=accumulation)
        size = 4 // processes // accumulation
        setup = dataclasses.replace(begun.setup, processes=processes, batch_size=size, optimisation=optimisation)
        batches = setup.first_batches(torch.device("cpu"))
        assert [len(batch["input_ids"]) for batch in batches] == [size] * (8 // size)
        starts.append(started(tiny, peft, batches)[1])
    for start in starts[1:]:
        for key, value in start.items():
            torch.testing.assert_close(value, starts[0][key], rtol=0, atol=1e-10, msg=key)
    assert any(not value.equal(fresh[key]) for key, value in starts[0].items()), "the data were looked at"


@pytest.mark.parametrize("peft", STARTS)
def test_packed_rows_start_a_method_as_their_documents_do(tiny, peft):
    data = documents(9)
    rows, collate = effzoo.data.pack(data, 32), Pad("causal_lm", None, ("input_ids", "document_ids", "attention_mask"))
    alone = [collate([data[number]]) for row in rows.documents for number in row]
    wanted = started(tiny, peft, alone)[1]
    for key, value in started(tiny, peft, [collate(list(rows))])[1].items():
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=1e-10, msg=key)


def test_the_loop_of_the_docstring_does_what_finetune_does(build, tmp_path):
    data, total = rows("tokens"), 7
    tuned = build(task="token_classification")
    result = finetune(tuned, data, output_dir=tmp_path, max_steps=total, batch_size=5, calibration_batches=2, **PLAIN)
    finetuned = list(CALLS)
    CALLS.clear()

    orders = Order(22, 5, seed=0)
    chosen = orders.global_batches()
    orders.set_epoch(1)
    pad = Pad("token_classification", 0, ("input_ids", "attention_mask"))
    every = [pad([data[i] for i in batch]) for batch in chosen + orders.global_batches()]
    found = []

    def fresh(model):
        rates, named = training.learning_rates(model), dict(model.named_parameters())
        return torch.optim.AdamW(
            [{"params": [named[name]], "lr": rate} for name, rate in rates.items()], weight_decay=0.0
        )

    def noted(loss):
        found.append(loss.item())
        return loss

    block = "\n".join(line for line in training.__doc__.splitlines() if line.startswith("    "))
    code = (
        textwrap.dedent(block)
        .replace("optimizer = ...", "optimizer = fresh(model)")
        .replace("**batch", "**next(batch)")
    )
    code = code.replace("effzoo.peft.loss(model, **next(batch))", "noted(effzoo.peft.loss(model, **next(batch)))")
    model = build(task="token_classification").train()
    space = {
        "effzoo": effzoo,
        "model": model,
        "batches": iter(every[:2]),
        "batch": iter(every),
        "total": total,
        "fresh": fresh,
        "noted": noted,
    }
    exec(code, space)
    assert finetuned == CALLS
    # Trainer adds losses up in float32
    assert [entry["loss"] for entry in result.history] == pytest.approx(found, rel=1e-6)
    for key, value in tuned.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=0, atol=1e-10)


# the loss


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "name"), [("classification", "bert"), ("token_classification", "bert"), ("causal_lm", "gpt2")]
)
def test_penalty_and_divergence_count_once_however_the_step_is_cut_into_batches(build, tmp_path, task, name):
    """Two epochs of 22 rows in steps of 8: also steps cut unevenly, with very unequal numbers of labels."""
    runs = []
    for accumulation in (1, 2, 4):
        model = build(task=task, name=name)
        settings = {**PLAIN, "batch_size": 8 // accumulation, "gradient_accumulation": accumulation, "max_steps": 6}
        history = finetune(model, rows(task), output_dir=tmp_path, calibration_batches=2, **settings).history
        runs.append((tensors(model), [entry["loss"] for entry in history]))
    for state, losses in runs[1:]:
        # Trainer adds losses up in float32; the tensors below are exact
        assert losses == pytest.approx(runs[0][1], rel=1e-6)
        for key, value in state.items():
            torch.testing.assert_close(value, runs[0][0][key], rtol=0, atol=1e-9)  # Adam divides by gradients near 0


def test_the_divergence_is_the_mean_over_the_labels_that_the_loss_counts(build):
    draw = torch.Generator().manual_seed(2)
    one, other = (torch.randn(4, 6, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(3, (4, 6), generator=draw).masked_fill(torch.rand(4, 6, generator=draw) < 0.5, -100)

    def by_hand(causal):
        values = []
        for row in range(4):
            for place in range(6 - causal):
                if labels[row, place + causal] != -100:
                    p, q = one[row, place].softmax(-1), other[row, place].softmax(-1)
                    values.append(float((p * (p / q).log()).sum() + (q * (q / p).log()).sum()))
        return sum(values) / len(values)

    for causal in (False, True):
        assert float(training.divergence(one, other, labels, causal=causal)) == pytest.approx(
            by_hand(causal), rel=1e-10
        )
    assert training.divergence(one, other, torch.full_like(labels, -100)) == 0
    several, p, q = torch.ones(4, 3), one[:, 0].sigmoid(), other[:, 0].sigmoid()
    bernoulli = sum(F.binary_cross_entropy(a, b) - F.binary_cross_entropy(b, b) for a, b in ((p, q), (q, p)))
    assert torch.allclose(training.divergence(one[:, 0], other[:, 0], several.double()), bernoulli, rtol=1e-10)
    assert torch.allclose(
        training.divergence(one[:, 0, :1], other[:, 0, :1], torch.ones(4)), F.mse_loss(one[:, 0, 0], other[:, 0, 0])
    )


def test_two_passes_count_half_each_and_their_divergence_by_its_weight(build):
    model = build("toy[consistency=0.7]", dtype=torch.float64).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(30.0 if ".head." in name else 1.0)  # else the two passes would predict nearly the same
    batch = Pad("classification", 0, ("input_ids",))(rows())
    one, other = model(**batch), model(**batch)
    p, q = (out.logits.softmax(-1) for out in (one, other))
    apart = ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)).mean()
    assert apart > 1e-3
    expected = (one.loss + other.loss) / 2 + 0.7 / 2 * apart
    assert training.supervised(model, batch).item() == pytest.approx(expected.item(), rel=1e-10)
    penalty = sum(0.3 * (module.shift() - 0.1).square().sum() for module in shifts(model).values())
    assert training.loss(model, **batch).item() == pytest.approx((expected + penalty).item(), rel=1e-10)


def test_evaluation_has_neither_penalty_nor_second_pass(build, tmp_path):
    model, data = build(), rows()
    result = finetune(model, data, evaluate=data, output_dir=tmp_path, max_steps=3, **PLAIN)
    batch = Pad("classification", 0, ("input_ids",))(data)
    assert result.metrics["eval_loss"] == pytest.approx(model.eval()(**batch).loss.item(), rel=1e-6), (
        "of the unfinished and the finished adapter"
    )


# stages


def test_stages_share_all_steps_and_none_is_empty(build):
    model = build()
    method = training.unfinished(model)[0]
    for shares in ([1, 1], [0.1, 0.9], [0.999, 0.001], [1, 2, 3], [0.001, 0.001, 1]):
        method.stages = tuple(Stage(f"s{i}", share) for i, share in enumerate(shares))
        for total in range(len(shares), 60):
            steps = [number for _, number in training.timetable(model, total)]
            assert sum(steps) == total and min(steps) >= 1
            exact = [
                float(sum(map(Fraction, shares[: i + 1])) / sum(map(Fraction, shares)) * total)
                for i in range(len(shares))
            ]
            ends = [sum(steps[: i + 1]) for i in range(len(shares))]
            if all(b - a >= 1 for a, b in zip([0, *map(round, exact)], map(round, exact), strict=False)):
                assert all(abs(end - there) <= 0.5 + 1e-9 for end, there in zip(ends, exact, strict=True))
    with pytest.raises(
        TrainingError, match=r"train in 3 stages \(s0, s1, s2\), which need a step each, got 2; train longer"
    ):
        training.timetable(model, 2)
    assert [(span.start, span.end, span.warmup) for span in stage_spans(build(), 9, 0.3)] == [(0, 4, 2), (4, 9, 2)]
    assert stage_spans(build("lora"), 9, 2) == [StageSpan(training.WHOLE, 0, 9, 2)]


class Watch(TrainerCallback):
    """What the optimizer is at every step: its state, its learning rates by name, and the largest."""

    def __init__(self, model):
        self.subject, self.sizes, self.rates = model, [], []

    def on_step_begin(self, args, state, control, optimizer=None, **_):
        names = {id(parameter): name for name, parameter in self.subject.named_parameters()}
        self.sizes.append(len(optimizer.state))
        self.rates.append({names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]})


def test_each_stage_has_a_fresh_optimizer_of_its_own_parameters_and_its_own_warmup(build, tmp_path):
    model = build("toy[consistency=0]")
    watch = Watch(model)
    settings = {**PLAIN, "warmup": 0.5, "schedule": "linear"}
    result = finetune(model, rows(), output_dir=tmp_path, max_steps=8, callbacks=[watch], **settings)
    assert [size == 0 for size in watch.sizes] == [True, False, False, False] * 2
    for start, name, rate in ((0, "dense", 3e-3), (4, "few", 12e-3)):
        here = [
            {key: value for key, value in step.items() if ".toy." in key} for step in watch.rates[start : start + 4]
        ]
        assert all(len(step) == 2 and all(key.endswith(name) for key in step) for step in here)
        found = [next(iter(step.values())) for step in here]
        assert found == pytest.approx([0, rate / 2, rate, rate / 2])
    assert [entry["stage"] for entry in result.history] == ["wide"] * 4 + ["narrow"] * 4


def test_the_history_says_the_stage_and_no_entry_spans_two(build, tmp_path):
    settings = {**PLAIN, "log_every": 3}
    result = finetune(
        build(), rows(), evaluate=rows()[:4], evaluate_every=5, output_dir=tmp_path, max_steps=9, **settings
    )
    assert [(entry["step"], entry["stage"]) for entry in result.history] == [
        (3, "wide"), (4, "wide"), (5, "narrow"), (6, "narrow"), (9, "narrow"),
    ]  # fmt: skip
    each = finetune(build(), rows(), output_dir=tmp_path, max_steps=9, **PLAIN).history
    losses = [entry["loss"] for entry in each]
    assert [entry["loss"] for entry in result.history] == pytest.approx(
        [sum(losses[:3]) / 3, losses[3], losses[4], losses[5], sum(losses[6:]) / 3]
    )
    plain = finetune(build("lora"), rows(), output_dir=tmp_path, max_steps=2, **PLAIN).history
    assert all("stage" not in entry for entry in plain)


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_in_stages_resumes_at_every_step_to_the_same_bits(build, tmp_path, accumulation):
    """With dropout, and with noise that `begin` draws at the boundary, after step 4. log_every: losses are means over
    resumed steps."""
    settings = {
        "max_steps": 8,
        "batch_size": 3,
        "gradient_accumulation": accumulation,
        "log_every": 3,
        "save_every": 1,
        "progress": False,
    }
    settings |= {"evaluate": rows()[:5], "evaluate_every": 3, "best": "loss"}

    def fresh():
        return build("toy[noise=0.5]|lora[rank=2]", dtype=torch.float32, dropout=0.2)

    model = fresh()
    whole = finetune(model, rows(), output_dir=tmp_path / "whole", **settings)
    assert len(set(shifts(model)["blocks.0.mlp.down"].few.tolist())) == 8
    for step in range(1, 8):
        with pytest.raises(KeyboardInterrupt):
            finetune(fresh(), rows(), output_dir=tmp_path / str(step), callbacks=[Stop(step)], **settings)
        assert checkpoints.whole(tmp_path / str(step))[-1].name == f"checkpoint-{step}"
        other = fresh()
        resumed = finetune(other, rows(), output_dir=tmp_path / str(step), resume=True, **settings)
        assert resumed.history == whole.history and resumed.metrics == whole.metrics, step
        assert same(tensors(other), tensors(model)), step
    again = fresh()
    assert finetune(again, rows(), output_dir=tmp_path / "7", resume=True, **settings).history == whole.history
    assert same(tensors(again), tensors(model)), "a run that has taken its last step is finished once more"


# rates


@pytest.mark.slow
def test_each_method_has_its_own_learning_rate_unless_one_is_given(build, tmp_path):
    lora = effzoo.peft.get("lora").learning_rate
    for given, expected in (
        (None, {"dense": 3e-3, "A": lora, "B": lora, "own_weight": 1e-3}),
        (1e-2, {"dense": 1e-2, "A": 1e-2, "B": 1e-2, "own_weight": 1e-2}),
    ):
        model = build("toy[consistency=0]|lora")
        watch = Watch(model)
        settings = {**PLAIN, "learning_rate": given, "save_every": 4}
        finetune(model, rows(), output_dir=tmp_path / str(given), max_steps=4, callbacks=[watch], **settings)
        kinds = {
            tensor: {rate for name, rate in watch.rates[0].items() if name.endswith(f".{tensor}")}
            for tensor in expected
        }
        assert kinds == {tensor: {rate} for tensor, rate in expected.items()}
        few = {rate for name, rate in watch.rates[-1].items() if name.endswith(".few")}
        assert few == {4 * expected["dense"]}
        record = json.loads((tmp_path / str(given) / "checkpoint-4" / "run.json").read_text())
        assert record["learning_rate"] == (given or {"default.toy": 3e-3, "default.lora": lora, "default.head": 1e-3})
        assert record["rates"] == {"default.toy": {"few": 4.0}} and record["stages"] == {"wide": 2, "narrow": 2}
        assert record["calibration_batches"] == 8
    with pytest.raises(TrainingError, match="learning_rate was 0.01 and is now"):
        finetune(
            build("toy[consistency=0]|lora"), rows(), output_dir=tmp_path / "0.01", max_steps=4, resume=True, **PLAIN
        )


def test_all_parameters_train_at_one_rate(build, tmp_path):
    model = build(None)
    watch = Watch(model)
    result = finetune(model, rows(), output_dir=tmp_path, max_steps=1, callbacks=[watch], **{**PLAIN, "save_every": 1})
    assert set(watch.rates[0].values()) == {5e-5} and len(watch.rates[0]) == len(list(model.parameters()))
    record = json.loads((result.last / "run.json").read_text())
    assert record["learning_rate"] == 5e-5 and not {"rates", "stages", "calibration_batches"} & record.keys()


# the end


def test_checkpoints_hold_the_unfinished_adapter_and_the_result_the_finished_one(build, tmp_path):
    model = build(dtype=torch.float32)
    result = finetune(model, rows(), output_dir=tmp_path, max_steps=4, **{**PLAIN, "save_every": 1, "keep": None})
    finished = [
        json.loads((folder / "adapter.json").read_text())["finished"]
        for folder in (result.last / "adapter", result.adapter)
    ]
    assert finished == [False, True] and all(module.dial is None for module in shifts(model).values())
    fresh = build(None, dtype=torch.float32)
    effzoo.load_adapter(fresh, result.last / "adapter")
    (stage,) = effzoo.status(fresh).stages["default"].values()
    # the last one, in which it goes on
    assert stage == training.stages(fresh)[0].name and len(training.stages(fresh)) == 1
    assert all(module.dial is not None and module.dense is None for module in shifts(fresh).values())


def test_what_is_stored_finished_loads(build, tmp_path):
    """A method whose shapes follow from its options alone, as the contract wants of finished adapters."""
    model, ids = build("toy[staged=false]", dtype=torch.float32), torch.tensor([[5, 6, 7]])
    result = finetune(model, rows(), output_dir=tmp_path, max_steps=4, **PLAIN)
    fresh = effzoo.load_adapter(build(None, dtype=torch.float32), result.adapter)
    assert torch.equal(fresh.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert all(module.dial is None for module in shifts(fresh).values())


def test_the_best_checkpoint_is_of_the_last_stage_and_is_finished_after_it_is_loaded(build, tmp_path):
    """The rate is so high that the loss on held-out rows of another label only rises; the toy's schedule settles half
    way through its stage."""
    train = [{"input_ids": [3 + i, 4], "label": 0} for i in range(8)]
    held_out = [{"input_ids": [3 + i, 4], "label": 1} for i in range(8)]
    model = build("toy[consistency=0]", dtype=torch.float32)
    settings = {**PLAIN, "evaluate_every": 1, "save_every": 1, "keep": None, "learning_rate": 2e-2}
    result = finetune(model, train, evaluate=held_out, output_dir=tmp_path, max_steps=12, best="loss", **settings)
    losses = {entry["step"]: entry["eval_loss"] for entry in result.history}
    assert min(losses, key=losses.get) < 6, "the best of all is in the first stage"
    allowed = range(6 + 3 + 1, 13)  # half of the 6 steps of the last stage are behind
    best = min(allowed, key=losses.get)
    assert result.best.name == f"checkpoint-{best}" and result.metrics["eval_loss"] == losses[best]
    batch = Pad("classification", 0, ("input_ids",))(held_out)
    assert model.eval()(**batch).loss.item() == pytest.approx(losses[best], rel=1e-5)
    assert CALLS[-1][0] == "finish" and best < 12
    assert all(module.dial is None for module in shifts(model).values())
    assert json.loads((result.adapter / "adapter.json").read_text())["finished"]


@pytest.mark.slow
def test_a_finished_adapter_trains_on_with_what_is_left_in_one_stage(build, tmp_path):
    model = build()
    finetune(model, rows(), output_dir=tmp_path / "first", max_steps=6, **PLAIN)
    places = {path: module.places.clone() for path, module in shifts(model).items()}
    before, base = tensors(model), {key: value for key, value in tensors(model).items() if ".adapters." not in key}
    CALLS.clear()
    settings = {**PLAIN, "save_every": 1}
    result = finetune(model, rows(), output_dir=tmp_path / "second", max_steps=3, **settings)
    assert not CALLS and all("stage" not in entry for entry in result.history)
    after = tensors(model)
    for key, value in before.items():
        assert torch.equal(value, after[key]) != (key.endswith(".few") or ".head." in key), key
    assert all(torch.equal(module.places, places[path]) for path, module in shifts(model).items()) and all(
        key in after for key in base
    )
    # the loss is that of a plain loop: one pass, no penalty
    batch = Pad("classification", 0, ("input_ids",))([rows()[i] for i in Order(22, 8, seed=0).global_batches()[0]])
    model.load_state_dict(before)
    for module in shifts(model).values():
        module.passes = 0
    assert result.history[0]["loss"] == pytest.approx(model.train()(**batch).loss.item(), abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["magnitude", "movement"])
def test_a_pruned_network_trains_on_and_stays_pruned(build, tmp_path, kind):
    model = build(f"{kind}[keep=0.25]")
    finetune(model, rows(), output_dir=tmp_path / "first", max_steps=10, **PLAIN)
    modules = {
        path: site.of("default")[kind]
        for path, site in sites(model)
        if "default" in site.adapters and kind in site.of("default")
    }
    masks = {path: module.mask.clone() for path, module in modules.items()}
    before = {path: module.own.detach().clone() for path, module in modules.items()}
    finetune(model, rows(), output_dir=tmp_path / "second", max_steps=3, **{**PLAIN, "weight_decay": 0.1})
    for path, module in modules.items():
        assert torch.equal(module.mask, masks[path]) and int(module.mask.sum()) == round(0.25 * module.mask.numel())
        assert torch.equal(module.own != 0, masks[path]), path
        assert not torch.equal(module.own, before[path]), path


def test_a_finished_adapter_does_not_resume_a_run_that_needs_what_it_dropped(build, tmp_path):
    model = build()
    settings = {**PLAIN, "save_every": 2}
    finetune(model, rows(), output_dir=tmp_path / "toy", max_steps=4, **settings)
    with pytest.raises(
        TrainingError,
        match="in the middle of its training, but the adapter 'default' of this model is finished: toy dropped",
    ):
        finetune(model, rows(), output_dir=tmp_path / "toy", max_steps=4, resume=True, **settings)
    model = build("lora")
    finetune(model, rows(), output_dir=tmp_path / "lora", max_steps=4, **settings)
    after = tensors(model)
    finetune(model, rows(), output_dir=tmp_path / "lora", max_steps=4, resume=True, **settings)
    assert same(after, tensors(model)), "LoRA dropped nothing"


def test_a_second_run_of_a_finished_adapter_resumes(build, tmp_path):
    def finished():
        model = build("toy[staged=false]", dtype=torch.float32)
        CALLS.clear()
        finetune(model, rows(), output_dir=tmp_path / "first", max_steps=3, overwrite=True, **PLAIN)
        return model

    settings = {**PLAIN, "save_every": 1, "max_steps": 4}
    model = finished()
    whole = finetune(model, rows(), output_dir=tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        finetune(finished(), rows(), output_dir=tmp_path / "stopped", callbacks=[Stop(2)], **settings)
    for other in (finished(), build("toy[staged=false]", dtype=torch.float32)):
        resumed = finetune(other, rows(), output_dir=tmp_path / "stopped", resume=True, **settings)
        assert resumed.history == whole.history and same(tensors(other), tensors(model))


def test_the_bar_says_the_stage():
    from rich.console import Console

    from effzoo.train.progress import Bar

    out = io.StringIO()
    bar = Bar(Console(file=out, width=200))
    loop = SimpleNamespace(main=True, steps=4, step=2)
    bar.on_start(loop)
    bar.on_log(loop, {"loss": 0.5, "stage": "wide"})
    assert bar.progress.tasks[0].description == "wide   loss 0.5"
    bar.on_log(loop, {"eval_loss": 0.25, "stage": "wide"})
    bar.close()
    assert "step      2   wide   training loss 0.5   validation loss 0.25" in out.getvalue()


# processes


SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from torch import nn  # noqa: F401 - for the toy
import effzoo
from effzoo.peft import PeftModule, Stage, TrainingHooks
from effzoo.sites import sites
from effzoo.train import Optimisation, Saving
from transformers import TrainerCallback

CALLS = []
TINY = {"dim": 16, "layers": 2, "heads": 2, "mlp": 32, "vocab": 53, "max_length": 64}

def rows(task, count=25):
    draw, found = torch.Generator().manual_seed(0), []
    for index in range(count):
        ids = torch.randint(2, 53, (int(torch.randint(4, 12, (1,), generator=draw)),), generator=draw).tolist()
        keep = torch.rand(len(ids), generator=draw) < (0.9 if index % 5 == 0 else 0.1)
        labels = [token % 3 if one else -100 for token, one in zip(ids, keep.tolist())]
        labels = ids[0] % 3 if task == "classification" else labels
        found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return found

def build(peft, task, dropout=0.0):
    torch.manual_seed(0)
    model = effzoo.build("bert", **TINY, task=task, num_labels=3, dropout=dropout, attention_dropout=dropout)
    return effzoo.attach(model.double() if not dropout else model, peft)

def state(model):
    return {key: value.double().tolist() for key, value in model.state_dict().items() if ".adapters." in key}

def cases(directory, processes):
    found = {}
    for peft in ("toy", "fish[keep=0.05]", "lt_sft[keep=0.05]", "adalora[rank=3]", "lora[rank=2, init=lora_ga]"):
        for task in ("classification", "token_classification"):
            for accumulation in (1, 2):
                CALLS.clear()
                model = build(peft, task)
                result = effzoo.finetune(
                    model, rows(task), evaluate=rows(task)[:9], max_steps=8,
                    output_dir=directory / peft / task / str(accumulation),
                    batch_size=8 // processes // accumulation, progress=False,
                    optimisation=Optimisation(gradient_accumulation=accumulation, weight_decay=0.0, warmup=0,
                                              calibration_batches=2),
                    saving=Saving(evaluate_every=4, save_every=None, log_every=1),
                )
                found[f"{peft}, {task}, {accumulation} accumulated"] = result.history, state(model)
    return found

class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt

def resumed(directory):
    settings = dict(max_steps=6, batch_size=3, progress=False, saving=Saving(log_every=2, save_every=1))
    data, found = rows("classification"), {}
    for step in (None, 2, 3, 4):
        if step is not None:
            try:
                model = build("toy[noise=0.5]", "classification", 0.2)
                effzoo.finetune(model, data, output_dir=directory / str(step), **settings, callbacks=[Stop(step)])
            except KeyboardInterrupt:
                pass
        model = build("toy[noise=0.5]", "classification", 0.2)
        result = effzoo.finetune(model, data, output_dir=directory / str(step), **settings, resume=step is not None)
        found[str(step)] = result.history, state(model)
    return found

if __name__ == "__main__":
    from accelerate.utils import gather_object
    torch.set_num_threads(1)
    directory = Path(sys.argv[1])
    with effzoo.scope():
        exec(Path(sys.argv[2]).read_text())
        found = {"cases": cases(directory, int(os.environ.get("WORLD_SIZE", "1"))), "resumed": resumed(directory)}
    everyone = gather_object([found])
    if os.environ.get("RANK", "0") == "0":
        (directory / "found.json").write_text(json.dumps(everyone))
"""


def launched(directory, processes):
    """What every process found."""
    directory.mkdir()
    (directory / "script.py").write_text(SCRIPT)
    (directory / "toy.py").write_text(TOY)
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parent.parent),
    }  # fmt: skip
    start = launcher(processes) if processes > 1 else [sys.executable]
    line = [*start, str(directory / "script.py"), str(directory), str(directory / "toy.py")]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((directory / "found.json").read_text())


def close(one, other):
    """Nested lists of numbers."""
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return math.isclose(one, other, rel_tol=1e-7, abs_tol=1e-9)


@pytest.mark.slow
def test_two_processes_choose_the_same_have_the_losses_of_one_and_resume(tmp_path):
    """In float64, over a boundary of stages, with penalties, two passes and calibration; the last global batch of an
    epoch has one example."""
    (alone,), (first, second) = launched(tmp_path / "one", 1), launched(tmp_path / "two", 2)
    for case, (history, state) in alone["cases"].items():
        assert first["cases"][case][1] == second["cases"][case][1], f"{case}: both processes end with the same bits"
        shared, other = first["cases"][case]
        assert [entry.get("stage") for entry in history] == [entry.get("stage") for entry in shared]
        for key in ("loss", "eval_loss"):
            one, many = ([entry.get(key, 0.0) for entry in entries] for entries in (history, shared))
            # Trainer adds losses up in float32; the tensors below are exact
            assert many == pytest.approx(one, rel=1e-6), f"{case}: {key}"
        assert state.keys() == other.keys()
        for key, value in state.items():
            assert close(value, other[key]), f"{case}: {key}"
    for found in (alone, first, second):
        for step in ("2", "3", "4"):
            assert found["resumed"][step] == found["resumed"]["None"], step
