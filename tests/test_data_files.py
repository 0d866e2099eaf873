"""Files and folders of texts: each format as it is written by hand, and broken ones with what is said of them."""

import csv
import gzip
import json

import datasets
import pytest

import effzoo
from effzoo.data import load_text, names, parts, split
from effzoo.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    datasets.disable_progress_bars()


def table(file):
    data = load_text(file)
    return list(zip(data["text"], data["label"], strict=True))


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_tsv_has_as_many_rows_as_lines_whatever_marks_stand_in_it(tmp_path, ending):
    texts = ['"', '""', 'a "b" c', '"open', 'shut"', "'", "a\x0bb", "c\u2028d", "e\x85f", '"whole"', " ", "x,y"]
    file = tmp_path / "q.tsv"
    lines = ["sentence\tlabel", *(f"{text}\t{number % 2}" for number, text in enumerate(texts))]
    file.write_bytes(ending.join([*lines, ""]).encode())
    data = load_text(file)
    assert data["text"][:] == texts and data["label"][:] == [number % 2 for number in range(len(texts))]


def test_quoted_fields_of_a_tsv_are_told(tmp_path, caplog):
    (tmp_path / "q.tsv").write_text('text\tlabel\n"says ""no"""\t1\nplain\t0\n')
    assert table(tmp_path / "q.tsv")[0] == ('"says ""no"""', 1)
    assert "1 fields stand in quotation marks with doubled ones inside, which are all taken as" in caplog.text
    (tmp_path / "q.tsv").write_text('"text"\t"label"\n"a"\t"1"\n')
    with pytest.raises(DataError, match="names in the first line stand in quotation marks; give quoting=True"):
        load_text(tmp_path / "q.tsv")


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_a_csv_is_read_as_it_was_written(tmp_path, quoting, caplog):
    chosen = [("comma, in it", 0), ('says "no"', 1), ("two\nlines", 0), ("plain", 1), ("x" * 200_000, 0), ("NA", 1)]
    file = tmp_path / "q.csv"
    with file.open("w", newline="") as out:
        csv.writer(out, quoting=quoting).writerows([("text", "label"), *chosen])
    assert table(file) == chosen
    assert "1 rows go over several lines, the longest from line 4 to line 5" in caplog.text
    assert csv.field_size_limit() == 131072


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text,label\na,1\n"b,0\nc,1\nd,0\n', r"q\.csv, line 3: a quotation mark that begins a field is never closed"),
        (
            'text,label\n"why? asked Ann.,0\nit rained.,1\n"no.,0\n',
            r"""q\.csv, line 4: 'no\.,0' follows a quotation mark that ends a field, which began in line 2""",
        ),
        ('text,label\n"two\nlines","1"x\n', r"line 3: 'x' follows .* which began in line 3"),
        ("text,label\na,1\nb,c,0\n", r"q\.csv, line 3: 3 fields, and there are 2 columns .*holds ',' stands in quot"),
        ("text,label\na,1\n\nb\n", r"q\.csv, line 4: 1 field, and there are 2 columns"),
        ("text;label\na;1\nb, c;0\n", r"line 3: 2 fields, and there are 1 column .* give separator=';'"),
        ("text,label\n", r"q\.csv is empty"),
        ("", r"q\.csv is empty"),
        ("text,text\na,1\n", "names the column 'text' twice"),
        ("text,label\na,1\nb,\n", "column 'label': row 1 has no label"),
    ],
)
def test_a_broken_csv_names_the_line(tmp_path, content, message):
    (tmp_path / "q.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        load_text(tmp_path / "q.csv")


def test_separators_and_marks_can_be_given(tmp_path):
    (tmp_path / "t.csv").write_text("text\tlabel\na\tx\n")
    with pytest.raises(DataError, match=r"if fields are separated by '\\t', give separator='\\t' \(--separator\)"):
        load_text(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("text, label\na,x\n")
    assert load_text(tmp_path / "t.csv").column_names == ["text", "label"]
    (tmp_path / "q.csv").write_text("text;label\na, b;1\n'c;0\n")
    data = load_text(tmp_path / "q.csv", separator=";")
    assert data["text"][:] == ["a, b", "'c"]
    (tmp_path / "q.csv").write_text('text,label\n"a,1\n')
    assert load_text(tmp_path / "q.csv", quoting=False)["text"][:] == ['"a']
    with pytest.raises(DataError, match="separator is one character, got ', '"):
        load_text(tmp_path / "q.csv", separator=", ")


COLA = 'gj04\t1\t\tOur friends won\'t buy this analysis.\ngj04\t0\t*\tOne more "pseudo" one.\n'


def test_a_file_without_names_of_columns_is_told_and_takes_them(tmp_path):
    file = tmp_path / "train.tsv"
    file.write_text(COLA)
    with pytest.raises(
        DataError,
        match=r"looks like data \('1'\): .* 4 names, as in columns=\('a', 'b', 'c', 'd'\) or --columns a,b,c,d",
    ):
        load_text(file)
    data = load_text(file, columns=("source", "label", "note", "sentence"))
    assert data["text"][:] == ["Our friends won't buy this analysis.", 'One more "pseudo" one.'] and names(data) == [
        "0",
        "1",
    ]
    assert data["label"][:] == [1, 0]
    with pytest.raises(DataError, match="line 1: 4 fields, and there are 3 columns"):
        load_text(file, columns=("source", "label", "sentence"))
    with pytest.raises(
        DataError, match="columns, for .* names the column 'a' twice|columns names the column 'a' twice"
    ):
        load_text(file, columns=("a", "a", "b", "c"))


def test_the_columns_of_mnli_and_mrpc_are_found(tmp_path):
    head = "index\tpromptID\tpairID\tgenre\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label"
    (tmp_path / "m.tsv").write_text(f"{head}\n0\t1\t2\tfiction\t(a)\t(b)\tone\ttwo\tneutral\tentailment\n")
    assert load_text(tmp_path / "m.tsv")[0] == {"text": "one", "text_pair": "two", "label": 0}
    assert names(load_text(tmp_path / "m.tsv")) == ["entailment"]
    (tmp_path / "msr.txt").write_text(
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe "left".\tHe went.\n'
    )
    data = load_text(tmp_path / "msr.txt", format="tsv")
    assert data[0] == {"text": 'He "left".', "text_pair": "He went.", "label": 0} and names(data) == ["1"]
    with pytest.raises(DataError, match="format is one of .*, got 'tvs'; did you mean 'tsv'"):
        load_text(tmp_path / "msr.txt", format="tvs")


@pytest.mark.parametrize(
    ("written", "kind", "expected", "known"),
    [
        (["1", "0", "10"], None, [1, 0, 2], ["0", "1", "10"]),
        (["3.80", "5.000", "0"], None, [3.8, 5.0, 0.0], None),
        (["1", "4", "2"], "numbers", [1.0, 4.0, 2.0], None),
        (["007", "7", "07"], None, [7.0, 7.0, 7.0], None),
        (["nan", "yes", "None"], None, [1, 2, 0], ["None", "nan", "yes"]),
        (["0.5", "1.5", "0.5"], "classes", [0, 1, 0], ["0.5", "1.5"]),
    ],
)
def test_labels_in_words_are_names_or_numbers(tmp_path, written, kind, expected, known):
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"123,{value}\n" for value in written))
    data = load_text(tmp_path / "a.csv", label_kind=kind)
    assert data["label"][:] == expected and names(data) == known and data["text"][:] == ["123"] * 3
    if kind == "numbers":
        (tmp_path / "a.csv").write_text("text,label\na,1\nb,many\n")
        with pytest.raises(DataError, match="row 1 holds 'many', and label_kind is 'numbers'"):
            load_text(tmp_path / "a.csv", label_kind="numbers")


