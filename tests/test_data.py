"""Reading, dividing and tokenising text: tables written by hand, and laws of the split."""

import csv
import json
from collections import Counter

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import effzoo
from effzoo.data import load_text, names, split, tokenise, tokenizer_of
from effzoo.errors import DataError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "dog", "sat", "ran", "on", "a", "mat"]
PETS = [("the cat sat", "cat"), ("a dog ran", "dog"), ("a cat ran", "cat")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def tokenizer():
    """Words of a small vocabulary between [CLS] and [SEP]."""
    plain = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    named = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return PreTrainedTokenizerFast(tokenizer_object=plain, **named)


def write(path, suffix, rows=PETS, columns=("text", "label")):
    file = path / f"pets{suffix}"
    if suffix in (".csv", ".tsv"):
        mark = {".csv": ",", ".tsv": "\t"}[suffix]
        file.write_text("\n".join([mark.join(columns), *(mark.join(map(str, row)) for row in rows)]))
    elif suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows))
    else:
        datasets.Dataset.from_list([dict(zip(columns, row, strict=True)) for row in rows]).to_parquet(file)
    return file


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("columns", [("text", "label"), ("Review", "Sentiment")])
def test_each_format_gives_the_same_table_under_usual_column_names(tmp_path, suffix, columns):
    data = load_text(write(tmp_path, suffix, columns=columns))
    assert data["text"][:] == [text for text, _ in PETS] and data["label"][:] == [0, 1, 0]
    assert names(data) == ["cat", "dog"] and data.column_names == ["text", "label"]


def test_lines_of_a_text_file_have_no_labels(tmp_path):
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    data = load_text(tmp_path / "lines.txt")
    assert data["text"][:] == ["one", "two"] and names(data) is None and data.column_names == ["text"]


def test_a_folder_per_label_names_the_labels(tmp_path):
    for label, text in [("sport", "goal"), ("tech", "chip"), ("tech", "£5".encode("latin-1"))]:
        (tmp_path / label).mkdir(exist_ok=True)
        content = text if isinstance(text, bytes) else text.encode()
        (tmp_path / label / f"{len(content)}.txt").write_bytes(content)
    with pytest.raises(
        DataError, match=r"2\.txt is not utf-8 text \(invalid start byte at byte 0\); encoding=\('utf-8', 'latin-1'\)"
    ):
        load_text(tmp_path)
    data = load_text(tmp_path, encoding=("utf-8", "latin-1"))
    assert (
        data["text"][:] == ["goal", "£5", "chip"] and data["label"][:] == [0, 1, 1] and names(data) == ["sport", "tech"]
    )


def test_files_of_a_folder_are_its_parts(tmp_path):
    write(tmp_path, ".csv", PETS[:1]).rename(tmp_path / "train.csv")
    write(tmp_path, ".csv", PETS[1:]).rename(tmp_path / "test.csv")
    assert len(load_text(tmp_path)) == 1 and len(load_text(tmp_path, part="test")) == 2
    with pytest.raises(DataError, match="no part 'tets'; did you mean 'test'"):
        load_text(tmp_path, part="tets")


@pytest.mark.parametrize(
    ("values", "expected", "known"),
    [
        ([3, 1, 10], [1, 0, 2], ["1", "3", "10"]),
        ([0.5, 1.5, 2.0], [0.5, 1.5, 2.0], None),
        ([True, False, True], [1, 0, 1], ["False", "True"]),
    ],
)
def test_labels_are_numbered_from_zero_and_fractions_stay(tmp_path, values, expected, known):
    data = load_text(write(tmp_path, ".parquet", [("x", value) for value in values]))
    assert data["label"][:] == expected and names(data) == known


def test_pairs_of_texts_are_recognised_or_named(tmp_path):
    file = write(tmp_path, ".jsonl", [("a", "b", "yes", "c")], ("premise", "hypothesis", "label", "other"))
    assert load_text(file)[0] == {"text": "a", "text_pair": "b", "label": 0}
    assert load_text(file, text="other", text_pair="premise")[0] == {"text": "c", "text_pair": "a", "label": 0}


@pytest.mark.parametrize(
    ("rows", "columns", "options", "message"),
    [
        (PETS, ("x", "y"), {}, "none of the columns x, y has a usual name for text; name it with text="),
        (PETS, ("text", "label"), {"label": "lable"}, "no column 'lable'; did you mean 'label'. Columns: text, label"),
        ([("a", 0), (None, 1)], ("text", "label"), {}, "column 'text': row 1 holds nothing, not a text"),
        ([(3, 0)], ("text", "label"), {}, "column 'text': row 0 holds 3, not a text"),
        ([("a", "x"), ("b", None)], ("text", "topic"), {}, "column 'topic': row 1 has no label"),
        ([("a", [1, 2])], ("text", "label"), {}, "column 'label' holds list, labels are names or numbers"),
    ],
)
def test_tables_that_do_not_fit_say_what_is_wrong(tmp_path, rows, columns, options, message):
    with pytest.raises(DataError, match=message.replace("?", r"\?")):
        load_text(write(tmp_path, ".parquet", rows, columns), **options)


