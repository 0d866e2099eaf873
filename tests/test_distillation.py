"""Distillation: its formulas written out, what the gradients reach, what a run logs and resumes to, and what is
refused."""

import copy
import random

import numpy as np
import pytest
import safetensors.torch
import torch
from support import finetune
from transformers import TrainerCallback

import effzoo
from effzoo.attention.core import Mask
from effzoo.errors import IncompatibleError, InputError, OptionError, TrainingError
from effzoo.train import Distillation
from effzoo.train.distillation import labels_per_example, soft_target_loss, state_loss
from effzoo.train.teaching import Teaching, forward_passes

NAMES = {"classification": "bert", "masked_lm": "roberta", "causal_lm": "gpt2", "token_classification": "bert"}
ALL = {"labels": 0.3, "logits": 0.5, "hidden": 0.7, "attention": 0.2, "temperature": 3.0}


@pytest.fixture
def build(tiny):
    def made(task="classification", seed=0, name=None, **options):
        torch.manual_seed(seed)
        return effzoo.build(name or NAMES[task], **{**tiny, "task": task, "num_labels": 3, **options})

    return made


def rows(task="classification", count=22):
    draw, found = random.Random(0), []
    for _ in range(count):
        ids = [draw.randrange(2, 53) for _ in range(draw.randrange(4, 20))]
        labels = [token % 3 if draw.random() < draw.random() else -100 for token in ids]
        found.append({"input_ids": ids, "labels": ids[0] % 3 if task == "classification" else labels})
    return found


def batch(task="classification", n=9):
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 53, (3, n), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = torch.randint(0, 3, (3,) if task == "classification" else (3, n), generator=draw)
    if task != "classification":
        labels[mask == 0] = -100
        labels[2, ::2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_targets_are_t_squared_times_the_divergence_of_the_softened_probabilities(temperature):
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64), torch.randn(2, 6, 5, dtype=torch.float64)
    labels = torch.tensor([[1, -100, 2, 0, 1, 4], [3, 3, -100, -100, 0, 1]])

    def divergence(i, t):
        p = [float(teacher[i, t, c] / temperature) for c in range(5)]
        q = [float(student[i, t, c] / temperature) for c in range(5)]
        p, q = ([torch.tensor(x, dtype=torch.float64).exp() for x in z] for z in (p, q))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        return sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True))

    counted = [(i, t) for i in range(2) for t in range(6) if labels[i, t] != -100]
    expected = temperature**2 * sum(divergence(i, t) for i, t in counted) / len(counted)
    assert soft_target_loss(student, teacher, labels, temperature=temperature).item() == pytest.approx(
        expected, abs=1e-12
    )
    counted = [(i, t) for i in range(2) for t in range(5) if labels[i, t + 1] != -100]
    expected = temperature**2 * sum(divergence(i, t) for i, t in counted) / len(counted)
    assert soft_target_loss(student, teacher, labels, temperature=temperature, causal=True).item() == pytest.approx(
        expected, abs=1e-12
    )
    assert soft_target_loss(student, teacher, torch.full_like(labels, -100)).item() == 0.0


def test_soft_targets_of_labels_that_may_hold_together_and_of_a_number():
    student, teacher, T = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64), 2.5
    p, q = torch.sigmoid(teacher / T), torch.sigmoid(student / T)
    expected = T**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert soft_target_loss(student, teacher, torch.rand(4, 3), temperature=T).item() == pytest.approx(
        expected.item(), abs=1e-12
    )
    number = soft_target_loss(student[:, :1], teacher[:, :1], torch.rand(4), temperature=T)
    assert number.item() == pytest.approx((student[:, 0] - teacher[:, 0]).square().mean().item(), abs=1e-12)


def test_states_apart_are_a_mean_over_tokens_and_then_over_labels():
    student, teacher = torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(3, 4, 6, dtype=torch.float64)
    valid, numbers = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool(), torch.tensor([2, 0, 3])
    each = [
        sum(float((student[b, t] - teacher[b, t]).square().mean()) for t in range(n)) / n
        for b, n in enumerate((4, 2, 3))
    ]
    assert state_loss(student, teacher, numbers, valid).item() == pytest.approx(
        (2 * each[0] + 3 * each[2]) / 5, abs=1e-12
    )
    plain = state_loss(student, teacher, torch.ones(3))
    assert plain.item() == pytest.approx((student - teacher).square().mean().item(), abs=1e-12)


