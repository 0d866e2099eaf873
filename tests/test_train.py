"""`finetune` against a plain PyTorch loop, and its promises: what stays frozen, what is measured, what is written, what
is refused."""

import copy
import itertools
import math
import random

import datasets
import pytest
import safetensors.torch
import torch
from support import finetune
from transformers import TrainerCallback

import effzoo
from effzoo.checked import counted
from effzoo.errors import AdapterError, ArgumentError, IncompatibleError, InputError, OptionError, TrainingError
from effzoo.train.batches import Order, Pad
from effzoo.train.checkpoints import whole

NAMES = {"classification": "bert", "masked_lm": "roberta", "causal_lm": "gpt2", "token_classification": "bert"}


@pytest.fixture
def build(tiny):
    """A model of a task, the same one for the same arguments."""

    def made(task="classification", **options):
        torch.manual_seed(0)
        return effzoo.build(NAMES[task], **{**tiny, "task": task, "num_labels": 3, **options})

    return made


def rows(task="classification", count=22):
    draw, found = random.Random(0), []
    for _ in range(count):
        ids = [draw.randrange(2, 53) for _ in range(draw.randrange(4, 20))]
        labels = [token % 3 if draw.random() < draw.random() else -100 for token in ids]
        found.append({"input_ids": ids, "labels": ids[0] % 3 if task == "classification" else labels})
    return found


class Recorded(list):
    """Keeps the indices in the order in which a loader asks for them."""

    def __init__(self, rows):
        super().__init__(rows)
        self.seen = []

    def __getitem__(self, index):
        self.seen.append(index)
        return super().__getitem__(index)


