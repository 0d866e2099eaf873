"""Text data: read it (`load_text`), divide it (`split`), turn it into tokens (`tokenise`, with `tokenizer_of`).

The tables are `datasets.Dataset`, which is imported when a function runs: `import effzoo` does not import it.
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from effzoo.annotations import Count, ProperShare, Seed, check_arguments
from effzoo.architectures import Config, Perceiver, PerceiverConfig, Transformer
from effzoo.checked import IGNORED
from effzoo.errors import DataError, did_you_mean, listing, shown

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
# usual names of columns: of two texts that belong together, of a text, of a label
PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("text1", "text2"),
)  # fmt: skip
TEXTS = (
    "text", "sentence", "content", "document", "review", "article", "body", "description", "comment", "tweet",
    "headline", "title",
)  # fmt: skip
LABELS = (
    "label", "labels", "category", "class", "target", "topic", "sentiment", "intent", "coarse_label", "fine_label",
)  # fmt: skip
TASKS = ("classification", "causal_lm", "masked_lm")


def load_text(
    source: str | Path,
    *,
    part: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    subset: str | None = None,
    encoding: str | Sequence[str] = "utf-8",
) -> Dataset:
    """A table of texts: `text`, perhaps `text_pair`, and, where the source has labels, `label`.

    Labels become a `datasets.ClassLabel`, integers whose names `names(data)` lists, sorted (numbers by value). Labels
    that are numbers with a fraction stay numbers, for regression.

    source: a .csv, .tsv, .jsonl, .json, .parquet or .txt file (one text a line, no labels); a folder of such files,
        or of one folder per label with .txt files in it; or a data set on the hub.
    part: of a source with several parts (train, test, ...).
    text, text_pair, label: names of columns; None takes a usual name that is there.
    subset: of a hub data set ("sst2" of "glue").
    encoding: of text files; in a folder of text files each is read by the first of several that fits.

    Raises DataError with the columns, the parts or the row that does not fit.
    """
    path, encodings = Path(source), (encoding,) if isinstance(encoding, str) else tuple(encoding)
    if _is_folder_of_folders(path):
        table = _by_folder(path, encodings)
    else:
        table = _one_part(_read(source, path, subset, encodings), part, source)
    first, second = _text_columns(table, text, text_pair)
    target = _pick(table, label, LABELS, "label", required=False)
    if target is not None and target in (first, second):
        raise DataError(
            f"column {target!r} is read as text and named as the label; choose another with label= or text="
        )
    columns = {first: "text", second: "text_pair", target: "label"}
    renamed = {name: new for name, new in columns.items() if name and name != new}
    table = table.select_columns([name for name in columns if name]).rename_columns(renamed)
    for name in ("text", "text_pair") if second else ("text",):
        _check_texts(table, name, columns)
    return table if target is None else _with_names(table, target)


def names(data: Dataset) -> list[str] | None:
    """The names of the labels, by number; None for a table without labels or with numbers to regress."""
    _check_table(data)
    feature = data.features.get("label", data.features.get("labels"))
    labels: list[str] | None = getattr(feature, "names", None)
    return labels


def split(
    data: Dataset, parts: Mapping[str, float | int] | Sequence[float | int] = (0.8, 0.1, 0.1), *, seed: Seed = 0
) -> dict[str, Dataset]:
    """Divide a table at random, with the same share of each label in every part, up to one example.

    parts: fractions (floats, at most 1 together) or counts (integers) by name; a sequence of two is train and test, one
        of three is train, validation and test. What they leave over is in no part.
    seed: of the division; the same data and seed give the same parts.

    Raises DataError.
    """
    _check_table(data)
    if not isinstance(parts, Mapping):
        known: dict[int, tuple[str, ...]] = {2: ("train", "test"), 3: ("train", "validation", "test")}
        if len(parts) not in known:
            raise DataError(f"{len(parts)} parts need names; give a mapping, such as {{'train': 0.9, 'test': 0.1}}")
        parts = dict(zip(known[len(parts)], parts, strict=True))
    sizes = _sizes(parts, len(data))
    random = np.random.RandomState(seed)  # whose stream numpy keeps the same in every version
    labels = np.asarray(data["label"] if names(data) is not None else np.zeros(len(data), dtype=int))
    waiting = {value: list(random.permutation(np.flatnonzero(labels == value))) for value in np.unique(labels)}
    tables = {}
    for name, size in sizes.items():
        left = [len(rows) for rows in waiting.values()]
        shares = _largest_remainders([count * size / max(sum(left), 1) for count in left], size)
        chosen = []
        for rows, share in zip(waiting.values(), shares, strict=True):
            chosen += [rows.pop() for _ in range(share)]
        tables[name] = data.select([int(row) for row in random.permutation(chosen)])
    return tables


def tokenise(
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: Count,
    *,
    task: str = "classification",
    mask_share: ProperShare = 0.15,
    seed: Seed = 0,
) -> Dataset:
    """`text` (and `text_pair`) as input_ids, attention_mask, perhaps token_type_ids, and labels, for `effzoo.finetune`.

    Nothing is padded: that is done batch by batch.

    data: a table as `load_text` gives it.
    tokenizer: of transformers, as `tokenizer_of` gives it.
    max_length: in tokens; longer texts are cut, and how many is logged.
    task: "classification" keeps the label; "causal_lm" copies the tokens to labels, which the model shifts; "masked_lm"
        predicts some tokens: 80 % of them are replaced by the mask, 10 % by any token, and 10 % stay.
    mask_share: of the tokens that "masked_lm" predicts.
    seed: of these tokens.

    Raises DataError.

    Masking: Devlin et al. 2019, BERT, arXiv:1810.04805, section 3.1.
    """
    import pyarrow.compute

    _check_table(data)
    if not callable(tokenizer) or not hasattr(tokenizer, "mask_token_id"):
        raise DataError(
            f"a tokenizer is one of transformers, as tokenizer_of gives, got {shown(tokenizer)} "
            f"({type(tokenizer).__name__})"
        )
    if task not in TASKS:
        raise DataError(f"task is one of {listing(TASKS)}, got {task!r}{did_you_mean(task, TASKS)}")
    if "text" not in data.column_names or (task == "classification" and "label" not in data.column_names):
        raise DataError(
            f"task {task!r} needs the columns text{' and label' * (task == 'classification')}; there are "
            f"{listing(data.column_names)}"
        )
    if task == "masked_lm" and tokenizer.mask_token_id is None:
        raise DataError("this tokenizer has no mask token, which task='masked_lm' needs; try task='causal_lm'")
    if max_length < 1 or not 0 < mask_share < 1:
        raise DataError(f"max_length is at least 1 and mask_share between 0 and 1, got {max_length} and {mask_share}")

    def encode(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        pairs = (batch["text_pair"],) if "text_pair" in batch else ()
        tokens = dict(tokenizer(batch["text"], *pairs, truncation=True, max_length=max_length, padding=False))
        if task == "classification":
            return {**tokens, "labels": batch["label"]}
        if task == "causal_lm":
            return {**tokens, "labels": [list(ids) for ids in tokens["input_ids"]]}
        streams = [np.random.RandomState((seed * 1_000_003 + row) % 2**32) for row in rows]
        texts = zip(tokens["input_ids"], streams, strict=True)
        masked = [_mask(ids, tokenizer, mask_share, random) for ids, random in texts]
        return {**tokens, "input_ids": [ids for ids, _ in masked], "labels": [labels for _, labels in masked]}

    table = data.map(
        encode, batched=True, with_indices=True, remove_columns=data.column_names, load_from_cache_file=False,
        desc="Tokenising",
    )  # fmt: skip
    if task == "classification":
        table = table.cast_column("labels", data.features["label"])
    full = 0
    for part in table.with_format("arrow").iter(batch_size=10_000):
        full += pyarrow.compute.list_value_length(part["input_ids"]).to_pylist().count(max_length)
    if full:
        message = "%d of %d texts fill all %d tokens; what is longer was cut"
        logging.getLogger("effzoo").info(message, full, len(table), max_length)
    return table


def tokenizer_of(source: str | Path | Config | Transformer) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, of a hub id, or of a zoo model's pretrained weights. Raises DataError."""
    from transformers import AutoTokenizer

    from effzoo import convert

    config = source.config if isinstance(source, Transformer) else source
    if isinstance(config, (Perceiver, PerceiverConfig)):
        raise DataError(
            "a Perceiver reads bytes or arrays and has no tokenizer in the zoo; give the folder or hub id of the one "
            "its text was trained with"
        )
    place = convert.source_of(config) if isinstance(config, Config) else str(config)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # of many kinds: no such folder, no network, no such repository, a broken file
        raise DataError(
            f"no tokenizer at {place!r}: {_first_line(error)}; give a folder with tokenizer.json, or a hub id"
        ) from error
    if isinstance(config, Config) and len(tokenizer) > config.vocab:
        raise DataError(
            f"the tokenizer at {place!r} has {len(tokenizer)} tokens, the model {config.name} a "
            f"vocabulary of {config.vocab}"
        )
    return tokenizer


