"""One file as a table: its rows are counted, and one that does not fit is named by its line.

    .csv              RFC 4180: a field that holds commas, line ends or quotation marks stands in marks
    .tsv              fields between tabs; a quotation mark is a character like any other, as in GLUE
    .jsonl .json      one object a line; a list of objects
    .parquet          columns
    .txt              one text a line
    .conll .conllu    one word and its tags a line, a blank line behind each sentence

Any but .parquet may be packed with gzip (.jsonl.gz).
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from effzoo.errors import DataError, EffzooError, did_you_mean, listing, shown
from effzoo.writing import replace_file

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = {
    ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".json": "json", ".parquet": "parquet", ".txt": "txt",
    ".conll": "conll", ".bio": "conll", ".iob": "conll", ".iob2": "conll", ".conllu": "conllu",
}  # fmt: skip
Columns = dict[str, list[Any]]
log = logging.getLogger("effzoo")


@dataclass(frozen=True)
class Reading:
    """How files are read.

    encodings: of text files, of which the first that fits counts.
    format: of `FORMATS`; None for what the file's name says.
    columns: the names of the columns of a .csv or .tsv without a first line that names them.
    separator: between the fields of a .csv or .tsv; None for a comma and a tab.
    quoting: whether quotation marks stand around fields; None for yes in a .csv, no in a .tsv.
    by: what one text of a .txt file is: a line, a paragraph (to the next blank line), or the file.
    """

    encodings: tuple[str, ...] = ("utf-8",)
    format: str | None = None
    columns: tuple[str, ...] | None = None
    separator: str | None = None
    quoting: bool | None = None
    by: Literal["line", "paragraph", "file"] = "line"

    def __post_init__(self) -> None:
        known = sorted({*FORMATS.values()})
        if self.format is not None and self.format not in known:
            raise DataError(
                f"format is one of {listing(known)}, got {shown(self.format)}{did_you_mean(self.format, known)}"
            )
        if self.by not in ("line", "paragraph", "file"):
            raise DataError(f"by is 'line', 'paragraph' or 'file', got {shown(self.by)}")
        if self.separator is not None and len(self.separator) != 1:
            raise DataError(f"separator is one character, got {shown(self.separator)}")
        if self.columns is not None:
            _check_head("columns", list(self.columns))

    def format_of(self, file: Path) -> str | None:
        """What kind a file is; None for one that cannot be read."""
        return self.format or FORMATS.get(suffix_of(file))


def suffix_of(file: Path) -> str:
    """The suffix of a file's name that says its kind, without that of gzip."""
    return Path(file.name.removesuffix(".gz")).suffix.lower()


def read(file: Path, reading: Reading) -> Dataset:
    """The table of one file. Raises DataError that names the file, the line and what is wrong in it."""
    import datasets

    kind = reading.format_of(file)
    if kind is None:
        raise DataError(f"{file} is of no kind that can be read; give {listing(FORMATS)}, or say its format")
    if kind == "parquet":
        return _parquet(file)
    text = decoded(file, reading.encodings)
    columns = READERS[kind](file, text, reading)
    if not columns or not len(next(iter(columns.values()))):
        raise DataError(f"{file} is empty: no row in {len(_lines(text)):,} lines")
    return _kept(datasets.Dataset.from_dict({name: _array(file, name, values) for name, values in columns.items()}))


def decoded(file: Path, encodings: Sequence[str]) -> str:
    """The text of a file, in the first encoding that fits. Raises DataError."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError) as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        raise DataError(f"{file} cannot be read: {error}") from error
    problem = ""
    for encoding in encodings:
        try:
            return content.decode("utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding)
        except UnicodeDecodeError as error:
            problem = f"{error.reason} at byte {error.start}"
        except LookupError:
            raise DataError(f"there is no encoding {encoding!r}; try 'utf-8' or 'latin-1'") from None
    way = "encoding=('utf-8', 'latin-1') reads such files as Latin-1"
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        way = "it begins as UTF-16 does: encoding='utf-16' (--encoding utf-16)"
    elif b"\0" in content[:1000]:
        way = "it holds zero bytes, as no text does"
    raise DataError(f"{file} is not {listing(encodings)} text ({problem}); {way}")


def _lines(text: str) -> list[str]:
    """The lines, which \\n or \\r\\n ends; other marks that Unicode calls a line's end are characters of a text."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if lines and not lines[-1] else lines