def plain_loop(model, data, indices, *, global_batch, steps, rate, decay, warmup, clip):
    """AdamW (Loshchilov & Hutter) with linear warmup and decline; each example alone, unpadded; the mean is over the
    labels of the step."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [p for name, p in parameters.items() if p.ndim > 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": decay},
            {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=rate,
    )
    losses, size = [], len(data)
    starts = [
        start
        for epoch in range(0, len(indices), size)
        for start in range(epoch, min(epoch + size, len(indices)), global_batch)
    ]
    for step, (start, end) in enumerate(zip(starts, [*starts[1:], len(indices)], strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = rate * (step / warmup if step < warmup else (steps - step) / (steps - warmup))
        total, count = torch.tensor(0.0), 0
        for index in indices[start:end]:
            row = list.__getitem__(data, index)
            labels = torch.tensor([row["labels"]])
            number = (labels[:, 1:] if model.task == "causal_lm" else labels).ne(-100).sum()
            total = total + model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss * number
            count = count + int(number)
        loss = total / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("task", NAMES)
def test_losses_are_those_of_a_plain_loop(build, tmp_path, task, accumulation):
    data = Recorded(rows(task))
    per_epoch = math.ceil(22 / (2 * accumulation))
    settings = {"rate": 5e-3, "decay": 0.1, "warmup": 2, "clip": 1.0}
    result = finetune(
        build(task, peft="lora[rank=2]"), data, output_dir=tmp_path, epochs=2, batch_size=2,
        gradient_accumulation=accumulation, learning_rate=5e-3,
        weight_decay=0.1, warmup=2, clip=1.0, log_every=1, save_every=None, progress=False,
    )  # fmt: skip
    assert sorted(data.seen[-44:-22]) == sorted(data.seen[-22:]) == list(range(22)), (
        "each epoch reads each example once"
    )
    assert data.seen[-44:-22] != data.seen[-22:]
    steps = 2 * per_epoch
    expected = plain_loop(
        build(task, peft="lora[rank=2]"), data, data.seen[-44:], global_batch=2 * accumulation, steps=steps, **settings
    )
    assert [entry["step"] for entry in result.history] == list(range(1, steps + 1))
    assert [entry["loss"] for entry in result.history] == pytest.approx(expected, rel=2e-5, abs=2e-6)
    assert result.metrics["train_loss"] == pytest.approx(sum(expected) / steps, rel=2e-5)


@pytest.mark.parametrize("lengths", [None, [7 * i % 31 for i in range(103)]])
@pytest.mark.parametrize("processes", [1, 2, 5])
def test_the_processes_share_one_order_that_holds_each_example_once(processes, lengths):
    alone = Order(103, 20, seed=3, lengths=lengths)
    shares = [
        Order(103, 20 // processes, process=rank, processes=processes, seed=3, lengths=lengths)
        for rank in range(processes)
    ]
    for epoch in (0, 1):
        for order in (alone, *shares):
            order.set_epoch(epoch)
        batches = list(alone)
        assert sorted(itertools.chain(*batches)) == list(range(103)) and len(batches) == len(alone) == 6
        for batch, *parts in zip(batches, *shares, strict=True):
            assert sorted(itertools.chain(*parts)) == sorted(batch)
    assert batches != list(Order(103, 20, seed=3, lengths=lengths)), "the second epoch has another order than the first"


def test_grouping_by_length_pads_less():
    lengths = [(17 * i) % 97 + 1 for i in range(200)]

    def padding(order):
        return sum(max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch) for batch in order)

    assert padding(Order(200, 8, seed=0, lengths=lengths)) < 0.2 * padding(Order(200, 8, seed=0))


def test_a_step_of_similar_lengths_has_the_same_examples_however_often_it_accumulates():
    lengths = [(17 * i) % 97 + 1 for i in range(203)]
    parts = iter(Order(203, 2, seed=0, lengths=lengths, accumulation=4))
    for step in Order(203, 8, seed=0, lengths=lengths):
        assert list(itertools.chain(*itertools.islice(parts, -(-len(step) // 2)))) == step


def test_an_empty_share_of_the_last_batch_is_an_empty_list():
    assert [list(Order(9, 2, process=rank, processes=4)) for rank in (0, 1)] == [[[0, 4], [8]], [[1, 5], []]]


def test_padding_writes_the_pad_token_ignored_labels_and_zeros():
    pad = Pad("token_classification", 7, ("input_ids", "attention_mask", "global_attention_mask"))
    long = {"input_ids": [1, 2], "labels": [0, 1], "global_attention_mask": [1, 0]}
    short = {"input_ids": [3], "labels": [2], "global_attention_mask": [1]}
    batch = pad([long, short])
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[1, 2], [3, 7]], "labels": [[0, 1], [2, -100]], "global_attention_mask": [[1, 0], [1, 0]],
        "attention_mask": [[1, 1], [1, 0]],
    }  # fmt: skip
    with pytest.raises(InputError, match="attention_mask of an example has shape"):
        pad([{"input_ids": [1, 2], "attention_mask": [1], "labels": [0, 1]}])
    assert (
        counted(torch.tensor([[5, 5, -100]]), "causal_lm", 3) == 1
        and counted(torch.zeros(4, 3), "classification", 3) == 12
    )


def bits(model, adapters):
    return {key: value.clone() for key, value in model.state_dict().items() if (".adapters." in key) == adapters}


@pytest.mark.parametrize("peft", ["lora[rank=2]", "prefix[length=2]|ia3", "bitfit"])
def test_what_is_frozen_keeps_its_bits_under_weight_decay(build, tmp_path, peft):
    model = build(peft=peft)
    effzoo.attach(model, "lora", name="idle")
    effzoo.activate(model, "default")
    base, trained = bits(model, False), bits(model, True)
    finetune(
        model,
        rows(),
        output_dir=tmp_path,
        max_steps=5,
        weight_decay=0.5,
        learning_rate=1e-2,
        save_every=None,
        progress=False,
    )
    assert all(torch.equal(value, base[key]) for key, value in bits(model, False).items())
    for key, value in bits(model, True).items():
        assert torch.equal(value, trained[key]) == (".adapters.idle." in key), key


def test_an_encoder_learns_to_classify_and_a_decoder_to_continue(build, tmp_path):
    data = [{"input_ids": [2 + 10 * (i % 3) + (i * j) % 9 for j in range(8)], "label": i % 3} for i in range(30)]
    model = build(peft="lora[rank=4]")
    encoder = finetune(
        model, data, evaluate=data, output_dir=tmp_path / "e", epochs=12, learning_rate=2e-2, progress=False
    )
    assert encoder.metrics["eval_accuracy"] == 1.0 and encoder.metrics["eval_loss"] < 0.1 < encoder.history[0]["loss"]
    data = [{"input_ids": (ids := [3 + (i + j) % 5 for j in range(12)]), "labels": ids} for i in range(20)]
    decoder = finetune(
        build("causal_lm"),
        data,
        evaluate=data,
        output_dir=tmp_path / "d",
        epochs=30,
        learning_rate=1e-2,
        save_every=None,
        progress=False,
    )
    assert decoder.metrics["eval_perplexity"] < 1.5 and decoder.history[0]["loss"] > 2


def test_recomputing_changes_no_loss_even_with_dropout(build, tmp_path):
    model = build(peft="lora", dropout=0.3)
    start, losses = copy.deepcopy(model.state_dict()), []
    for choice in ({}, {"recompute": "nothing"}, {"recompute": "blocks"}):
        model.load_state_dict(start)
        result = finetune(
            model,
            rows(),
            output_dir=tmp_path,
            max_steps=5,
            log_every=1,
            learning_rate=1e-2,
            save_every=None,
            progress=False,
            **choice,
        )
        losses.append([entry["loss"] for entry in result.history])
        assert (model.recompute, model.only_what_is_read) == ("nothing", False), "as it came"
    assert losses[0] == losses[1] == losses[2]
    with pytest.raises(OptionError, match="recompute is 'nothing' or 'hidden' or 'blocks', got 'everything'"):
        finetune(model, rows(), output_dir=tmp_path, recompute="everything")


def test_bfloat16_computes_in_bfloat16_and_keeps_the_weights(build, tmp_path):
    model, kinds, losses = build(peft="lora"), set(), {}
    handle = model.blocks[0].attn.q.register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
    for precision in ("float32", "bfloat16"):
        kinds.clear()
        losses[precision] = finetune(
            model,
            rows(),
            evaluate=rows(),
            output_dir=tmp_path,
            max_steps=1,
            learning_rate=1e-9,
            precision=precision,
            save_every=None,
            progress=False,
        ).metrics
        assert kinds == {getattr(torch, precision)}
    handle.remove()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(input_ids=torch.tensor([[3, 4]])).logits.dtype == torch.float32, "the model itself is as it was"
    # 8 bits of mantissa
    assert losses["bfloat16"]["eval_loss"] == pytest.approx(losses["float32"]["eval_loss"], rel=1e-2)


@pytest.mark.parametrize("task", ["classification", "token_classification", "causal_lm"])
def test_evaluation_is_the_mean_over_all_labels_in_the_order_of_the_data(build, tmp_path, task):
    model, data, seen = build(task), rows(task, 7), []

    def metrics(prediction):
        seen.append(prediction)
        return {"rows": len(prediction.predictions)}

    result = finetune(
        model, data, evaluate=data, output_dir=tmp_path, max_steps=1, learning_rate=1e-9, eval_batch_size=3,
        metrics=metrics, save_every=None, progress=False,
    )  # fmt: skip
    total = count = hits = 0
    model.eval()
    for index, row in enumerate(data):
        labels = torch.tensor([row["labels"]])
        output = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels)
        number = int(counted(labels, task, 3))
        total, count = total + output.loss.item() * number, count + number
        hits += int((output.logits.argmax(-1) == labels).sum())
        logits = torch.tensor(seen[0].predictions[index])
        own = logits if task == "classification" else logits[: len(row["input_ids"])]
        torch.testing.assert_close(own, output.logits[0], rtol=1e-5, atol=1e-6)
        assert seen[0].label_ids[index].reshape(-1)[: labels.numel()].tolist() == labels[0].reshape(-1).tolist()
    assert result.metrics["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert result.metrics["eval_rows"] == 7
    if task == "causal_lm":
        assert result.metrics["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    else:
        assert result.metrics["eval_accuracy"] == hits / count


def test_accuracy_on_a_case_counted_by_hand(build, tmp_path):
    """A head that always says class 1 is right on 3 of these 5."""
    model = build()
    with torch.no_grad():
        model.head.out.weight.zero_()
        model.head.out.bias.copy_(torch.tensor([0.0, 5.0, 0.0]))
    data = [{"input_ids": [2, 3], "label": label} for label in (1, 0, 1, 2, 1)]
    result = finetune(
        model,
        data,
        evaluate=data,
        output_dir=tmp_path,
        max_steps=1,
        learning_rate=1e-9,
        eval_batch_size=2,
        progress=False,
    )
    assert result.metrics["eval_accuracy"] == 3 / 5
    right, wrong = math.log(2 + math.exp(5)) - 5, math.log(2 + math.exp(5))
    assert result.metrics["eval_loss"] == pytest.approx((3 * right + 2 * wrong) / 5, rel=1e-5)


def test_what_is_written_loads_into_a_fresh_model(build, tmp_path):
    ids = torch.tensor([[5, 6, 7]])
    settings = {"max_steps": 4, "learning_rate": 1e-2, "progress": False, "save_every": 2}
    model = build(peft="lora")
    result = finetune(model, datasets.Dataset.from_list(rows()), output_dir=tmp_path / "lora", **settings)
    fresh = effzoo.load_adapter(build(), result.adapter)
    assert torch.equal(fresh.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert result.last == tmp_path / "lora" / "checkpoint-4" and not list(result.last.rglob("model.safetensors"))
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]

    model = build()
    result = finetune(model, rows(), output_dir=tmp_path / "all", **settings)
    assert result.adapter is None and result.peak_memory > 1e6 and result.seconds > 0
    fresh = build()
    fresh.load_state_dict(safetensors.torch.load_file(result.weights))
    assert torch.equal(fresh.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)

    model = build(peft="lora")
    effzoo.activate(effzoo.attach(model, "prefix", name="second"), "default", "second")
    result = finetune(model, rows(), output_dir=tmp_path / "two", **settings)
    fresh = effzoo.load_adapter(effzoo.load_adapter(build(), result.adapter / "default"), result.adapter / "second")
    effzoo.activate(fresh, "default", "second")
    assert torch.equal(fresh.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_the_best_checkpoint_is_kept_and_loaded(build, tmp_path):
    """The rate is so high that the loss on held-out rows of other labels only rises."""
    train = [{"input_ids": [3 + i, 4], "label": 0} for i in range(8)]
    held_out = [{"input_ids": [3 + i, 4], "label": 1} for i in range(8)]
    model = build(peft="lora")
    result = finetune(
        model,
        train,
        evaluate=held_out,
        output_dir=tmp_path,
        epochs=5,
        learning_rate=1e-2,
        best="loss",
        keep=1,
        progress=False,
    )
    losses = {entry["step"]: entry["eval_loss"] for entry in result.history if "eval_loss" in entry}
    assert (
        list(losses) == [1, 2, 3, 4, 5]
        and result.best.name == f"checkpoint-{min(losses, key=losses.get)}" == "checkpoint-1"
    )
    assert [path.name for path in whole(tmp_path)] == ["checkpoint-1", "checkpoint-5"]
    batch = Pad("classification", 0, ("input_ids",))(held_out)
    assert (
        model.eval()(**batch).loss.item() == pytest.approx(losses[1], rel=1e-5)
        and result.metrics["eval_loss"] == losses[1]
    )


def test_resuming_the_whole_model_gives_the_same_bits(build, tmp_path):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 5:
                raise KeyboardInterrupt

    settings = {
        "max_steps": 7,
        "batch_size": 6,
        "learning_rate": 1e-2,
        "log_every": 3,
        "save_every": 2,
        "progress": False,
        "schedule": "cosine",
    }
    model = build(dropout=0.2)
    straight = finetune(model, rows(), output_dir=tmp_path / "a", **settings)
    with pytest.raises(KeyboardInterrupt):
        finetune(build(dropout=0.2), rows(), output_dir=tmp_path / "b", callbacks=[Stop()], **settings)
    (tmp_path / "b" / ".partial-6").mkdir()
    other = build(dropout=0.2)
    resumed = finetune(other, rows(), output_dir=tmp_path / "b", resume=True, **settings)
    assert resumed.history == straight.history and resumed.metrics == straight.metrics
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    assert not (tmp_path / "b" / ".partial-6").exists()
    again = finetune(build(dropout=0.2), rows(), output_dir=tmp_path / "b", resume=True, **settings)
    assert again.steps == resumed.steps == 7 and again.history == straight.history, (
        "a finished run is not trained further"
    )
    with pytest.raises(TrainingError, match=r"learning_rate was 0\.01 and is now 0\.1"):
        finetune(build(), rows(), output_dir=tmp_path / "b", resume=True, **{**settings, "learning_rate": 0.1})
    with pytest.raises(TrainingError, match="resume=True continues it, Saving.overwrite=True. removes"):
        finetune(build(), rows(), output_dir=tmp_path / "b", **settings)
    assert (
        finetune(build(dropout=0.2), rows(), output_dir=tmp_path / "b", overwrite=True, **settings).history
        == straight.history
    )


def test_a_checkpoint_of_another_base_or_a_damaged_one_is_refused(build, tmp_path):
    settings = {"output_dir": tmp_path, "max_steps": 2, "progress": False}
    finetune(build(peft="lora"), rows(), **settings)
    other = build(peft="lora")
    with torch.no_grad():
        other.embeddings.token.weight[0] += 1
    with pytest.raises(AdapterError, match=r"another base.*embeddings.token.weight"):
        finetune(other, rows(), resume=True, **settings)
    with open(tmp_path / "checkpoint-2" / "state.safetensors", "r+b") as file:
        file.truncate(64)
    with pytest.raises(TrainingError, match="is not a whole checkpoint: state.safetensors has changed"):
        finetune(build(peft="lora"), rows(), resume=True, **settings)


def test_a_masked_language_model_collator_and_workers(build, tmp_path):
    """A user's collator replaces padding; batches made in worker processes give the same losses as those made here."""

    def collate(found):
        ids = torch.tensor([row["input_ids"][:4] for row in found])
        return {"input_ids": ids, "labels": ids.where(ids % 3 == 0, -100)}

    losses = [
        finetune(
            build("masked_lm"), rows("masked_lm"), output_dir=tmp_path, max_steps=3, log_every=1, collator=collate,
            num_workers=workers, save_every=None, progress=False,
        ).history
        for workers in (0, 1)
    ]  # fmt: skip
    assert losses[0] == losses[1]