@pytest.mark.parametrize("task", NAMES)
def test_the_loss_is_the_weighted_sum_of_its_parts(build, task):
    """The states are taken from the model by other means: block after block, by hand."""
    student, teacher, inputs = build(task).double().eval(), build(task, seed=1).double().eval(), batch(task)
    taught = Teaching(student, teacher, Distillation(**ALL))
    loss = taught(student, inputs)
    plain = {name: value for name, value in inputs.items() if name != "labels"}
    logits = [model(**plain).logits for model in (student, teacher)]
    parts = {
        "labels": student(**inputs).loss,
        "logits": soft_target_loss(*logits, inputs["labels"], temperature=3.0, causal=task == "causal_lm"),
    }
    states, given = [], []
    for model in (student, teacher):
        x, positions = model.embeddings(inputs["input_ids"], None, None, None, None, 0)
        mask = Mask(inputs["attention_mask"].bool(), None, positions)
        after, attended = [], []
        for block in model.blocks:
            attended.append(block.attn(block.attn_norm(x) if block.norm == "pre" else x, mask))
            x = block(x, mask)
            after.append(x)
        states.append(after)
        given.append(attended)
    numbers, valid = labels_per_example(inputs["labels"], task, 3), inputs["attention_mask"].bool()
    for name, (ours, theirs) in (("hidden", states), ("attention", given)):
        parts[name] = sum(state_loss(a, b, numbers, valid) for a, b in zip(ours, theirs, strict=True)) / 2
    assert loss.item() == pytest.approx(sum(ALL[name] * value.item() for name, value in parts.items()), abs=1e-10)
    assert {name: value.item() for name, value in taught.parts.items()} == pytest.approx(
        {k: v.item() for k, v in parts.items()}, abs=1e-10
    )


@pytest.mark.parametrize("task", NAMES)
def test_batches_average_exactly(build, task):
    """The loss of a batch is that of its rows, each weighted by its counted labels."""
    student, teacher, inputs = build(task).double().eval(), build(task, seed=1).double(), batch(task)
    taught = Teaching(student, teacher, Distillation(**ALL))
    whole, numbers, total = taught(student, inputs).item(), labels_per_example(inputs["labels"], task, 3), 0.0
    for row in range(3):
        n = int(inputs["attention_mask"][row].sum())
        alone = {k: v[row : row + 1, :n] if v.ndim == 2 else v[row : row + 1] for k, v in inputs.items()}
        total += taught(student, alone).item() * int(numbers[row])
    assert whole == pytest.approx(total / int(numbers.sum()), abs=1e-10)


@pytest.mark.parametrize(
    "attention", ["longformer[window=4]", "linformer[k=8]", "lsh[rounds=2, chunk=4, buckets=4]", "perceiver[latents=4]"]
)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it(build, attention):
    """Whatever the kind, also with dropout in the teacher's config and a prompt in front of both."""
    student = build(attention=attention, peft="prompt[length=3]|lora[rank=2]")
    teacher = copy.deepcopy(student)
    teacher.blocks[0].dropout.p = 0.5
    taught = Teaching(student, teacher.train(), Distillation(**ALL))
    taught(student.eval(), batch())
    assert {name: value.item() for name, value in taught.parts.items() if name != "labels"} == {
        "logits": 0.0,
        "hidden": 0.0,
        "attention": 0.0,
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_student_alone_and_are_those_of_a_plain_loop(build, checkpointing):
    student, teacher, inputs = build(attention="longformer[window=4]", peft="lora[rank=2]"), build(seed=1), batch()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    student.recompute = "blocks" if checkpointing else "hidden"
    Teaching(student, teacher, Distillation(**ALL))(student.train(), inputs).backward()
    got = {name: p.grad.clone() for name, p in student.named_parameters() if p.requires_grad}
    assert all(torch.isfinite(grad).all() for grad in got.values()) and all(
        p.grad is None for p in teacher.parameters()
    )
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items()) and not teacher.training
    student.zero_grad()
    student.recompute = "nothing"
    plain = {name: value for name, value in inputs.items() if name != "labels"}
    with forward_passes(student, ("hidden", "attention")) as passes:
        own = student(**inputs).loss
    with forward_passes(teacher, ("hidden", "attention")) as taught, torch.no_grad():
        teacher(**plain)
    (ours,), (theirs,) = passes, taught
    numbers, valid = torch.ones(3), inputs["attention_mask"].bool()
    loss = 0.3 * own + 0.5 * soft_target_loss(ours.logits, theirs.logits, inputs["labels"], temperature=3.0)
    for weight, a, b in ((0.7, ours.hidden, theirs.hidden), (0.2, ours.attention, theirs.attention)):
        loss = loss + weight * sum(state_loss(x, y, numbers, valid) for x, y in zip(a, b, strict=True)) / 2
    loss.backward()
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_layers_are_paired_evenly_or_as_said(build):
    assert Distillation().pairs(2, 6) == (2, 5) and Distillation().pairs(3, 3) == (0, 1, 2)
    assert Distillation(layers=[0, 4]).pairs(2, 6) == (0, 4)
    with pytest.raises(IncompatibleError, match=r"4 blocks do not divide among the student's 3; .*layers=\(0, 2, 3\)"):
        Distillation().pairs(3, 4)
    with pytest.raises(OptionError, match="there is no block 6"):
        Distillation(layers=(0, 6)).pairs(2, 6)
    student, teacher = build(layers=1), build(layers=3, seed=1)
    taught = Teaching(student, teacher, Distillation(labels=0, logits=0, hidden=1.0, layers=(1,)))
    with forward_passes(student, ("hidden",)) as ours, forward_passes(teacher, ("hidden",)) as theirs, torch.no_grad():
        student(**{k: v for k, v in batch().items() if k != "labels"})
        teacher(**{k: v for k, v in batch().items() if k != "labels"})
    expected = state_loss(ours[0].hidden[0], theirs[0].hidden[1], torch.ones(3), batch()["attention_mask"].bool())
    assert taught(student, batch()).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_run_brings_the_student_nearer_to_its_teacher_and_logs_the_parts(build, tmp_path):
    teacher, student = build(seed=1), build(attention="longformer[window=4]")
    result = finetune(
        student, rows(), output_dir=tmp_path, teacher=teacher,
        distillation={"labels": 0.0, "logits": 1.0, "hidden": 1.0}, max_steps=30, log_every=5,
        learning_rate=3e-2, weight_decay=0.0, save_every=None, progress=False,
    )  # fmt: skip
    first, last = result.history[0], result.history[-1]
    assert last["loss_hidden"] < 0.8 * first["loss_hidden"] and "loss_attention" not in last
    for entry in result.history:
        assert entry["loss"] == pytest.approx(entry["loss_logits"] + entry["loss_hidden"], rel=1e-4)
    saved = safetensors.torch.load_file(result.weights)
    assert set(saved) == set(student.state_dict()), "of the teacher nothing is saved"
    assert student.only_what_is_read is False and student.training == build().training