def _check_table(data: object) -> None:
    from datasets import Dataset

    if not isinstance(data, Dataset):
        raise DataError(f"data are a datasets.Dataset, as load_text gives, got {shown(data)} ({type(data).__name__})")


def _is_folder_of_folders(path: Path) -> bool:
    return os.path.isdir(path) and any(inner.is_dir() and _texts(inner) for inner in path.iterdir())


def _texts(folder: Path) -> list[Path]:
    return [file for file in folder.glob("*.txt") if file.is_file()]


def _by_folder(path: Path, encodings: Sequence[str]) -> Dataset:
    """One row per .txt file, in the order of the names; the folder's name is the label."""
    from datasets import Dataset

    files = sorted(file for inner in path.iterdir() if inner.is_dir() for file in _texts(inner))
    return Dataset.from_dict(
        {"text": [_decoded(file, encodings) for file in files], "label": [file.parent.name for file in files]}
    )


def _decoded(file: Path, encodings: Sequence[str]) -> str:
    for encoding in encodings:
        try:
            return file.read_text(encoding=encoding)
        except UnicodeDecodeError as error:
            problem = f"{error.reason} at byte {error.start}"
        except LookupError:
            raise DataError(f"there is no encoding {encoding!r}; try 'utf-8' or 'latin-1'") from None
    raise DataError(
        f"{file} is not {listing(encodings)} text ({problem}); encoding=('utf-8', 'latin-1') reads such "
        "files as Latin-1"
    )