def test_sources_that_are_not_there_say_so(tmp_path):
    for source, message in [
        (tmp_path / "no.csv", "no such file or folder"),
        ("nobody/nothing", "no file here, and no data set on the hub"),
    ]:
        with pytest.raises(DataError, match=message):
            load_text(source)
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(DataError, match="is of no kind that can be read"):
        load_text(tmp_path / "a.pdf")
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"broken\.jsonl, line 1: no JSON \(Expecting"):
        load_text(tmp_path / "broken.jsonl")


def labelled(counts):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    table = datasets.Dataset.from_dict({"text": [str(i) for i in range(len(labels))], "label": labels})
    return table.cast_column("label", datasets.ClassLabel(names=[str(i) for i in range(len(counts))]))


@pytest.mark.parametrize("parts", [(0.8, 0.2), (0.7, 0.2, 0.1), {"a": 0.25, "b": 0.25}, {"train": 50, "test": 13}])
@pytest.mark.parametrize("counts", [(50, 50), (83, 11, 6, 3), (1, 99)])
def test_a_split_is_disjoint_stratified_and_fixed(parts, counts):
    data, total = labelled(counts), sum(counts)
    found = split(data, parts, seed=5)
    texts = [text for part in found.values() for text in part["text"]]
    assert len(set(texts)) == len(texts)
    shares = parts.values() if isinstance(parts, dict) else parts
    for part, share in zip(found.values(), shares, strict=True):
        size = share if isinstance(share, int) else share * total
        assert abs(len(part) - size) < 1
        have = Counter(part["label"])
        # 1 of each part's rounding
        assert all(abs(have[label] - count * size / total) < 2 for label, count in enumerate(counts))
    again, other = split(data, parts, seed=5), split(data, parts, seed=6)
    assert all(again[name]["text"][:] == found[name]["text"][:] for name in found)
    assert any(other[name]["text"][:] != found[name]["text"][:] for name in found)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((0.9, 0.2), r"add up to at most 1, got 1\.1"),
        ({"a": 90, "b": 20}, "need 110, there are 100"),
        ({"a": 0.5, "b": 3}, "all fractions .* or all counts"),
        ((0.999, 0.001), "test gets none of the 100 examples at fraction 0.001"),
        ((0.2,) * 4, "4 parts need names"),
        ({"a": -1}, "all fractions"),
    ],
)
def test_parts_that_cannot_be_are_refused(parts, message):
    with pytest.raises(DataError, match=message):
        split(labelled((50, 50)), parts)


def test_tokens_labels_and_cuts(tmp_path, tokenizer, caplog):
    caplog.set_level("INFO", logger="effzoo")
    data = load_text(write(tmp_path, ".csv"))
    found = tokenise(data, tokenizer, 4)
    assert found["input_ids"][:] == [[2, 5, 6, 3], [2, 11, 7, 3], [2, 11, 6, 3]], "cut inside [CLS] ... [SEP]"
    assert found["labels"][:] == [0, 1, 0] and names(found) == ["cat", "dog"]
    assert "3 of 3 texts fill all 4 tokens" in caplog.text
    causal = tokenise(data, tokenizer, 8, task="causal_lm")
    assert causal["labels"][:] == causal["input_ids"][:] == [[2, 5, 6, 8, 3], [2, 11, 7, 9, 3], [2, 11, 6, 9, 3]]
    pairs = tokenise(datasets.Dataset.from_list([{"text": "cat", "text_pair": "dog", "label": 1}]), tokenizer, 8)
    assert pairs[0]["input_ids"] == [2, 6, 3, 7, 3]


def test_masking_follows_devlin(tokenizer):
    """15 % of the words are predicted; of these 80 % are masked, 10 % random, 10 % kept; special tokens never."""
    data = datasets.Dataset.from_dict({"text": ["the cat sat on a mat " * 20] * 200})
    plain = tokenise(data, tokenizer, 200, task="causal_lm")["input_ids"][:]
    found = tokenise(data, tokenizer, 200, task="masked_lm", seed=1)
    kinds = Counter()
    for ids, masked, labels in zip(plain, found["input_ids"], found["labels"], strict=True):
        assert labels[0] == labels[-1] == -100 and sum(label != -100 for label in labels) == 18  # 15 % of 120
        for token, seen, label in zip(ids, masked, labels, strict=True):
            assert label in (-100, token) and (label != -100 or seen == token)
            if label != -100:
                kinds["mask" if seen == 4 else "same" if seen == token else "other"] += 1
    total = 200 * 18  # standard error of a share below 0.007; a random token is itself the mask or the same once in 13
    assert kinds["mask"] / total == pytest.approx(0.8 + 0.1 / 13, abs=0.03) and kinds["same"] / total == pytest.approx(
        0.1 + 0.1 / 13, abs=0.03
    )
    assert found["input_ids"][:] == tokenise(data, tokenizer, 200, task="masked_lm", seed=1)["input_ids"][:]
    assert found["input_ids"][0] != found["input_ids"][1], "each row has masks of its own"