def test_stopped_runs_resume_to_the_same_losses_and_the_end_is_by_labels_alone(build, tmp_path):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 5:
                raise KeyboardInterrupt

    settings = {
        "max_steps": 9, "batch_size": 3, "gradient_accumulation": 2, "learning_rate": 1e-2, "log_every": 2,
        "save_every": 2, "progress": False, "distillation": Distillation(**ALL, share=0.75),
    }  # fmt: skip
    teacher = build(seed=1)
    straight = finetune(build(dropout=0.2, peft="lora"), rows(), output_dir=tmp_path / "a", teacher=teacher, **settings)
    taught = {entry["step"]: "loss_logits" in entry for entry in straight.history}
    assert taught == {2: True, 4: True, 6: True, 7: True, 8: False, 9: False}, "0.75 of 9 steps are 7"
    with pytest.raises(KeyboardInterrupt):
        finetune(
            build(dropout=0.2, peft="lora"),
            rows(),
            output_dir=tmp_path / "b",
            teacher=teacher,
            callbacks=[Stop()],
            **settings,
        )
    resumed = finetune(
        build(dropout=0.2, peft="lora"), rows(), output_dir=tmp_path / "b", teacher=teacher, resume=True, **settings
    )
    assert resumed.history == straight.history
    with pytest.raises(TrainingError, match="distillation was"):
        finetune(
            build(dropout=0.2, peft="lora"),
            rows(),
            output_dir=tmp_path / "b",
            teacher=build(seed=2),
            resume=True,
            **settings,
        )
    del settings["distillation"]
    with pytest.raises(TrainingError, match="distillation was"):
        finetune(build(dropout=0.2, peft="lora"), rows(), output_dir=tmp_path / "b", resume=True, **settings)


@pytest.mark.parametrize("peft", [None, "adamix", "lt_sft[keep=0.1]", "prefix[length=2]|ia3"])
def test_it_works_with_all_parameters_and_with_methods_that_do_more_in_training(build, tmp_path, peft):
    student = build("token_classification", peft=peft)
    result = finetune(
        student, rows("token_classification"), output_dir=tmp_path, teacher=build("token_classification", seed=1),
        distillation=ALL, max_steps=4, log_every=1, learning_rate=1e-2, progress=False, gradient_accumulation=2,
    )  # fmt: skip
    for entry in result.history:
        assert {"loss_labels", "loss_logits", "loss_hidden", "loss_attention"} <= set(entry)