def _read(source: str | Path, path: Path, subset: str | None, encodings: Sequence[str]) -> Any:
    """What `datasets.load_dataset` finds: a mapping from parts to tables."""
    from datasets import load_dataset

    arguments: dict[str, Any] = {}
    if os.path.exists(path):
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix in FORMATS and file.is_file())
        kinds = sorted({file.suffix for file in files})
        if len(kinds) != 1 or kinds[0] not in FORMATS:
            problem = "has files of several kinds" if len(kinds) > 1 else "is of no kind that can be read"
            raise DataError(f"{path} {problem} ({listing(kinds)}); give {listing(FORMATS)}, or a folder of one of them")
        parts = {file.stem: str(file) for file in files} if len(files) > 1 else {"train": str(files[0])}
        if len(encodings) > 1 and kinds != [".parquet"]:
            raise DataError(
                f"several encodings are for folders of text files, {path} has one; got {listing(encodings)}"
            )
        arguments = {"data_files": parts}
        if kinds == [".tsv"]:
            arguments |= {"sep": "\t", **({} if _quoted(files, encodings[0]) else {"quoting": csv.QUOTE_NONE})}
        arguments |= {"encoding": encodings[0]} if kinds != [".parquet"] else {}
    elif path.suffix in FORMATS or path.is_absolute() or str(source).startswith("."):
        raise DataError(f"no such file or folder: {path}")
    try:
        return load_dataset(FORMATS[kinds[0]], **arguments) if arguments else load_dataset(str(source), subset)
    except Exception as error:  # of many kinds: no such data set, no network, a broken file
        where = f"{str(source)!r} is no file here, and no data set on the hub that can be read now"
        where = f"{path} cannot be read" if arguments else where
        raise DataError(f"{where}: {_first_line(error)}") from error


def _quoted(files: Sequence[Path], encoding: str) -> bool:
    """Whether quotation marks in tab-separated files stand around fields (spreadsheets), or are text (GLUE).

    The reading is taken in which all rows have the same number of fields. Where both do: text if the other would lose
    lines, else around fields.

    Raises DataError where neither does, and for files that need different readings.
    """
    readings: dict[bool, Path] = {}
    for file in files:
        text = _decoded(file, (encoding,))
        if not any(line.startswith('"') or '\t"' in line for line in text.splitlines()):
            continue
        as_text = [line.split("\t") for line in text.splitlines() if line]
        try:
            as_quotes = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True) if row]
        except csv.Error:
            as_quotes = []
        fits = {False: len({len(row) for row in as_text}) == 1, True: len({len(row) for row in as_quotes}) == 1}
        if not any(fits.values()):
            wrong = next(number for number, row in enumerate(as_text, 1) if len(row) != len(as_text[0]))
            raise DataError(
                f"{file}: row {wrong} has {len(as_text[wrong - 1])} fields, the head has {len(as_text[0])}; "
                "quotation marks may be unpaired"
            )
        quoted = fits[True] and not (fits[False] and len(as_quotes) < len(as_text))
        readings[quoted] = file
        how = "stand around fields and are taken off" if quoted else "are text"
        logging.getLogger("effzoo").info("%s: quotation marks %s", file, how)
    if len(readings) == 2:
        raise DataError(
            f"quotation marks stand around fields in {readings[True]} and are text in {readings[False]}; "
            "read them one by one"
        )
    return True in readings


def _one_part(parts: Any, wanted: str | None, source: str | Path) -> Dataset:
    if wanted is None and len(parts) > 1 and "train" not in parts:
        raise DataError(f"{source} has the parts {listing(parts)}; choose one with part=")
    name = wanted or ("train" if "train" in parts else next(iter(parts)))
    if name not in parts:
        raise DataError(f"{source} has no part {name!r}{did_you_mean(name, parts)} Parts: {listing(parts)}.")
    table: Dataset = parts[name]
    if len(table) == 0:
        raise DataError(f"{source} is empty")
    return table


