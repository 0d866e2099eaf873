"""Every example that `finetune` and `predict` read is checked, whatever holds it, and what differs from the first one
is refused by its number."""

import json
import logging

import datasets
import numpy as np
import pandas
import pytest
import torch
from support import finetune

import effzoo
from effzoo.errors import InputError
from effzoo.train.examples import examples

LABELLED = {"input_ids": [5, 6, 7, 8], "labels": 1}
PLAIN = {"input_ids": [5, 6, 7, 8]}


class Lazy(torch.utils.data.Dataset):
    """Rows that are read only when they are asked for."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def model_of(tiny, task="classification", **options):
    name = {"causal_lm": "gpt2", "token_classification": "bert"}.get(task, "bert")
    return effzoo.build(name, **{**tiny, "layers": 1, "task": task, "num_labels": 3, **options})


HOLDERS = {"list": list, "table": datasets.Dataset.from_list, "lazy": Lazy}
WRONG = [  # the second row, what is said of it; None where no table can hold it beside the first
    ({"input_ids": [5, 6], "labels": 1, "attention_mask": [1, 0]}, "example (1 has|0 lacks) 'attention_mask', which"),
    ({"input_ids": [5, 6], "labels": None}, "example 1 has no label"),
    ({"input_ids": [5, 6]}, "example 1 has no label"),
    ({"input_ids": None, "labels": 1}, "example 1 lacks 'input_ids'"),
    ({"input_ids": [], "labels": 1}, "example 1 is empty"),
    ({"input_ids": [5, 53], "labels": 1}, r"example 1: input_ids are in \[0, 53\), got 5 to 53"),
    ({"input_ids": [5, -1], "labels": 1}, "got -1 to 5"),
    ({"input_ids": [5, None], "labels": 1}, r"example 1: input_ids is \[5, None\], which is no array of numbers"),
    ({"input_ids": [5, 6], "labels": 3}, "example 1 has the label 3, the model has 3 classes"),
    ({"input_ids": [5, 6], "labels": -1}, "example 1 has the label -1"),
]
ODD = [
    (
        {"input_ids": [5, 6], "labels": 1, "atention_mask": [1, 0]},
        "example 1 has the column 'atention_mask', which the model does not read; did you",
    ),
    ({"input_ids": [5.0, 6.0], "labels": 1}, "example 1: input_ids is a list of integers, got float32"),
    ({"input_ids": [[5, 6]], "labels": 1}, r"example 1: input_ids is a list of integers, got int64 of shape \(1, 2\)"),
    ({"input_ids": [[5], [6, 7]], "labels": 1}, "example 1: input_ids is .*, which is no array of numbers"),
    ({"input_ids": "5 6", "labels": 1}, "example 1: input_ids is '5 6', which is no array of numbers"),
    ({"input_ids": [5, 6], "labels": 1.5}, "example 1 has the label 1.5; labels are integers"),
    ({"input_ids": [5, 6], "labels": float("nan")}, "example 1 has the label nan"),
    ({"input_ids": [5, 6], "labels": [0, 1]}, r"example 1 has a label of shape \(2,\), example 0 one of shape \(\)"),
    ({"input_ids": [5, 6], "labels": [1.0, 0.0, 0.0]}, "example 1 has a label of shape"),
    ({"input_ids": [5, 6], "labels": "sport"}, "labels are integers"),
    ({"input_ids": [5, 2**70], "labels": 1}, "which is no array of numbers"),
    ({"input_ids": [5, 1j], "labels": 1}, "complex numbers"),
    ([5, 6], "example 1 is a list, not a mapping of columns"),
]


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize(("row", "message"), WRONG)
def test_a_row_that_differs_from_the_first_is_named_before_it_is_trained_on(tiny, tmp_path, holder, row, message):
    names = dict.fromkeys([*LABELLED, *row])
    data = HOLDERS[holder]([LABELLED, row] if holder != "table" else [{**names, **LABELLED}, {**names, **row}])
    with pytest.raises(InputError, match=f"train: .*{message}|train: {message}"):
        finetune(model_of(tiny, peft="lora"), data, output_dir=tmp_path, max_steps=1, batch_size=2, progress=False)


@pytest.mark.parametrize("holder", ["list", "lazy"])
@pytest.mark.parametrize(("row", "message"), ODD)
def test_a_row_that_no_table_could_hold_is_named_as_well(tiny, tmp_path, holder, row, message):
    with pytest.raises(InputError, match=message):
        finetune(
            model_of(tiny, peft="lora"),
            HOLDERS[holder]([LABELLED, row]),
            output_dir=tmp_path,
            max_steps=1,
            batch_size=2,
            progress=False,
        )


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            {**PLAIN, "attention_mask": [1, 1, 0, 0]},
            {"input_ids": [1, 2]},
            "example 1 lacks 'attention_mask', which example 0 has",
        ),
        (PLAIN, {"input_ids": [1, 2], "attention_mask": [1, 1]}, "example (1 has|0 lacks) 'attention_mask', which"),
        (
            {**PLAIN, "attention_mask": [1, 1]},
            PLAIN,
            r"example 0: attention_mask has shape \(2,\), its input_ids has 4 positions",
        ),
        ({**PLAIN, "attention_mask": [1] * 4}, {**PLAIN, "attention_mask": None}, "example 1 lacks 'attention_mask'"),
    ],
)
def test_predict_reads_all_columns_of_every_row_or_refuses(tiny, holder, first, second, message):
    names = [*first, *second]
    rows = [first, second] if holder != "table" else [{**dict.fromkeys(names), **row} for row in (first, second)]
    with pytest.raises(InputError, match=message):
        effzoo.predict(model_of(tiny), HOLDERS[holder](rows), progress=False)


def test_a_mask_counts_whatever_stands_beside_its_row(tiny):
    """The law that a dropped column breaks: what is said of a row does not depend on the others."""
    model = model_of(tiny).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    rows = [{**PLAIN, "attention_mask": [1, 1, 0, 0]}, {"input_ids": [1, 2], "attention_mask": [1, 1]}]
    together = effzoo.predict(model, rows, progress=False)
    alone = torch.cat([effzoo.predict(model, [row], progress=False) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(alone[0], effzoo.predict(model, [PLAIN], progress=False)[0], atol=1e-4), (
        "the mask means something"
    )
    torch.testing.assert_close(
        effzoo.predict(model, [{**row, "labels": 7, "text": "a"} for row in rows], progress=False), together
    )


def test_predict_names_a_column_that_is_not_read(tiny):
    with pytest.raises(
        InputError, match="'atention_mask', which the model does not read; did you mean 'attention_mask'"
    ):
        effzoo.predict(model_of(tiny), [{**PLAIN, "atention_mask": [1, 1, 0, 0]}], progress=False)


def test_a_column_that_is_none_throughout_is_no_column(tiny):
    rows = [
        {**PLAIN, "attention_mask": None, "token_type_ids": None},
        {"input_ids": [1, 2], "attention_mask": None, "token_type_ids": None},
    ]
    model = model_of(tiny).eval()
    expected = effzoo.predict(model, [{"input_ids": row["input_ids"]} for row in rows], progress=False)
    for holder in HOLDERS.values():
        torch.testing.assert_close(effzoo.predict(model, holder(rows), progress=False), expected)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((row for row in [LABELLED]), "train is a generator, which can be read once; a stream is read anew .*list"),
        (iter([LABELLED]), "which can be read once"),
        (datasets.Dataset.from_list([LABELLED]).to_iterable_dataset().filter(lambda _: False), "train is empty"),
        (
            pandas.DataFrame([LABELLED]),
            "is a DataFrame, which gives columns, not examples; give datasets.Dataset.from_pandas",
        ),
        (
            {"input_ids": [[5, 6]], "labels": [1]},
            "mapping of input_ids, labels; give a list of rows, or datasets.Dataset.from_dict",
        ),
        (datasets.DatasetDict(train=datasets.Dataset.from_list([LABELLED])), "mapping of train; give one of them"),
        ("data.csv", "train is 'data.csv'; examples are needed: effzoo.data.load_text reads a file"),
        (b"data", "examples are needed"),
        ([[5, 6], [7]], "example 0 is a list, not a mapping"),
        (torch.ones(2, 3, dtype=torch.long), "example 0 is a Tensor, not a mapping"),
        (np.ones((2, 3)), "example 0 is a ndarray, not a mapping"),
        ({LABELLED["labels"]}, "example 0 is a int, not a mapping"),
        (None, "got None"),
        (7, "got 7"),
        (list, "got <class 'list'>"),
        (torch.utils.data.DataLoader([LABELLED]), "train is a DataLoader, which gives batches; give its examples"),
        (
            torch.utils.data.TensorDataset(torch.ones(2, 3).long()),
            "example 0 is a tuple, not a mapping of columns such as",
        ),
    ],
)
def test_what_holds_no_examples_is_told_how_to_become_some(tiny, tmp_path, data, message):
    with pytest.raises(InputError, match=message):
        finetune(model_of(tiny, peft="lora"), data, output_dir=tmp_path, max_steps=1, progress=False)


def test_predict_needs_a_length(tiny):
    with pytest.raises(InputError, match="examples needs a length and access by index"):
        effzoo.predict(model_of(tiny), datasets.Dataset.from_list([LABELLED]).to_iterable_dataset(), progress=False)


def test_one_row_is_the_same_from_a_list_a_table_an_array_and_a_file(tiny, tmp_path):
    """Losses and the hash of the data do not depend on what holds the rows."""
    rows = [{"input_ids": [5 + i, 6, 7][: 2 + i % 2], "labels": i % 3} for i in range(6)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = {
        "list": rows,
        "table": datasets.Dataset.from_list(rows),
        "chunks": datasets.concatenate_datasets(
            [datasets.Dataset.from_list(rows[:4]), datasets.Dataset.from_list(rows[4:])]
        ),
        "torch": datasets.Dataset.from_list(rows).with_format("torch"),
        "numpy": [{name: np.array(value, dtype=np.uint16) for name, value in row.items()} for row in rows],
        "tensors": [{name: torch.tensor(value) for name, value in row.items()} for row in rows],
        "file": datasets.load_dataset("json", data_files=str(file), cache_dir=str(tmp_path / "cache"))["train"],
        "frame": datasets.Dataset.from_pandas(pandas.DataFrame(rows)),
    }
    losses, digests = {}, {}
    for name, data in held.items():
        torch.manual_seed(0)
        model = model_of(tiny, peft="lora")
        digests[name] = examples(data, model, "train").digest
        losses[name] = finetune(
            model, data, output_dir=tmp_path / name, max_steps=2, progress=False, save_every=None, log_every=1
        ).history
    assert all(found == losses["list"] for found in losses.values()) and set(digests.values()) == {digests["list"]}
    rows[3]["input_ids"][0] += 1
    assert examples(rows, model, "train").digest != digests["list"]


def test_rows_that_are_read_when_asked_for_have_no_hash_but_their_own(tiny):
    data = Lazy([LABELLED])
    assert examples(data, model_of(tiny), "train").digest is None
    data.fingerprint = "mine"
    assert examples(data, model_of(tiny), "train").digest == "mine"


@pytest.mark.parametrize(
    ("options", "label", "good", "message"),
    [
        ({"num_labels": 1}, "x", 0.5, "labels are integers"),
        ({"num_labels": 1}, float("inf"), 2, "with num_labels=1 a label is one finite number"),
        ({"num_labels": 1}, [0.5, 1.0], 0.25, r"has a label of shape \(2,\)"),
        ({}, [0.0, 2.0, 1.0], [0.0, 1.0, 1.0], "each is a number from 0 to 1"),
        ({}, [0.0, float("nan"), 1.0], [0.0, 1.0, 1.0], "each is a number from 0 to 1"),
        ({}, [0, 1, 1], [0.0, 1.0, 1.0], "or a list of 3 floats where several labels may hold"),
        ({"task": "token_classification"}, [0, 1, 3, 0], [0, 1, 2, -100], "has the label 3, the model has 3 classes"),
        (
            {"task": "token_classification"},
            [0, 1],
            [0, 1, 2, 0],
            r"labels has shape \(2,\), its input_ids has 4 positions",
        ),
        ({"task": "causal_lm"}, [5, 6, 7, 53], [5, 6, 7, 8], "has the label 53, the model has 53 classes"),
        ({"task": "causal_lm"}, [5, 6, 7, 0.5], [5, 6, 7, 8], "labels are integers"),
    ],
)
def test_labels_of_every_task_are_looked_at(tiny, tmp_path, options, label, good, message):
    model, rows = model_of(tiny, peft="lora", **options), [{**PLAIN, "labels": good}] * 3
    assert (
        finetune(model, rows, output_dir=tmp_path, max_steps=1, progress=False, save_every=None).metrics["train_loss"]
        > 0
    )
    with pytest.raises(InputError, match=f"example 3.*{message}"):
        finetune(model, [*rows, {**PLAIN, "labels": label}], output_dir=tmp_path, max_steps=1, progress=False)


@pytest.mark.parametrize(
    ("task", "labels"),
    [("token_classification", [-100] * 4), ("classification", -100), ("causal_lm", [5, -100, -100, -100])],
)
@pytest.mark.parametrize("holder", ["list", "table"])
def test_data_of_which_no_label_counts_is_refused(tiny, tmp_path, task, labels, holder):
    data = HOLDERS[holder]([{**PLAIN, "labels": labels}] * 2)
    with pytest.raises(InputError, match="no label of any example counts"):
        finetune(model_of(tiny, task, peft="lora"), data, output_dir=tmp_path, max_steps=1, progress=False)


def test_a_collator_is_checked_at_every_batch(tiny, tmp_path):
    def collate(rows):
        batch = {
            "input_ids": torch.tensor([row["input_ids"] for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }
        return batch if rows[0] is rows_[0] else {**batch, "atention_mask": torch.ones(len(rows), 4)}

    rows_ = [{**LABELLED} for _ in range(4)]
    with pytest.raises(InputError, match="what the collator returns for train has the column 'atention_mask'"):
        finetune(
            model_of(tiny, peft="lora"),
            rows_,
            output_dir=tmp_path,
            max_steps=4,
            batch_size=1,
            progress=False,
            collator=collate,
        )


def test_texts_in_some_rows_alone_are_left_out(tiny, tmp_path, caplog):
    rows = [{**LABELLED, "text": "a", "idx": 0}, {**LABELLED, "note": "b"}]
    with caplog.at_level(logging.WARNING, logger="effzoo"):
        finetune(model_of(tiny, peft="lora"), rows, output_dir=tmp_path, max_steps=1, progress=False, save_every=None)
    assert "the columns text, idx are not read" in caplog.text


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.uint32, np.uint64])
def test_integers_of_any_size_are_the_same_example(tiny, holder, dtype):
    model = model_of(tiny).eval()
    small = [
        {"input_ids": np.array([5, 6, 7, 8], dtype), "labels": dtype(1)},
        {"input_ids": np.array([9], dtype), "labels": dtype(2)},
    ]
    plain = [{"input_ids": [5, 6, 7, 8], "labels": 1}, {"input_ids": [9], "labels": 2}]
    data = examples(HOLDERS[holder](small), model, "train")
    for mine, theirs in ((data[0], plain[0]), (data[1], plain[1])):
        assert mine["input_ids"].dtype == mine["labels"].dtype == torch.int64
        assert mine["input_ids"].tolist() == theirs["input_ids"] and mine["labels"].item() == theirs["labels"]
    assert torch.equal(*(effzoo.predict(model, rows, progress=False) for rows in (HOLDERS[holder](small), plain)))


def test_a_number_beyond_63_bits_is_no_negative_one(tiny, tmp_path):
    for row in (
        {"input_ids": np.array([2**63 + 1], np.uint64), "labels": 1},
        # as int64 it would be -100, the label that does not count
        {"input_ids": [5], "labels": np.uint64(2**64 - 100)},
    ):
        with pytest.raises(
            InputError, match="example 1: (input_ids|labels) is .+, with a number that does not fit into 63 bits"
        ):
            finetune(model_of(tiny), [LABELLED, row], output_dir=tmp_path, max_steps=1)


def test_columns_that_have_no_names_are_told(tiny, tmp_path):
    for rows, said in (
        ([{0: [5], 1: 0}], "train has no labels.+Columns: 0, 1"),
        ([{**LABELLED, 5: 3}], "train has the column 5"),
        ([LABELLED, {**LABELLED, 5: 3, "x": [1]}], "has the column 5"),
    ):
        with pytest.raises(InputError, match=said):
            finetune(model_of(tiny), rows, output_dir=tmp_path, max_steps=1)


@pytest.mark.parametrize("task", ["classification", "token_classification"])
def test_labels_of_a_collator_in_uint8_count_as_the_same_numbers(tiny, tmp_path, task):
    """156 in uint8 compares as -100: a batch would be counted short."""

    def collated(dtype):
        def collate(rows):
            batch = {
                "input_ids": torch.tensor([row["input_ids"] for row in rows]),
                "labels": torch.tensor([row["labels"] for row in rows]),
            }
            return {**batch, "labels": batch["labels"].to(dtype)}

        return collate

    rows = [
        {"input_ids": [5, 6], "labels": label if task == "classification" else [label, 3]}
        for label in (156, 2, 200, 156)
    ]
    losses = []
    for dtype in (torch.int64, torch.uint8):
        torch.manual_seed(0)
        model = model_of(tiny, task, num_labels=256, peft="lora", dropout=0.0, attention_dropout=0.0)
        result = finetune(
            model,
            rows,
            output_dir=tmp_path / str(dtype),
            max_steps=2,
            batch_size=2,
            collator=collated(dtype),
            log_every=1,
            progress=False,
        )
        losses.append([entry["loss"] for entry in result.history if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 2