GOOD = [{"input_ids": [2, 3], "label": 0}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "train is empty"),
        ({"train": GOOD}, "is a mapping of train; give one of them"),
        ([{"input_ids": [2]}], "has no labels.*Columns: input_ids"),
        ([{"text": "a", "label": 0}], "needs either 'input_ids' or 'inputs_embeds'; tokenise it first"),
        ([{"input_ids": [2], "label": 0, "labels": 0}], "several label columns"),
        (
            [{"input_ids": [2], "label": 0, "atention_mask": [1]}],
            "'atention_mask', which the model does not read; did you mean 'attention_mask'",
        ),
        (
            [*GOOD, {"input_ids": [2] * 65, "label": 0}],
            "example 1 has 65 tokens and 1 of 2 have more than the 64 that fit",
        ),
        ([*GOOD, {"input_ids": [2], "label": 3}], r"example 1 has the label 3, the model has 3 classes \(0 to 2\)"),
        ([*GOOD, {"input_ids": [2], "label": "sport"}], "labels are integers"),
        ([*GOOD, {"input_ids": [2], "label": None}], "example 1 has no label"),
        ([*GOOD, {"input_ids": [], "label": 1}], "example 1 is empty"),
    ],
)
@pytest.mark.parametrize("kind", [list, "datasets"])
def test_data_that_would_train_on_the_wrong_thing_is_refused(build, tmp_path, data, message, kind):
    # else no table can hold it
    if kind == "datasets" and isinstance(data, list) and data and not isinstance(data[-1].get("label"), str):
        data = datasets.Dataset.from_list(data)
    with pytest.raises(InputError, match=message):
        finetune(build(), data, output_dir=tmp_path, max_steps=1, progress=False)
    assert not list(tmp_path.iterdir()), "refused before anything is written"


