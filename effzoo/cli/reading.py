"""Data as the command line is given them: the options that say how a source is read, and the table of a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effzoo.errors import DataError, OptionError, did_you_mean, listing

if TYPE_CHECKING:
    from datasets import Dataset

TASKS = {  # as the command line calls them: the task of the model
    "classification": "classification", "regression": "classification", "multi_label": "classification",
    "token_classification": "token_classification", "question_answering": "question_answering",
    "masked_lm": "masked_lm", "causal_lm": "causal_lm",
}  # fmt: skip
PANEL = "How the data is read"
Text = Annotated[
    str | None,
    typer.Option(help="Column of the texts (words, messages); default: found by its name.", rich_help_panel=PANEL),
]
TextPair = Annotated[
    str | None, typer.Option(help="Column of the second text, where two belong together.", rich_help_panel=PANEL)
]
Label = Annotated[
    str | None, typer.Option(help="Column of the labels or tags; default: found by its name.", rich_help_panel=PANEL)
]
Subset = Annotated[str | None, typer.Option(help="Of a data set with several, sst2 of glue.", rich_help_panel=PANEL)]
Part = Annotated[
    str | None, typer.Option(help="train, validation, test, ...; default: that to train on.", rich_help_panel=PANEL)
]
Columns = Annotated[
    str | None,
    typer.Option(help='Names of the columns of a file without them: "id,label,note,text".', rich_help_panel=PANEL),
]
Separator = Annotated[
    str | None, typer.Option(help="Between the fields of a .csv or .tsv, where it is another.", rich_help_panel=PANEL)
]
Quoting = Annotated[
    bool | None,
    typer.Option(
        "--quoting/--no-quoting", help="Quotation marks stand around fields; default: in a .csv, not in a .tsv.",
        rich_help_panel=PANEL,
    ),
]  # fmt: skip
Format = Annotated[
    str | None, typer.Option(help="csv, tsv, jsonl, conll, ..., where a file's name is another.", rich_help_panel=PANEL)
]
Encoding = Annotated[
    str, typer.Option(help='Of text files; the first that fits: "utf-8,latin-1".', rich_help_panel=PANEL)
]
LabelSeparator = Annotated[
    str | None, typer.Option(help='Between several labels in one field, "|".', rich_help_panel=PANEL)
]
By = Annotated[str, typer.Option(help="One text of a .txt: line, paragraph or file.", rich_help_panel=PANEL)]


@dataclass(frozen=True)
class Options:
    """What the options above say, as `effzoo.data` takes it."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    subset: str | None = None
    label_separator: str | None = None
    file: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, text: str | None, text_pair: str | None, label: str | None, subset: str | None, *,
        label_separator: str | None = None, columns: str | None = None, separator: str | None = None,
        quoting: bool | None = None, format: str | None = None, encoding: str = "utf-8", by: str = "line",
    ) -> Options:  # fmt: skip
        """`\\t` as a separator is a tab, as shells make it hard to type one."""
        names = None if columns is None else tuple(name.strip() for name in columns.split(","))
        mark = "\t" if separator == "\\t" else separator
        file = {
            "columns": names, "separator": mark, "quoting": quoting, "format": format, "by": by,
            "encoding": tuple(encoding.split(",")),
        }  # fmt: skip
        return cls(text, text_pair, label, subset, label_separator, file)

    def elsewhere(self) -> Options:
        """The same for another source, of which the subset is not said."""
        return replace(self, subset=None)


def task_of(given: str) -> str:
    """The task of the model. Raises OptionError."""
    if given not in TASKS:
        raise OptionError(f"--task is one of {listing(TASKS)}, got {given!r}{did_you_mean(given, TASKS)}")
    return TASKS[given]