def test_several_labels_are_lists_of_names(tmp_path):
    rows = [{"text": "a", "label": ["sport", "war"]}, {"text": "b", "label": []}, {"text": "c", "label": ["art"]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.csv").write_text("text,label\na,sport|war\nb,\nc,art\n")
    for data in (
        load_text(tmp_path / "a.jsonl", label_kind="several"), load_text(tmp_path / "a.csv", label_separator="|")
    ):  # fmt: skip
        assert names(data) == ["art", "sport", "war"] and data["label"][:] == [[1, 2], [], [0]]
    assert len(split(data, {"train": 2, "test": 1})["train"]) == 2
    with pytest.raises(DataError, match="holds list, labels are names or numbers; .* label_kind='several'"):
        load_text(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"row 0 holds 'sport\|war', and label_kind='several' needs a list of names"):
        load_text(tmp_path / "a.csv", label_kind="several")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": ["x", "x"]}')
    with pytest.raises(DataError, match="row 0 names 'x' twice"):
        load_text(tmp_path / "a.jsonl", label_kind="several")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n\n{"text": "b"\n', r"a\.jsonl, line 3: no JSON \("),
        ('{"text": "a"}\n[1]\n', r'a\.jsonl, line 2: \[1\] is no object, such as \{"text": "...", "label": 1\}'),
        (
            '{"text": "a", "label": 1}\n{"text": "b", "label": "x"}\n',
            "column 'label' holds int in row 0 and str in row 1",
        ),
        ('{"text": "a"}\n{"txt": "b"}\n', "column 'text': row 1 holds nothing, not a text"),
        ('{"text": "a", "label": 1}\n{"text": "b"}\n', "column 'label': row 1 has no label"),
    ],
)
def test_broken_json_lines_name_the_line(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        load_text(tmp_path / "a.jsonl")


def test_dates_and_words_like_missing_stay_texts(tmp_path):
    texts = ["2020-01-01 00:00:00", "null", "NA", "", "123"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert load_text(tmp_path / "a.jsonl")["text"][:] == texts
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    assert load_text(tmp_path / "a.json")["text"][:] == texts
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert load_text(tmp_path / "a.jsonl.gz")["text"][:] == texts
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"b\.jsonl\.gz cannot be read: Not a gzipped file"):
        load_text(tmp_path / "b.jsonl.gz")
    (tmp_path / "c.json").write_text("[1, 2]")
    with pytest.raises(DataError, match=r"c\.json holds no list of objects"):
        load_text(tmp_path / "c.json")
    (tmp_path / "d.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"d\.parquet cannot be read"):
        load_text(tmp_path / "d.parquet")


def test_plain_text_is_lines_paragraphs_or_the_file(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n\n \nthree\n")
    assert load_text(file)["text"][:] == ["one", "two", "three"]
    assert load_text(file, by="paragraph")["text"][:] == ["one\ntwo", "three"]
    assert load_text(file, by="file")["text"][:] == ["one\ntwo\n\n \nthree\n"]
    with pytest.raises(effzoo.EffzooError, match="'line', 'paragraph' or 'file'|by"):
        load_text(file, by="page")


ROWS = {"train": "text,label\na,x\nb,y\n", "dev": "text,label\nc,x\n", "test": "text,label\nd,y\ne,x\n"}


@pytest.mark.parametrize(
    "called",
    [
        {"train": "train.csv", "dev": "dev.csv", "test": "test.csv"},
        {"train": "train.csv", "dev": "validation.csv", "test": "test.csv"},
        {"train": "news_train.csv", "dev": "news.valid.csv", "test": "news-test.csv"},
        {"train": "Train.csv", "dev": "VAL.csv", "test": "test.csv"},
        {"train": "train-00000-of-00001.csv", "dev": "dev-00000-of-00001.csv", "test": "test-00000-of-00001.csv"},
        {"train": "train/a.csv", "dev": "dev/b.csv", "test": "test/c.csv"},
    ],
)
def test_a_folder_has_parts_under_their_usual_names(tmp_path, called):
    for part, name in called.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(ROWS[part])
    (tmp_path / "README.md").write_text("# mine")
    assert sorted(parts(tmp_path)) == ["test", "train", "validation"]
    assert load_text(tmp_path)["text"][:] == ["a", "b"]
    assert load_text(tmp_path, part="dev")["text"][:] == load_text(tmp_path, part="validation")["text"][:] == ["c"]
    assert load_text(tmp_path, part="test")["text"][:] == ["d", "e"]


def test_folders_of_shards_of_kinds_and_of_two_devs(tmp_path):
    for number, rows in enumerate((ROWS["train"], ROWS["test"])):
        (tmp_path / f"train-0000{number}-of-00002.csv").write_text(rows)
    assert load_text(tmp_path)["text"][:] == ["a", "b", "d", "e"]
    for name in ("dev_matched", "dev_mismatched"):
        (tmp_path / f"{name}.csv").write_text(ROWS["dev"])
    assert sorted(parts(tmp_path)) == ["dev_matched", "dev_mismatched", "train"]
    with pytest.raises(DataError, match="no part 'dev'; did you mean 'dev_matched'|no part 'validation'"):
        load_text(tmp_path, part="dev")
    other = tmp_path / "other"
    other.mkdir()
    (other / "train.csv").write_text(ROWS["train"])
    (other / "test.jsonl").write_text('{"text": "z", "label": "x"}')
    assert load_text(other, part="test")["text"][:] == ["z"]
    (other / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"files of several kinds .* names of some are not .* \(notes\)"):
        load_text(other)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="has no files that can be read"):
        load_text(empty)


def test_folders_of_labels_within_parts_as_in_imdb(tmp_path):
    for part, label, name in (("train", "neg", "1"), ("train", "pos", "2"), ("test", "pos", "3")):
        (tmp_path / part / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / part / label / f"{name}.txt").write_text(f"review {name}")
    data = load_text(tmp_path)
    assert data["text"][:] == ["review 1", "review 2"] and names(data) == ["neg", "pos"]
    assert load_text(tmp_path, part="test")["text"][:] == ["review 3"]


def test_subsets_are_those_that_the_card_of_a_folder_names(tmp_path):
    for name in ("first", "second"):
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{name},1\n")
        (tmp_path / f"{name}_dev.csv").write_text(f"text,label\n{name} dev,1\n")
    entries = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}.csv\n"
        f"  - split: dev\n    path: {name}_dev.csv\n"
        for name in ("first", "second")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{entries}---\n# mine\n")
    assert load_text(tmp_path, subset="second")["text"][:] == ["second"]
    assert load_text(tmp_path, subset="first", part="validation")["text"][:] == ["first dev"]
    assert parts(tmp_path, subset="first") == ["train", "validation"]
    with pytest.raises(DataError, match="Config name is missing|pick one|subset"):
        load_text(tmp_path)
    with pytest.raises(DataError, match="third"):
        load_text(tmp_path, subset="third")
    with pytest.raises(DataError, match="is a file, and subset='x'"):
        load_text(tmp_path / "first.csv", subset="x")


def test_what_datasets_saved_is_read(tmp_path):
    whole = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": [name], "label": ["x"]}) for name in ("train", "test")}
    )
    whole.save_to_disk(tmp_path / "whole")
    assert load_text(tmp_path / "whole", part="test")["text"][:] == ["test"]
    whole["train"].save_to_disk(tmp_path / "one")
    assert load_text(tmp_path / "one")["text"][:] == ["train"]


def test_data_is_an_attribute_without_a_further_import():
    import subprocess
    import sys

    code = "import effzoo; assert callable(effzoo.data.load_text) and callable(effzoo.data.tokenise)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_marks_of_labels_are_not_taken_for_their_names(tmp_path):
    rows = [{"text": "a", "label": [0, 1]}, {"text": "b", "label": [1.0, 0.0]}, {"text": "c", "label": [0, 0]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="all rows have a 0 or 1 for each label; give lists of the labels that hold"):
        load_text(tmp_path / "a.jsonl", label_kind="several")
    rows = [{"text": "a", "label": [0]}, {"text": "b", "label": [1]}, {"text": "c", "label": []}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_text(tmp_path / "b.jsonl", label_kind="several")["label"][:] == [[0], [1], []]
    (tmp_path / "c.jsonl").write_text('{"text": "a", "label": [0, 1]}\n{"text": "b", "label": [2, 0]}\n')
    assert load_text(tmp_path / "c.jsonl", label_kind="several")["label"][:] == [[0, 1], [2, 0]]


def test_labels_that_differ_by_spaces_and_one_column_for_both_texts_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,x\nb, x\nc,y\n")
    with pytest.raises(DataError, match="the labels ' x' and 'x' differ by spaces around them alone"):
        load_text(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("one,two,label\na,b,x\n")
    with pytest.raises(DataError, match="text and text_pair are both the column 'one'; name two"):
        load_text(tmp_path / "b.csv", text="one", text_pair="one")


def test_a_file_in_utf_16_says_so(tmp_path):
    (tmp_path / "a.csv").write_bytes("text,label\ncaf\u00e9,x\nb,y\n".encode("utf-16"))
    with pytest.raises(DataError, match="it begins as UTF-16 does: encoding='utf-16'"):
        load_text(tmp_path / "a.csv")
    assert load_text(tmp_path / "a.csv", encoding="utf-16")["text"][0] == "caf\u00e9"
    (tmp_path / "b.csv").write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match="it holds zero bytes, as no text does"):
        load_text(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("text,label\n")
    with pytest.raises(DataError, match="is empty: no row in 1 lines"):
        load_text(tmp_path / "c.csv")