def test_prompt_rows_count_towards_the_length(build, tmp_path):
    with pytest.raises(InputError, match="more than the 59 that fit"):
        finetune(
            build(peft="prompt[length=5]"), [{"input_ids": [2] * 60, "label": 0}], output_dir=tmp_path, progress=False
        )


def test_text_columns_are_left_out_with_a_report(build, tmp_path, caplog):
    finetune(
        build(),
        [{**GOOD[0], "text": "hello", "idx": 0}],
        output_dir=tmp_path,
        max_steps=1,
        progress=False,
        save_every=None,
    )
    assert "the columns text, idx are not read by the model and left out" in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, OptionError, "epochs is a positive number, got 0"),
        ({"batch_size": 2.5}, ArgumentError, "batch_size takes int .from 1 to 2.31 - 1., got 2.5"),
        ({"schedule": "square"}, OptionError, "schedule is 'linear' or 'cosine' or 'constant' or .*, got 'square'"),
        ({"warmup": 1.5}, OptionError, r"warmup is in \[0, 1\), got 1.5"),
        ({"evaluate_every": "day"}, OptionError, "evaluate_every takes int .* or 'epoch' or none, got 'day'"),
        ({"best": "loss"}, OptionError, "needs evaluations to choose by"),
        ({"precision": "int8"}, OptionError, "precision is 'float32' or 'bfloat16' or 'float16', got 'int8'"),
        (
            {"learning_rate": 1e30, "clip": None, "warmup": 0, "log_every": 1},
            TrainingError,
            "the loss is (nan|inf) at step",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(build, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        finetune(
            build(), GOOD, output_dir=tmp_path, **{"max_steps": 3, "progress": False, "save_every": None, **options}
        )


def test_models_without_anything_to_train_or_to_keep_are_refused(build, tiny, tmp_path, monkeypatch):
    settings = {"output_dir": tmp_path, "max_steps": 1, "progress": False}
    with pytest.raises(TrainingError, match=r"nothing to train.*effzoo.activate\(model, 'default'\)"):
        finetune(effzoo.activate(build(peft="lora")), GOOD, **settings)
    with pytest.raises(TrainingError, match="task='features' has no loss"):
        finetune(effzoo.build("bert", **tiny), GOOD, **settings)
    model = build(peft="lora")
    model.embeddings.norm.requires_grad_(True)
    with pytest.raises(TrainingError, match="outside the active adapters are trainable"):
        finetune(model, GOOD, **settings)
    if not torch.cuda.is_available():
        with pytest.raises(IncompatibleError, match="precision='float16' scales its loss on a CUDA device.*bfloat16"):
            finetune(build(), GOOD, precision="float16", **settings)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(IncompatibleError, match="launched with mixed precision 'bf16'.*precision='bfloat16'"):
        finetune(build(), GOOD, **settings)