def _separated(file: Path, text: str, reading: Reading) -> Columns:
    """A .csv or .tsv."""
    kind = reading.format_of(file)
    mark = reading.separator or ("," if kind == "csv" else "\t")
    quoting = kind == "csv" if reading.quoting is None else reading.quoting
    rows = _quoted(file, text, mark) if quoting else _plain(text, mark)
    head = list(reading.columns) if reading.columns is not None else next(rows, (0, []))[1]
    if not head:
        return {}
    head = [name.strip() if isinstance(name, str) else name for name in head]
    where = f"{file}: the first line" if reading.columns is None else f"columns, for {file},"
    if not quoting and reading.columns is None and all(len(x) > 1 and x[0] == x[-1] == '"' for x in head):
        raise DataError(f"{file}: the names in the first line stand in quotation marks; give quoting=True (--quoting)")
    _check_head(where, head)
    columns: Columns = {name: [] for name in head}
    marked = 0
    for line, row in rows:
        if len(row) != len(head):
            raise DataError(_of_other_length(file, line, row, head, mark, quoting))
        if not quoting:
            marked += sum(_as_spreadsheets_quote(field) for field in row)
        for name, value in zip(head, row, strict=True):
            columns[name].append(value)
    if marked:
        log.warning(
            "%s: %d fields stand in quotation marks with doubled ones inside, which are all taken as characters of the "
            "text; quoting=True (--quoting) takes them off", file, marked,
        )  # fmt: skip
    return columns


def _as_spreadsheets_quote(field: str) -> bool:
    """Whether a field stands in quotation marks and holds doubled ones, and no single one."""
    inside = field[1:-1]
    return len(field) > 3 and field[0] == field[-1] == '"' and '""' in inside and '"' not in inside.replace('""', "")


def _check_head(where: str, head: list[str]) -> None:
    twice = [name for name, count in Counter(head).items() if count > 1]
    if twice or not all(isinstance(name, str) for name in head):
        raise DataError(
            f"{where} names the column {shown(twice[0] if twice else head)} twice; if it is a row of data, name the "
            "columns with columns= (--columns)"
        )


def _of_other_length(file: Path, line: int, row: Sequence[str], head: Sequence[str], mark: str, quoting: bool) -> str:
    columns = f"{len(head)} column{'s' * (len(head) != 1)} ({shown(listing(head))})"
    what = f"{file}, line {line}: {len(row)} field{'s' * (len(row) != 1)}, and there are {columns}"
    if len(head) == 1 and any(other in head[0] for other in ";\t,|"):
        other = next(other for other in ";\t,|" if other in head[0])
        return f"{what}; if fields are separated by {other!r}, give separator={other!r} (--separator)"
    if not quoting and any(field.startswith('"') for field in row):
        return f"{what}; if quotation marks stand around fields, give quoting=True (--quoting)"
    if quoting and len(row) > len(head):
        return f"{what}; a text that holds {mark!r} stands in quotation marks"
    return what


def _plain(text: str, mark: str) -> Iterator[tuple[int, list[str]]]:
    """The number of each line and its fields; blank lines are none."""
    for number, line in enumerate(_lines(text), 1):
        if line:
            yield number, line.split(mark)


def _quoted(file: Path, text: str, mark: str) -> Iterator[tuple[int, list[str]]]:
    """The number of the first line of each row and its fields. Raises DataError for marks that do not pair."""
    physical = [line + "\n" for line in text.split("\n")]
    reader = csv.reader(iter(physical), delimiter=mark, strict=True)
    before = csv.field_size_limit(2**31 - 1)
    longest, several = (0, 0), 0
    try:
        while True:
            start = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                raise DataError(f"{file}, {_unpaired(physical, start, mark) or f'line {start}: {error}'}") from None
            if reader.line_num > start:
                several += 1
                longest = max(longest, (reader.line_num - start, start))
            if row:
                yield start, row
    finally:
        csv.field_size_limit(before)
    if several:
        log.warning(
            "%s: %d rows go over several lines, the longest from line %d to line %d, as line ends stand in quotation "
            "marks; where that is not meant, a mark is missing", file, several, longest[1], sum(longest),
        )  # fmt: skip


def _unpaired(lines: Sequence[str], start: int, mark: str) -> str:
    """What is wrong with the quotation marks of the row that begins in a line, counted from 1."""
    inside, at_start, closed, opened = False, True, False, start
    for number in range(start, len(lines) + 1):
        for at, character in enumerate(lines[number - 1]):
            if inside:
                if character == '"':
                    inside, closed = False, True
            elif closed and character == '"':
                inside, closed = True, False
            elif character in (mark, "\n", "\r"):
                at_start, closed = True, False
                if character == "\n":
                    break
            elif closed:
                return (
                    f"line {number}: {shown(lines[number - 1][at : at + 20].rstrip())} follows a quotation mark that "
                    f"ends a field, which began in line {opened}; marks inside of a field are doubled"
                )
            elif character == '"' and at_start:
                inside, at_start, opened = True, False, number
            else:
                at_start = False
    return (
        (
            f"line {opened}: a quotation mark that begins a field is never closed; where it is a character of the "
            'text, write the field as """text"""'
        )
        if inside
        else ""
    )