def table(source: str, task: str, part: str | None, options: Options) -> Dataset:
    """The table that a task reads, of one part of a source."""
    from effzoo import data
    from effzoo.data.texts import load_texts

    file, shared = options.file, {"part": part, "subset": options.subset, "encoding": options.file["encoding"]}
    pairs = task in ("classification", "regression", "multi_label")
    for name, value in (("--text-pair", options.text_pair), ("--label-separator", options.label_separator)):
        if value is not None and not pairs:
            raise OptionError(f"{name} is for classification, regression and multi_label, not for {task}")
    for name in ("columns", "separator", "quoting"):
        if file[name] is not None and task in ("token_classification", "question_answering"):
            raise OptionError(f"--{name} is about .csv and .tsv files, which {task} does not read")
    if task == "token_classification":
        return data.load_tags(source, words=options.text, tags=options.label, format=file["format"], **shared)
    if task == "question_answering":
        return data.load_questions(source, **shared)
    if task == "causal_lm" and _holds_messages(source, part, options):
        return data.load_chat(source, messages=options.text, **shared)
    kinds: dict[str, Any] = {"regression": "numbers", "multi_label": "several"}
    if not pairs:
        found = load_texts(source, text=options.text, part=part, subset=options.subset, **file)
        return found.select_columns(["text"])
    return data.load_text(
        source, text=options.text, text_pair=options.text_pair, label=options.label, label_kind=kinds.get(task),
        label_separator=options.label_separator, part=part, subset=options.subset, **file,
    )  # fmt: skip


def _holds_messages(source: str, part: str | None, options: Options) -> bool:
    """Whether a source has a column of messages, and no other is named."""
    from effzoo.data.chat import MESSAGES
    from effzoo.data.files import Reading
    from effzoo.data.sources import chosen, opened

    file = options.file
    if file["columns"] is not None:
        return False
    reading = Reading(file["encoding"], file["format"], None, file["separator"], file["quoting"], file["by"])
    names = chosen(opened(source, options.subset, reading), part, source).column_names
    if options.text is not None:
        return options.text in MESSAGES
    return any(name in MESSAGES for name in names) and "text" not in names


def aligned(other: Dataset, labels: Sequence[str] | None, source: str) -> Dataset:
    """The same table with the numbers that the training data gives to the names of labels or tags.

    Raises DataError for names that it does not have.
    """
    from datasets import ClassLabel
    from datasets import Sequence as Lists

    from effzoo import data

    names = data.names(other)
    if labels == names:
        return other
    if labels is None or names is None or set(names) - set(labels):
        strange = sorted(set(names or ()) - set(labels or ()))
        raise DataError(
            f"the labels of {source} are not those of the training data: "
            f"{', '.join(strange) or 'one of the two has none'}"
        )
    column = "tags" if "tags" in other.column_names else "label"
    number = {old: list(labels).index(name) for old, name in enumerate(names)}
    kind: Any = ClassLabel(names=list(labels))
    lists = not hasattr(other.features[column], "names")
    values = [[number[each] for each in row] if lists else number[row] for row in other[column]]
    return other.remove_columns(column).add_column(column, values, feature=Lists(kind) if lists else kind)


def metrics_for(
    task: str, held_out: Dataset, tokens: Dataset, labels: Sequence[str] | None
) -> Callable[[Any], Any] | None:
    """What is measured beside the loss and the accuracy."""
    from effzoo import data
    from effzoo.data.tags import has_entities

    if task == "regression":
        return data.number_metrics
    if task == "multi_label":
        return data.label_metrics
    if task == "question_answering":
        return data.answer_metrics(held_out, tokens)
    if task == "token_classification" and labels is not None and has_entities(labels):
        return data.entity_metrics(labels)
    return None


def tokens(table: Dataset, tokenizer: Any, limit: int, model: Any, how: dict[str, Any]) -> Dataset:
    """The tokens of a table, with types only where the model has several."""
    from effzoo import data

    made = data.tokenise(table, tokenizer, limit, **how)
    if "token_type_ids" in made.column_names and getattr(model.config, "types", 0) < 2:
        made = made.remove_columns("token_type_ids")
    return made


def plain(tokens: Dataset) -> Dataset:
    """Tokens without the columns that say where they come from."""
    return tokens.remove_columns(
        [name for name in ("offset_mapping", "overflow_to_sample_mapping") if name in tokens.column_names]
    )
