"""Streams: data without a length give the losses of the list of the same rows, and a run goes on after an interruption
as if there had been none."""

import datasets
import pytest
import torch
from support import StopAt, finetune

import effzoo
from effzoo.errors import InputError, OptionError, TrainingError

ROWS = [{"input_ids": [2 + i, 3, 4 + i % 7][: 1 + i % 3], "labels": i % 3} for i in range(25)]


class Stream:
    """An iterable and nothing more."""

    def __init__(self, rows=ROWS):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class OfTorch(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(ROWS)


def table(shards=1):
    return datasets.Dataset.from_list(ROWS).to_iterable_dataset(num_shards=shards)


def shuffled():
    return table(shards=5).shuffle(seed=3, buffer_size=7)


def build(tiny, dropout=0.0, **options):
    torch.manual_seed(0)
    sizes = {**tiny, "layers": 1, "dropout": dropout, "attention_dropout": dropout}
    return effzoo.build("bert", **{**sizes, "task": "classification", "num_labels": 3, "peft": "lora", **options})


def losses(result):
    return [entry["loss"] for entry in result.history]


SETTINGS = {"batch_size": 4, "learning_rate": 1e-2, "progress": False, "log_every": 1, "save_every": None}


@pytest.mark.parametrize("stream", [Stream, OfTorch, table])
def test_the_losses_are_those_of_the_same_rows_in_a_list(tiny, tmp_path, stream, monkeypatch):
    found = finetune(
        build(tiny), stream(), evaluate=stream(), output_dir=tmp_path / "stream", max_steps=16,
        evaluate_every="epoch", **SETTINGS,
    )  # fmt: skip
    monkeypatch.setattr(torch, "randperm", lambda n, generator=None: torch.arange(n))
    listed = finetune(
        build(tiny), ROWS, evaluate=ROWS, output_dir=tmp_path / "list", max_steps=16, evaluate_every="epoch", **SETTINGS
    )
    assert losses(found) == losses(listed)
    of_evaluations = [
        [(entry["step"], entry["epoch"], entry["eval_loss"]) for entry in result.history if "eval_loss" in entry]
        for result in (found, listed)
    ]
    assert [step for step, *_ in of_evaluations[0]] == [7, 14, 16]
    assert [epoch for _, epoch, _ in of_evaluations[0]] == [1, 2, 2]
    values = [[value for *_, value in entries] for entries in of_evaluations]
    assert values[0] == pytest.approx(values[1], rel=1e-6), "the list is evaluated in the order of its lengths"


@pytest.mark.cover()
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("stream", [Stream, shuffled])
def test_an_interrupted_run_goes_on_to_the_same_bits_at_any_step(tiny, tmp_path, stream, accumulation):
    """With dropout; 25 examples are 7 steps of 4, or 3 steps of 3 x 4, so that passes end at and between the stops."""
    settings = SETTINGS | {
        "max_steps": 9, "save_every": 1, "keep": None, "gradient_accumulation": accumulation, "evaluate_every": "epoch"
    }  # fmt: skip
    whole = finetune(build(tiny, 0.2), stream(), evaluate=stream(), output_dir=tmp_path / "whole", **settings)
    assert len(set(losses(whole))) == 9
    for step in (2, 3, 7, 8):
        settings["output_dir"] = tmp_path / str(step)
        with pytest.raises(KeyboardInterrupt):
            finetune(build(tiny, 0.2), stream(), evaluate=stream(), callbacks=[StopAt(step)], **settings)
        model = build(tiny, 0.2)
        resumed = finetune(model, stream(), evaluate=stream(), resume=True, **settings)
        assert resumed.history == whole.history


def test_a_shuffled_stream_has_another_order_in_each_pass(tiny, tmp_path):
    order = []

    class Watched:
        def __init__(self):
            self.data = shuffled()

        def set_epoch(self, epoch):
            order.append([])
            self.data.set_epoch(epoch)

        def __iter__(self):
            for row in self.data:
                if order:
                    order[-1].append(row["input_ids"][0])
                yield row

    finetune(build(tiny), Watched(), output_dir=tmp_path, max_steps=14, **SETTINGS)
    assert [len(part) for part in order] == [25, 25] and sorted(order[0]) == sorted(order[1]) and order[0] != order[1]


def test_no_more_is_read_than_is_needed_and_a_stream_may_be_endless(tiny, tmp_path):
    read = []

    class Endless:
        def __iter__(self):
            number = 0
            while True:
                read.append(number)
                yield ROWS[number % 25]
                number += 1

    result = finetune(build(tiny), Endless(), output_dir=tmp_path, max_steps=3, **SETTINGS)
    assert result.steps == 3 and max(read) == 12, "one beyond the last batch, which tells that the pass goes on"


def test_methods_that_look_at_data_see_the_first_batches(tiny, tmp_path):
    found = []
    for data in (Stream(), Stream(ROWS[:8])):
        model = build(tiny, peft="fish[keep=0.1]")
        finetune(model, data, output_dir=tmp_path / str(len(found)), max_steps=2, calibration_batches=2, **SETTINGS)
        found.append({name: x for name, x in model.state_dict().items() if ".adapters." in name})
    assert found[0].keys() == found[1].keys() and all(x.equal(found[1][name]) for name, x in found[0].items())


def test_a_collator_reads_the_rows_as_they_are(tiny, tmp_path):
    def collate(rows):
        return {
            "input_ids": torch.tensor([row["words"] for row in rows]), "labels": torch.tensor([r["y"] for r in rows])
        }  # fmt: skip

    rows = [{"words": [2 + i, 3], "y": i % 3} for i in range(6)]
    named = [{"input_ids": row["words"], "labels": row["y"]} for row in rows]
    one = finetune(build(tiny), Stream(rows), output_dir=tmp_path / "1", max_steps=3, collator=collate, **SETTINGS)
    two = finetune(build(tiny), Stream(named), output_dir=tmp_path / "2", max_steps=3, **SETTINGS)
    assert losses(one) == losses(two)


@pytest.mark.parametrize(("options", "message"), [
    ({}, "train is a stream, of which nobody knows the length; give max_steps in place of epochs"),
    ({"max_steps": 2, "group_by_length": True}, "group_by_length needs the length of every example"),
    ({"max_steps": 2, "num_workers": 1}, "num_workers=1 is for data with a length: a stream gives other examples in"),
])  # fmt: skip
def test_what_needs_a_length_is_refused(tiny, tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        finetune(build(tiny), Stream(), output_dir=tmp_path, **SETTINGS, **options)


def test_a_wrong_example_is_named_by_its_number_when_it_is_read(tiny, tmp_path):
    rows = [*ROWS[:9], {"input_ids": [53], "labels": 0}, {"input_ids": [3] * 65, "labels": 0}, {"input_ids": [4]}]
    for wrong, message in [(9, r"input_ids are in \[0, 53\)"), (10, "has 65 tokens, 64 fit"), (11, "has no label")]:
        data = Stream([*rows[:9], rows[wrong]])
        with pytest.raises(InputError, match=f"train: example 9:? {message}"):
            finetune(build(tiny), data, output_dir=tmp_path / str(wrong), max_steps=3, **SETTINGS)
    assert finetune(build(tiny), Stream(rows), output_dir=tmp_path / "before", max_steps=2, **SETTINGS).steps == 2


def test_a_stream_that_is_empty_the_second_time_is_refused(tiny, tmp_path):
    class Once:
        opened = 0

        def __iter__(self):
            self.opened += 1
            return iter(ROWS[:4] if self.opened < 3 else ())

    with pytest.raises(TrainingError, match="train gives no examples in pass 1; a stream can be read again"):
        finetune(build(tiny), Once(), output_dir=tmp_path, max_steps=3, **SETTINGS)