def _json_lines(file: Path, text: str, reading: Reading) -> Columns:
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {number}: no JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(
                f'{file}, line {number}: {shown(row, 40)} is no object, such as {{"text": "...", "label": 1}}'
            )
        rows.append((number, row))
    return _columns_of([row for _, row in rows])


def _json(file: Path, text: str, reading: Reading) -> Columns:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):
            return _json_lines(file, text, reading)
        raise DataError(f"{file}: no JSON ({error})") from None
    content = content["data"] if isinstance(content, dict) and isinstance(content.get("data"), list) else content
    rows = [content] if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file} holds no list of objects, such as [{{...}}, {{...}}]; one object a line is .jsonl")
    return _columns_of(rows)


def _columns_of(rows: Sequence[Mapping[str, Any]]) -> Columns:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _texts(file: Path, text: str, reading: Reading) -> Columns:
    if reading.by == "file":
        return {"text": [text]} if text.strip() else {}
    if reading.by == "line":
        return {"text": [line for line in _lines(text) if line.strip()]}
    paragraphs: list[list[str]] = [[]]
    for line in _lines(text):
        if line.strip():
            paragraphs[-1].append(line)
        else:
            paragraphs.append([])
    return {"text": ["\n".join(lines) for lines in paragraphs if lines]}


def _conll(file: Path, text: str, reading: Reading) -> Columns:
    """Sentences of lines with a word in the first field and its tag in the last."""
    sentences: list[list[list[str]]] = [[]]
    fields = 0
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            sentences.append([])
            continue
        row = line.split("\t") if "\t" in line else re.split(" +", line.strip(" "))  # other spaces are in words
        if row[0] == "-DOCSTART-":
            continue
        fields = fields or len(row)
        if len(row) != fields or fields < 2:
            other = f"the lines before have {fields}" if len(row) != fields else "a line is a word and its tags"
            raise DataError(f"{file}, line {number}: {len(row)} field{'s' * (len(row) != 1)}, and {other}")
        sentences[-1].append(row)
    return _sentences(sentences, 0, -1)


def _conllu(file: Path, text: str, reading: Reading) -> Columns:
    """Universal Dependencies: ten fields between tabs, the word in the second, its part of speech in the fourth."""
    sentences: list[list[list[str]]] = [[]]
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            sentences.append([])
        elif not line.startswith("#"):
            row = line.split("\t")
            if len(row) != 10:
                raise DataError(f"{file}, line {number}: {len(row)} fields, and CoNLL-U has 10 between tabs")
            if row[0].isdigit():  # 3-4 is a word that stands as 3 and 4, too; 3.1 one that is not written
                sentences[-1].append(row)
    return _sentences(sentences, 1, 3)


def _sentences(sentences: Sequence[Sequence[Sequence[str]]], word: int, tag: int) -> Columns:
    full = [rows for rows in sentences if rows]
    return {
        "words": [[row[word] for row in rows] for rows in full],
        "tags": [[row[tag] for row in rows] for rows in full],
    }


READERS: dict[str, Callable[[Path, str, Reading], Columns]] = {
    "csv": _separated, "tsv": _separated, "jsonl": _json_lines, "json": _json, "txt": _texts, "conll": _conll,
    "conllu": _conllu,
}  # fmt: skip


def _array(file: Path, name: str, values: list[Any]) -> Any:
    """A column of one type. Raises DataError that names two rows of different ones."""
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        kinds: dict[str, int] = {}
        for row, value in enumerate(values):
            if value is not None:
                kinds.setdefault(type(value).__name__, row)
        both = " and ".join(f"{kind} in row {row}" for kind, row in kinds.items())
        both += ", and parts of different kinds in others" if len(kinds) == 1 else ""
        raise DataError(f"{file}: column {name!r} holds {both} ({str(error).splitlines()[0]:.80})") from None


def _kept(table: Any) -> Any:
    """The same table in a file of `datasets`' cache, beside which that of tokens can stand."""
    import datasets
    import pyarrow as pa

    digest = hashlib.sha256(str(table.features).encode())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.data.table.schema) as writer:
        writer.write_table(table.data.table)
    content = sink.getvalue().to_pybytes()
    digest.update(content)
    path = Path(datasets.config.HF_DATASETS_CACHE) / "effzoo" / f"{digest.hexdigest()}.arrow"
    if not path.is_file():
        replace_file(path, content)
    return datasets.Dataset.from_file(str(path))


def _parquet(file: Path) -> Dataset:
    from datasets import load_dataset

    try:
        table: Dataset = load_dataset("parquet", data_files=[str(file)], split="train")
    except EffzooError:
        raise
    except Exception as error:  # of many kinds: a broken file, a type without a name
        raise DataError(f"{file} cannot be read: {first_line(error)}") from error
    return table


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
