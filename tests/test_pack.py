"""Packing: rows hold each document once and whole, and a run on them is the run on the documents."""

import datasets
import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from support import StopAt, finetune

import effzoo
from effzoo.data import pack
from effzoo.errors import ArgumentError, DataError, IncompatibleError, OptionError
from effzoo.packing import fitted


def documents(count=40, longest=20, seed=0):
    random = np.random.RandomState(seed)
    ids = [random.randint(2, 53, random.randint(1, longest + 1)).tolist() for _ in range(count)]
    return [{"input_ids": each, "labels": each} for each in ids]


class Passes:
    """A stream of rows, and nothing more."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def parts(row, column):
    """What a column of a packed row holds of each document."""
    numbers = row["document_ids"].tolist()
    assert numbers == sorted(numbers) and set(numbers) == set(range(1, max(numbers) + 1))
    return [row[column][row["document_ids"] == number].tolist() for number in range(1, max(numbers) + 1)]


@hypothesis.given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(30, 50))
def test_every_length_is_in_one_row_that_holds_it_and_few_rows_are_needed(lengths, length):
    rows = fitted(lengths, length)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    loads = sorted(sum(lengths[place] for place in row) for row in rows)
    assert loads[-1] <= length
    assert len(loads) == 1 or loads[0] + loads[1] > length, "no two rows would fit into one"


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
@pytest.mark.parametrize("holder", [list, datasets.Dataset.from_list, Passes])
def test_rows_hold_each_document_once_and_whole(holder, task):
    data = documents()
    for window in (7, 2000):
        rows = list(pack(holder(data), 24, task=task, window=window))
        assert max(len(row["input_ids"]) for row in rows) <= 24
        found = sorted(ids for row in rows for ids in parts(row, "input_ids"))
        assert found == sorted(document["input_ids"] for document in data)
        for row in rows:
            for ids, labels in zip(parts(row, "input_ids"), parts(row, "labels"), strict=True):
                assert labels == ([-100, *ids[1:]] if task == "causal_lm" else ids)


def test_rows_are_full_and_say_so_and_depend_on_the_seed_alone():
    data = documents(1000)
    rows = pack(data, 64)
    assert rows.full == sum(rows.lengths) / (64 * len(rows)) > 0.98
    assert rows.lengths == [len(row["input_ids"]) for row in rows]
    assert str(rows) == f"1,000 documents in {len(rows)} rows of up to 64 tokens, {rows.full:.1%} full"
    assert pack(data, 64).documents == rows.documents != pack(data, 64, seed=1).documents
    assert [row["input_ids"].tolist() for row in rows[2:4]] == [rows[i]["input_ids"].tolist() for i in (2, 3)]


def test_a_stream_gives_other_rows_in_another_pass():
    stream = pack(datasets.Dataset.from_list(documents()).to_iterable_dataset().shuffle(seed=0, buffer_size=9), 24)
    passes = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        passes.append([row["input_ids"].tolist() for row in stream])
    assert passes[0] == passes[2] != passes[1]


def test_columns_of_tokens_go_along_and_texts_are_left_out():
    data = [
        {"input_ids": [2, 3], "labels": [1, 0], "token_type_ids": [0, 1], "text": "a", "id": 3},
        {"input_ids": [4], "label": [2], "token_type_ids": [1], "text": "b", "id": 4},
    ]
    (row,) = pack(data, 8, task="token_classification")
    assert {name: x.tolist() for name, x in row.items()} == {
        "input_ids": [2, 3, 4], "labels": [1, 0, 2], "token_type_ids": [0, 1, 1], "document_ids": [1, 1, 2]
    }  # fmt: skip


@pytest.mark.parametrize(("data", "options", "message"), [
    ([{"input_ids": [2] * 9}], {}, "example 0 has 9 tokens, a row 8; truncate it, or give a larger max_length"),
    ([{"input_ids": [2]}, {"input_ids": []}], {}, "example 1 is empty"),
    ([{"text": "a"}], {}, "example 0 is no mapping with 'input_ids'"),
    ([{"input_ids": [2, 3], "labels": 1}], {}, r"example 0: labels has shape \(\), not one entry for each of 2 tokens"),
    ([{"input_ids": [2], "labels": [2]}, {"input_ids": [3]}], {}, "some of the documents .* have the column 'labels'"),
    ([{"input_ids": [2]}], {"task": "classification"}, "classification has one label per row, so a row holds one"),
    ([{"input_ids": [2]}], {"task": "causal"}, "task is one of causal_lm, masked_lm, token_classification"),
    (iter([{"input_ids": [2]}]), {}, "documents are in a table, a list or a stream that can be read again"),
])  # fmt: skip
@pytest.mark.parametrize("holder", [lambda data: data, lambda data: Passes(data) if isinstance(data, list) else data])
def test_what_has_no_place_in_a_row_is_named(data, options, message, holder):
    with pytest.raises(DataError, match=message):
        list(pack(holder(data), 8, **options))


def test_a_row_has_a_length():
    with pytest.raises(ArgumentError, match="max_length"):
        pack(documents(), "8")


SETTINGS = {"learning_rate": 1e-2, "progress": False, "log_every": 1, "save_every": None}


def build(tiny, task="causal_lm", dropout=0.0, **options):
    torch.manual_seed(0)
    sizes = {**tiny, "layers": 1, "max_length": 24, "dropout": dropout, "attention_dropout": dropout}
    return effzoo.build(
        {"causal_lm": "gpt2"}.get(task, "roberta"), **{**sizes, "task": task, "peft": "lora", **options}
    )


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm", "token_classification"])
def test_a_run_on_packed_rows_has_the_losses_of_its_documents(tiny, tmp_path, task):
    """With all documents in each step."""
    data = documents(12)
    runs = [
        finetune(
            build(tiny, task, num_labels=53), data, evaluate=data, output_dir=tmp_path / str(packing), max_steps=3,
            batch_size=12, packing=packing, **SETTINGS,
        )
        for packing in (False, True)
    ]  # fmt: skip
    one, two = ([(entry["loss"], entry["grad_norm"]) for entry in run.history] for run in runs)
    assert np.allclose(one, two, rtol=1e-5)
    assert runs[0].metrics["eval_loss"] == pytest.approx(runs[1].metrics["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("holder", [list, datasets.Dataset.from_list, Passes])
def test_an_interrupted_run_on_packed_rows_goes_on_to_the_same_bits(tiny, tmp_path, holder, caplog):
    settings = SETTINGS | {"max_steps": 9, "batch_size": 2, "save_every": 1, "keep": None, "packing": True}
    data = holder(documents())
    whole = finetune(build(tiny, dropout=0.2), data, output_dir=tmp_path / "whole", **settings)
    assert len({entry["loss"] for entry in whole.history}) == 9
    for step in (3, 8):
        settings["output_dir"] = tmp_path / str(step)
        with pytest.raises(KeyboardInterrupt):
            finetune(build(tiny, dropout=0.2), data, callbacks=[StopAt(step)], **settings)
        resumed = finetune(build(tiny, dropout=0.2), data, resume=True, **settings)
        assert resumed.history == whole.history
    if holder is list:
        settings["packing"] = False
        with pytest.raises(effzoo.errors.TrainingError, match="belongs to another run: examples was"):
            finetune(build(tiny, dropout=0.2), data, resume=True, **settings)


def test_rows_that_were_packed_before_are_those_of_finetune(tiny, tmp_path):
    data, found = documents(), []
    for given in ({"train": data, "packing": True}, {"train": pack(data, 24)}):
        run = finetune(
            build(tiny), **given, output_dir=tmp_path / str(len(found)), epochs=1, group_by_length=True, **SETTINGS
        )
        found.append([entry["loss"] for entry in run.history])
    assert found[0] == found[1]


@pytest.mark.parametrize(("task", "options", "error", "message"), [
    ("classification", {}, DataError, "classification has one label per row"),
    ("causal_lm", {"collator": lambda rows: {}}, OptionError, "packing joins tokenised examples"),
    ("causal_lm", {"sequence_ranks": 2}, IncompatibleError, "packed documents are not computed over ranks"),
    ("causal_lm", {"teacher": True}, IncompatibleError, "packing does not go with a distillation of hidden states"),
])  # fmt: skip
def test_what_cannot_be_packed_is_refused(tiny, tmp_path, task, options, error, message):
    model, data = build(tiny, task, num_labels=53), documents()
    if task == "classification":
        data = [{**row, "labels": 1} for row in data]
    if "teacher" in options:
        options = {"teacher": build(tiny, task, peft=None), "distillation": {"hidden": 1.0}}
    if "collator" in options:

        def collate(rows):
            return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

        options = {"collator": collate}
    with pytest.raises(error, match=message):
        finetune(model, data, output_dir=tmp_path, max_steps=1, packing=True, **SETTINGS, **options)


def test_a_perceiver_cannot_keep_documents_apart(tmp_path):
    from support import sizes_of

    model = effzoo.build("perceiver-io", task="masked_lm", **sizes_of("perceiver-io"))
    with pytest.raises(IncompatibleError, match="the latents of a Perceiver read the whole row"):
        finetune(model, documents(), output_dir=tmp_path, max_steps=1, packing=True, **SETTINGS)