def _text_columns(table: Dataset, text: str | None, text_pair: str | None) -> tuple[str, str | None]:
    lower = {name.lower(): name for name in table.column_names}
    if text is None and text_pair is None:
        for first, second in PAIRS:
            if first in lower and second in lower:
                return lower[first], lower[second]
    chosen = _pick(table, text, TEXTS, "text")
    assert chosen is not None
    return chosen, None if text_pair is None else _pick(table, text_pair, (), "text_pair")


def _pick(table: Dataset, given: str | None, usual: Sequence[str], argument: str, required: bool = True) -> str | None:
    columns = table.column_names
    if given is not None:
        if given not in columns:
            raise DataError(f"there is no column {given!r}{did_you_mean(given, columns)} Columns: {listing(columns)}.")
        return given
    lower = {name.lower(): name for name in columns}
    column = next((lower[name] for name in usual if name in lower), None)
    if column is None and required:
        raise DataError(
            f"none of the columns {listing(columns)} has a usual name for {argument}; name it with {argument}="
        )
    return column


def _check_texts(table: Dataset, name: str, columns: Mapping[str | None, str]) -> None:
    original = next(key for key, value in columns.items() if value == name)
    for row, value in enumerate(table[name]):
        if not isinstance(value, str):
            raise DataError(
                f"column {original!r}: row {row} holds {'nothing' if value is None else repr(value)}, not a text"
            )


def _with_names(table: Dataset, original: str) -> Dataset:
    from datasets import ClassLabel

    values, feature = list(table["label"]), table.features["label"]
    for row, value in enumerate(values):
        if value is None or value != value or (isinstance(feature, ClassLabel) and value < 0):
            hint = "; a part without labels cannot be trained on" if value is not None else ""
            raise DataError(f"column {original!r}: row {row} has no label ({value}){hint}")
    if isinstance(feature, ClassLabel) or isinstance(values[0], float):
        return table
    if not isinstance(values[0], (str, int)):
        raise DataError(
            f"column {original!r} holds {type(values[0]).__name__}, labels are names or numbers; choose "
            "another with label="
        )
    known = sorted(set(values))
    number = {value: index for index, value in enumerate(known)}
    feature = ClassLabel(names=[str(value) for value in known])
    return table.remove_columns("label").add_column("label", [number[value] for value in values], feature=feature)


def _sizes(parts: Mapping[str, float | int], total: int) -> dict[str, int]:
    values = list(parts.values())
    kinds = {type(value) for value in values}
    if kinds not in ({int}, {float}) or min(values) <= 0:
        raise DataError(f"parts are all fractions (floats above 0) or all counts (integers above 0), got {dict(parts)}")
    if isinstance(values[0], int):
        if sum(values) > total:
            raise DataError(f"parts of {listing(map(str, values))} examples need {sum(values)}, there are {total}")
        return {name: int(size) for name, size in parts.items()}
    if sum(values) > 1 + 1e-9:
        raise DataError(f"fractions add up to at most 1, got {sum(values):.4g} from {dict(parts)}")
    sizes = dict(zip(parts, _largest_remainders([v * total for v in values], round(sum(values) * total)), strict=True))
    for name, size in sizes.items():
        if size == 0:
            raise DataError(
                f"{name} gets none of the {total} examples at fraction {parts[name]}; give a larger "
                "fraction or more data"
            )
    return sizes


def _largest_remainders(shares: list[float], total: int) -> list[int]:
    """Integers that add up to total, as the shares do, each less than 1 from its share (Hamilton's method)."""
    whole = [int(share + 1e-9) for share in shares]
    for index in sorted(range(len(shares)), key=lambda i: whole[i] - shares[i])[: total - sum(whole)]:
        whole[index] += 1
    return whole


def _mask(
    ids: list[int], tokenizer: PreTrainedTokenizerBase, share: float, random: np.random.RandomState
) -> tuple[list[int], list[int]]:
    """Masked ids, and labels: -100 except for the tokens to predict, at least one where not all are special."""
    special = set(tokenizer.all_special_ids)
    ordinary = [at for at, token in enumerate(ids) if token not in special]
    masked, labels = list(ids), [IGNORED] * len(ids)
    if ordinary:
        for at in random.choice(ordinary, size=max(1, round(share * len(ordinary))), replace=False):
            labels[at], lot = ids[at], random.rand()
            if lot < 0.9:
                masked[at] = tokenizer.mask_token_id if lot < 0.8 else int(random.randint(len(tokenizer)))
    return masked, labels


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


__all__ = ["load_text", "names", "split", "tokenise", "tokenizer_of"]

check_arguments(globals())