def test_accumulated_batches_give_the_losses_of_one(build, tmp_path):
    losses = []
    for size, accumulation in ((6, 1), (2, 3)):
        result = finetune(
            build("masked_lm", peft="lora"), rows("masked_lm"), output_dir=tmp_path / str(size),
            teacher=build("masked_lm", seed=1), distillation=ALL,
            max_steps=4, batch_size=size, gradient_accumulation=accumulation, learning_rate=1e-2, log_every=1,
            save_every=None, progress=False,
        )  # fmt: skip
        losses.append([{k: v for k, v in entry.items() if k.startswith("loss")} for entry in result.history])
    for one, many in zip(*losses, strict=True):
        assert many == pytest.approx(one, rel=2e-5)


def test_reversible_models_and_perceivers_distil_their_logits(build, tiny):
    teacher = build(seed=1)
    reversible = build(residual="reversible", norm="pre", peft="lora")
    Teaching(reversible, teacher, Distillation())(reversible.train(), batch()).backward()
    assert all(p.grad is not None for p in reversible.parameters() if p.requires_grad)
    with pytest.raises(IncompatibleError, match="the student is reversible"):
        Teaching(reversible, teacher, Distillation(hidden=1.0))


def test_what_cannot_be_compared_is_refused_with_the_reason(build, tmp_path):
    student, go = build(peft="lora"), {"output_dir": tmp_path, "progress": False, "max_steps": 1}
    for teacher, message in (
        (build("token_classification"), "the student's task is 'classification', the teacher's 'token_classification'"),
        (build(num_labels=4), "3 labels, the teacher 4"),
        (build(vocab=60), "vocabulary has 53 entries, the teacher's 60"),
    ):
        with pytest.raises(IncompatibleError, match=message):
            finetune(student, rows(), teacher=teacher, **go)
    with pytest.raises(IncompatibleError, match="the student is 16 wide, the teacher 32"):
        finetune(student, rows(), teacher=build(dim=32), distillation={"hidden": 1.0}, **go)
    with pytest.raises(InputError, match="the longest example has 19 tokens, the teacher reads 8"):
        finetune(student, rows(), teacher=build(max_length=8), **go)
    with pytest.raises(OptionError, match="parameters of the student"):
        finetune(student, rows(), teacher=student, **go)
    with pytest.raises(OptionError, match="there is none; give teacher"):
        finetune(student, rows(), distillation={"hidden": 1.0}, **go)
    with pytest.raises(OptionError, match="did you mean 'temperature'"):
        finetune(student, rows(), teacher=build(), distillation={"temprature": 1.0}, **go)
    with pytest.raises(IncompatibleError, match="no attention state of the student depends on what is trained"):
        finetune(build(peft="head"), rows(), teacher=build(seed=1), distillation={"attention": 1.0}, **go)
    with pytest.raises(OptionError, match="logits takes float .+, got 'much'"):
        Distillation.of({"logits": "much"})
    for wrong in ({"logits": 0.0}, {"logits": -1.0}, {"temperature": 0.0}, {"share": 0.0}):
        with pytest.raises(OptionError, match="distillation"):
            Distillation(**wrong)


def test_a_teacher_without_global_tokens_is_not_given_their_mask(build):
    student = build(name="longformer", attention="longformer[window=4]", layers=2, types=0)
    teacher = build(seed=1, types=0)
    marked = {**batch(), "global_attention_mask": torch.eye(9, dtype=torch.long)[:3]}
    taught = Teaching(student, teacher, Distillation())
    assert torch.equal(taught.teach(marked).logits, taught.teach(batch()).logits)


@pytest.mark.parametrize("key", ["labels", "logits", "hidden", "attention", "temperature", "share"])
@pytest.mark.parametrize(
    "wrong", [float("nan"), float("inf"), -1, "1", True, None, 1e300, 10**400, 1j, [0.5], torch.tensor(0.5)]
)
def test_a_weight_that_is_no_number_in_its_range_is_refused_by_its_name(key, wrong):
    for made in (lambda: Distillation(**{key: wrong}), lambda: Distillation.of({key: wrong})):
        with pytest.raises(OptionError, match=f"distillation: {key} (takes|is) .+ got "):
            made()


def test_numbers_of_numpy_are_weights_and_any_temperature_that_is_taken_has_a_finite_loss():
    assert Distillation.of({"logits": np.float32(0.25), "layers": [np.int64(0)]}) == Distillation(
        logits=0.25, layers=(0,)
    )
    with pytest.raises(OptionError, match="distillation: layers takes a list of int .+; item 1 is 'a'"):
        Distillation(layers=[0, "a"])
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    for temperature in (1e-6, 1e6):
        assert soft_target_loss(
            logits, logits.flip(0), labels, temperature=Distillation(temperature=temperature).temperature
        ).isfinite()
