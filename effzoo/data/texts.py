"""Texts with labels: `load_text`, `parts` and `names`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from effzoo.data.files import Reading
from effzoo.data.sources import chosen, opened
from effzoo.errors import DataError, did_you_mean, listing, shown

if TYPE_CHECKING:
    from datasets import Dataset

# usual names of columns: of two texts that belong together, of a text, of a label
PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("text1", "text2"), ("#1 string", "#2 string"), ("text", "text_pair"),
)  # fmt: skip
TEXTS = (
    "text", "sentence", "content", "document", "review", "article", "body", "description", "comment", "tweet",
    "headline", "title",
)  # fmt: skip
LABELS = (
    "label", "labels", "gold_label", "category", "class", "target", "topic", "sentiment", "intent", "coarse_label",
    "fine_label", "is_duplicate", "quality", "score",
)  # fmt: skip
LabelKind = Literal["classes", "numbers", "several"]


def load_text(
    source: str | Path,
    *,
    part: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    label_kind: LabelKind | None = None,
    label_separator: str | None = None,
    subset: str | None = None,
    encoding: str | Sequence[str] = "utf-8",
    format: str | None = None,
    columns: Sequence[str] | None = None,
    separator: str | None = None,
    quoting: bool | None = None,
    by: Literal["line", "paragraph", "file"] = "line",
) -> Dataset:
    """A table of texts: `text`, perhaps `text_pair`, and, where the source has labels, `label`.

    Labels become a `datasets.ClassLabel`, integers whose names `names(data)` lists, sorted (numbers by value). Labels
    that are numbers with a fraction stay numbers, for regression. A list of names for each row makes a list of
    integers, for several labels at once.

    source: a file of a kind that `effzoo.data.files` names (.csv, .tsv, .jsonl, .json, .parquet, .txt; .gz of these);
        a folder of such files, named train, dev (or validation) and test; a folder with one folder of .txt files per
        label; or a data set on the hub.
    part: train, validation (also called dev), test, ...; None for the one to train on.
    text, text_pair, label: names of columns; None takes a usual name that is there.
    label_kind: "classes", "numbers", or "several" names for each row; None for what the column holds.
    label_separator: between several names in one field, as in "sport|politics".
    subset: of a data set with several ("sst2" of "glue").
    encoding: of text files; each is read by the first of several that fits.
    format, columns, separator, quoting, by: where a file's name does not say how it is read: its kind ("tsv"); names of
        the columns of a .csv or .tsv without a first line that names them; the separator; whether quotation marks stand
        around fields (None: in a .csv, not in a .tsv); what one text of a .txt is ("line", "paragraph", "file").

    Raises DataError with the columns, the parts, the line or the row that does not fit.
    """
    reading = _reading(encoding, format, columns, separator, quoting, by)
    table = chosen(opened(source, subset, reading), part, source)
    first, second = text_columns(table, text, text_pair, source)
    if first == second:
        raise DataError(f"text and text_pair are both the column {first!r}; name two")
    target = pick(table, label, LABELS, "label", required=False)
    if target is not None and target in (first, second):
        raise DataError(
            f"column {target!r} is read as text and named as the label; choose another with label= or text="
        )
    if target is None and (label_kind or label_separator):
        raise DataError(
            f"none of the columns {listing(table.column_names)} has a usual name for label; name it with label="
        )
    table = _texts_of(table, {first: "text", second: "text_pair", target: "label"})
    if target is None:
        return table
    if label_separator is not None:
        table, label_kind = _split_labels(table, target, label_separator), "several"
    return _with_several(table, target) if label_kind == "several" else _with_names(table, target, label_kind)


def load_texts(
    source: str | Path, *, part: str | None = None, text: str | None = None, text_pair: str | None = None,
    subset: str | None = None, encoding: str | Sequence[str] = "utf-8", **file: Any,
) -> Dataset:  # fmt: skip
    """What `load_text` gives without labels, whatever the source says of them."""
    given = {"format": None, "columns": None, "separator": None, "quoting": None, "by": "line"} | file
    table = chosen(opened(source, subset, _reading(encoding, **given)), part, source)
    first, second = text_columns(table, text, text_pair, source)
    named: dict[str | None, str] = {first: "text", second: "text_pair"}
    return _texts_of(table, named)


def parts(source: str | Path, *, subset: str | None = None, format: str | None = None) -> list[str]:
    """The parts of a source by name: train, validation and test for their usual names, and any others.

    source, subset, format: as in `load_text`. Raises DataError.
    """
    return list(opened(source, subset, Reading(format=format)))


def names(data: Dataset) -> list[str] | None:
    """The names of the labels or tags, by number; None for a table without them or with numbers to regress."""
    check_table(data)
    for column in ("label", "labels", "tags"):
        feature = data.features.get(column)
        labels: list[str] | None = getattr(feature, "names", None) or getattr(
            getattr(feature, "feature", None), "names", None
        )
        if labels is not None:
            return labels
    return None


def check_table(data: object) -> None:
    """Raise DataError for what is no table."""
    from datasets import Dataset

    if not isinstance(data, Dataset):
        raise DataError(f"data are a datasets.Dataset, as load_text gives, got {shown(data)} ({type(data).__name__})")


def check_offsets(tokens: Dataset, logits: int) -> None:
    """Raise DataError for tokens that do not say where they come from, or that are not those of the logits."""
    check_table(tokens)
    if "offset_mapping" not in tokens.column_names or logits != len(tokens):
        raise DataError(
            f"tokens are tokenise(..., offsets=True), one row for each of the logits; got {len(tokens)} rows with "
            f"{listing(tokens.column_names)} and {logits} logits"
        )


def text_columns(table: Dataset, text: str | None, text_pair: str | None, source: Any) -> tuple[str, str | None]:
    """The column of the texts, and that of the second ones."""
    lower = {name.lower(): name for name in table.column_names}
    if text is None and text_pair is None:
        for first, second in PAIRS:
            if first in lower and second in lower:
                return lower[first], lower[second]
    column = pick(table, text, TEXTS, "text", hint=_without_head(table.column_names, source))
    assert column is not None
    return column, None if text_pair is None else pick(table, text_pair, (), "text_pair")


def pick(
    table: Dataset, given: str | None, usual: Sequence[str], argument: str, required: bool = True, hint: str = ""
) -> str | None:
    """The column that is meant. Raises DataError."""
    columns = table.column_names
    if given is not None:
        if given not in columns:
            raise DataError(
                f"there is no column {given!r}{did_you_mean(given, columns)} Columns: {listing(columns)}.{hint}"
            )
        return given
    lower = {name.lower(): name for name in columns}
    column = next((lower[name] for name in usual if name in lower), None)
    if column is None and required:
        raise DataError(
            f"none of the columns {_few(columns)} has a usual name for {argument}; name it with {argument}={hint}"
        )
    return column


def _few(names: Sequence[str]) -> str:
    cut = [name if len(name) <= 40 else f"{name[:40]}..." for name in names[:20]]
    return listing(cut + ["..."] * (len(names) > 20))


def class_names(values: Sequence[Any]) -> list[Any]:
    """Every label once, sorted."""
    try:
        return sorted(set(values))
    except TypeError:
        kinds = listing(sorted({type(value).__name__ for value in values}))
        raise DataError(f"labels are all names or all numbers, got {kinds}") from None


def _reading(encoding: Any, format: Any, columns: Any, separator: Any, quoting: Any, by: Any) -> Reading:
    return Reading(
        (encoding,) if isinstance(encoding, str) else tuple(encoding), format,
        None if columns is None else tuple(columns), separator, quoting, by,
    )  # fmt: skip


def _without_head(columns: Sequence[str], source: Any) -> str:
    """A hint where the names of columns look like a row of data."""
    mark = next((mark for mark in "\t;|" if len(columns) == 1 and mark in columns[0]), None)
    if mark is not None:
        return f"; if fields are separated by {mark!r}, give separator={mark!r} (--separator)"
    odd = [name for name in columns if not name.strip() or re.fullmatch(r"[-\d.]+", name) or name.count(" ") > 3]
    if not odd:
        return ""
    example = [chr(97 + place) for place in range(min(len(columns), 4))] + ["..."] * (len(columns) > 4)
    return (
        f". The first line of {source} looks like data ({shown(odd[0], 40)}): if no line names the columns, give their "
        f"{len(columns)} names, as in columns={tuple(example)} or --columns {','.join(example)}"
    )


def _texts_of(table: Dataset, named: Mapping[str | None, str]) -> Dataset:
    """The columns under the names that are ours; those of texts hold texts."""
    columns = {name: new for name, new in named.items() if name}
    table = table.select_columns(list(columns))
    table = table.rename_columns({name: new for name, new in columns.items() if name != new})
    for original, name in columns.items():
        for row, value in enumerate(table[name] if name != "label" else ()):
            if not isinstance(value, str):
                raise DataError(
                    f"column {original!r}: row {row} holds {'nothing' if value is None else repr(value)}, not a text"
                )
    return table


def _numbers(values: list[Any], kind: LabelKind | None, original: str) -> list[Any]:
    """Labels that are written as numbers as numbers: whole ones, or with a fraction."""
    if not isinstance(values[0], str):
        if kind == "numbers" and not all(isinstance(value, int | float) for value in values):
            raise DataError(f"column {original!r} holds {type(values[0]).__name__}, and label_kind is 'numbers'")
        return [float(value) for value in values] if kind == "numbers" else values
    for turned in (float,) if kind == "numbers" else (int,) if kind == "classes" else (int, float):
        try:
            found = [turned(value) for value in values]
        except (ValueError, OverflowError):
            continue
        if turned is int and [str(value) for value in found] != values:
            continue  # 007 is a name
        if all(abs(value) < float("inf") for value in found):
            return found
    if kind == "numbers":
        for row, value in enumerate(values):
            if not re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", value):
                raise DataError(f"column {original!r}: row {row} holds {shown(value, 40)}, and label_kind is 'numbers'")
    return values


def _with_names(table: Dataset, original: str, kind: LabelKind | None) -> Dataset:
    from datasets import ClassLabel, Value

    values, feature = list(table["label"]), table.features["label"]
    for row, value in enumerate(values):
        if value is None or value == "" or value != value or (isinstance(feature, ClassLabel) and value < 0):
            hint = "; a part without labels cannot be trained on" if value is not None else ""
            raise DataError(f"column {original!r}: row {row} has no label ({value!r}){hint}")
    if isinstance(feature, ClassLabel) and kind != "numbers":
        return table
    if isinstance(values[0], list):
        raise DataError(
            f"column {original!r} holds list, labels are names or numbers; for several labels at once give "
            "label_kind='several', or choose another with label="
        )
    if not isinstance(values[0], (str, int, float)):
        raise DataError(
            f"column {original!r} holds {type(values[0]).__name__}, labels are names or numbers; choose "
            "another with label="
        )
    values = _numbers(values, kind, original)
    plain = table.remove_columns("label")
    if isinstance(values[0], float) and kind != "classes":
        return plain.add_column("label", values, feature=Value("float64"))
    known = class_names(values)
    _check_spaces(known, original)
    number = {value: index for index, value in enumerate(known)}
    feature = ClassLabel(names=[str(value) for value in known])
    return plain.add_column("label", [number[value] for value in values], feature=feature)


def _check_spaces(known: Sequence[Any], original: str) -> None:
    """Raise DataError for labels that are one but for spaces around them."""
    seen: dict[str, str] = {}
    for name in known:
        if isinstance(name, str) and (other := seen.setdefault(name.strip(), name)) != name:
            raise DataError(
                f"column {original!r}: the labels {other!r} and {name!r} differ by spaces around them alone; write one"
            )


def _split_labels(table: Dataset, original: str, separator: str) -> Dataset:
    values = list(table["label"])
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise DataError(f"column {original!r}: row {row} holds {value!r}, and label_separator divides a text")
    found = [[name.strip() for name in value.split(separator) if name.strip()] for value in values]
    return table.remove_columns("label").add_column("label", found)


def _with_several(table: Dataset, original: str) -> Dataset:
    from datasets import ClassLabel, Sequence

    values, feature = list(table["label"]), table.features["label"]
    known = getattr(getattr(feature, "feature", None), "names", None)
    flat = [name for value in values if isinstance(value, list) for name in value]
    if flat and {*flat} <= {0, 1} and len({len(value) for value in values if value}) == 1 and len(flat) > len(values):
        raise DataError(
            f"column {original!r}: row 0 holds {shown(values[0], 40)}, and all rows have a 0 or 1 for each label; give "
            "lists of the labels that hold, as in [names[i] for i, mark in enumerate(row) if mark]"
        )
    for row, value in enumerate(values):
        if not isinstance(value, list) or any(name is None for name in value):
            raise DataError(
                f"column {original!r}: row {row} holds {shown(value, 40)}, and label_kind='several' needs a list of "
                "names (which may be empty), or label_separator="
            )
        twice = [name for name, count in Counter(value).items() if count > 1]
        if twice:
            raise DataError(f"column {original!r}: row {row} names {twice[0]!r} twice")
    if known is not None:
        return table
    known = class_names([name for value in values for name in value])
    if not known:
        raise DataError(f"column {original!r}: no row has a label")
    _check_spaces(known, original)
    number = {name: index for index, name in enumerate(known)}
    feature = Sequence(ClassLabel(names=[str(name) for name in known]))
    rows = [[number[name] for name in value] for value in values]
    return table.remove_columns("label").add_column("label", rows, feature=feature)