def test_a_tokenizer_comes_from_a_folder_and_fits_its_model(tmp_path, tokenizer, tiny):
    tokenizer.save_pretrained(tmp_path / "words")
    assert tokenizer_of(tmp_path / "words")("a dog")["input_ids"] == [2, 11, 7, 3]
    with pytest.raises(DataError, match="no tokenizer at"):
        tokenizer_of(tmp_path)
    with pytest.raises(DataError, match="has 30522 tokens, the model minilm a vocabulary of 53"):
        tokenizer_of(effzoo.build("minilm", **tiny))


def test_tokenising_the_impossible_is_refused(tokenizer):
    unlabelled = datasets.Dataset.from_dict({"text": ["a"]})
    tokenizer.mask_token = None
    wrong = [
        ({}, "needs the columns text and label; there are text"),
        ({"task": "masked_lm"}, "no mask token"),
        ({"task": "qa"}, "task is one of"),
    ]
    for options, message in wrong:
        with pytest.raises(DataError, match=message):
            tokenise(unlabelled, tokenizer, 8, **options)


def test_from_file_to_finetuned_model(tmp_path, tokenizer, tiny):
    data = load_text(write(tmp_path, ".csv", PETS * 8))
    parts = {name: tokenise(part, tokenizer, 16) for name, part in split(data, (0.75, 0.25)).items()}
    model = effzoo.build("bert", task="classification", peft="lora", **tiny)
    settings = {"output_dir": tmp_path / "run", "epochs": 25, "learning_rate": 2e-2, "progress": False}
    result = effzoo.finetune(model, parts["train"], evaluate=parts["test"], **settings)
    assert result.metrics["eval_accuracy"] == 1.0


GLUE = [
    ("he left .", 1),
    ('" why ? asked Ann .', 0),
    ("it rained .", 1),
    ('stop it , " he said .', 1),
    ('" no .', 0),
    ("go .", 1),
    ('never ! "', 0),
]


@pytest.mark.parametrize(
    "chosen",
    [GLUE, [GLUE[0], GLUE[4], GLUE[5], GLUE[6]], [GLUE[1], GLUE[6]], [('"', 0), ("a", 1)], [("a", 0), ('b "c" d', 1)]],
)
def test_quotation_marks_of_a_file_without_quoting_are_text_and_lose_no_row(tmp_path, chosen):
    file = tmp_path / "q.tsv"
    file.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in chosen))
    table = load_text(file)
    assert list(zip(table["text"], table["label"], strict=True)) == chosen


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_a_quoted_file_reads_as_what_was_written(tmp_path, quoting):
    chosen = [("tab\tin it", 0), ('says "no"', 1), ("two\nlines", 0), ("plain", 1)]
    file = tmp_path / "q.tsv"
    with file.open("w", newline="") as out:
        csv.writer(out, delimiter="\t", quoting=quoting, lineterminator="\n").writerows([("text", "label"), *chosen])
    table = load_text(file, quoting=True)
    assert list(zip(table["text"], table["label"], strict=True)) == chosen


def test_quotation_marks_that_fit_neither_way_are_named_by_row(tmp_path):
    (tmp_path / "q.tsv").write_text('text\tlabel\n"a\tb\tc\t0\n"d" e\t1\n')
    message = r"q\.tsv, line 2: 4 fields, and there are 2 columns \('text, label'\); .* give quoting=True"
    with pytest.raises(DataError, match=message):
        load_text(tmp_path / "q.tsv")


@pytest.mark.parametrize("task", ["classification", "masked_lm"])
def test_several_processes_and_the_cache_give_what_one_process_gives(tmp_path, tokenizer, task, monkeypatch):
    rows = [(" ".join(WORDS[5 + (i * j) % 8] for j in range(1 + i % 9)), ["cat", "dog"][i % 2]) for i in range(50)]
    data = load_text(write(tmp_path, ".csv", rows))
    alone = tokenise(data, tokenizer, 6, task=task, mask_share=0.5, cache=False)
    shared = tokenise(data, tokenizer, 6, task=task, mask_share=0.5, cache=False, num_proc=2)
    assert shared[:] == alone[:] and shared.features == alone.features
    called = []
    calls = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, *a, **k: (called.append(a), calls(self, *a, **k))[1])
    first = tokenise(data, tokenizer, 6, task=task, mask_share=0.5)
    read = len(called)
    again = tokenise(data, tokenizer, 6, task=task, mask_share=0.5)
    assert first[:] == again[:] == alone[:] and len(called) == read + 1, "the second time all is read from the cache"
    other = tokenise(data, tokenizer, 5, task=task, mask_share=0.5)
    assert other[:] != alone[:] and len(called) > read + 2


@pytest.mark.parametrize("wrong", [0, -1, 1.5])
def test_processes_are_counted_from_one(tmp_path, tokenizer, wrong):
    with pytest.raises(effzoo.errors.EffzooError, match="num_proc"):
        tokenise(load_text(write(tmp_path, ".csv")), tokenizer, 6, num_proc=wrong)
