"""Many examples at once, as flat columns: their lengths, a hash of all that is read, and how many labels count."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from effzoo.checked import IGNORED, LABEL_NAMES
from effzoo.train.batches import TOKEN_TASKS, of_target
from effzoo.train.form import Form

_AT_ONCE = 10_000  # examples of a table that are looked at together


class Column(NamedTuple):
    """One column of some examples, without padding.

    shapes: [examples, axes + 1]; the number of axes and the shape of each value.
    numbers: all values, one after another.
    """

    shapes: Any
    numbers: Any


Columns = dict[str, Column]


class Survey(NamedTuple):
    """What is known of examples that were all looked at.

    lengths: tokens of each.
    digest: a hash of everything that is read.
    counted: labels that count.
    """

    lengths: list[int]
    digest: str
    counted: int


def survey(form: Form, chunks: Iterator[Columns]) -> Survey:
    """Go through examples that are right, some at a time."""
    hashes: dict[str, tuple[Any, Any]] = {}
    lengths: list[int] = []
    counted = 0
    for columns in chunks:
        tokens = columns["input_ids" if "input_ids" in columns else "inputs_embeds"]
        lengths += tokens.shapes[:, 1].tolist()
        for name, (shapes, numbers) in columns.items():
            of_shapes, of_numbers = hashes.setdefault(name, (hashlib.sha256(), hashlib.sha256()))
            kind = np.float64 if numbers.dtype.kind == "f" else np.int64
            of_shapes.update(np.ascontiguousarray(shapes, dtype=np.int64).tobytes())
            of_numbers.update(np.ascontiguousarray(numbers, dtype=kind).tobytes())
        if "labels" in columns:
            counted += _count(columns["labels"], form)
    whole = hashlib.sha256()
    for name, (of_shapes, of_numbers) in sorted(hashes.items()):
        whole.update(f"{name} {of_shapes.hexdigest()} {of_numbers.hexdigest()}".encode())
    return Survey(lengths, whole.hexdigest()[:16], counted)


def _count(labels: Column, form: Form) -> int:
    """Labels that count; in a causal model nothing predicts the first one of an example."""
    counts = labels.numbers != IGNORED
    if form.task != "causal_lm":
        return int(counts.sum())
    starts = np.concatenate([[0], np.cumsum(labels.shapes[:, 1])[:-1]])
    return int(counts.sum()) - int(counts[starts].sum())


def of_list(examples: Sequence[Any], form: Form) -> Iterator[Columns]:
    """Each example by itself, checked."""
    return (_columns(form, index, example) for index, example in enumerate(examples))


def _columns(form: Form, index: int, example: Any) -> Columns:
    columns: Columns = {}
    for name, value in form.checked(index, example).items():
        dtype = torch.float64 if value.is_floating_point() else torch.int64
        numbers = value.detach().cpu().to(dtype).numpy().ravel()
        columns[name] = Column(np.array([[value.ndim, *value.shape]]), numbers)
    return columns


def of_table(table: Any, form: Form) -> Iterator[Columns]:
    """The rows of a table, many at a time where they are plainly right; else one by one, which finds what is wrong."""
    start = 0
    for part in table.with_format("arrow").iter(batch_size=_AT_ONCE):
        plain = {("labels" if name in LABEL_NAMES else name): _plain(part[name]) for name in part.column_names}
        columns = {name: column for name, column in plain.items() if column is not None}
        if len(columns) == len(form.columns) == len(plain) and _plainly_right(columns, form):
            yield columns
        else:
            rows = table.with_format(None).select(range(start, start + len(part)))
            yield from (_columns(form, start + index, row) for index, row in enumerate(rows))
        start += len(part)


def _plain(column: Any) -> Column | None:
    """A column of numbers, or of lists of numbers, without a gap; None for any other."""
    import pyarrow as pa
    import pyarrow.compute

    lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if column.null_count:
        return None
    numbers = pa.compute.list_flatten(column) if lists else column
    if numbers.null_count or not (pa.types.is_integer(numbers.type) or pa.types.is_floating(numbers.type)):
        return None
    if not lists:
        return Column(np.zeros((len(column), 1), dtype=np.int64), numbers.to_numpy())
    lengths = pa.compute.list_value_length(column).to_numpy()
    return Column(np.column_stack([np.ones(len(lengths), dtype=np.int64), lengths]), numbers.to_numpy())


def _plainly_right(columns: Columns, form: Form) -> bool:
    """Whether all rows surely pass `Form.checked`, and read as the same numbers."""
    ids = columns.get("input_ids")
    if ids is None or ids.shapes.shape[1] != 2 or ids.numbers.dtype.kind not in "iu" or not ids.shapes[:, 1].all():
        return False
    if form.vocab is not None and not 0 <= ids.numbers.min() <= ids.numbers.max() < form.vocab:
        return False
    for name, (shapes, numbers) in columns.items():
        one_each = name == "task_ids" or (name == "labels" and form.task not in TOKEN_TASKS)
        if numbers.dtype.kind not in "iu" or shapes.shape[1] != (1 if one_each else 2):
            return False
        if not one_each and not of_target(name, form.task) and not np.array_equal(shapes, ids.shapes):
            return False
    return "labels" not in columns or _are_classes(columns["labels"].numbers, form)


def _are_classes(labels: Any, form: Form) -> bool:
    """Whether integers are classes of the model, or -100."""
    in_range = (labels >= 0) & (labels < form.classes)
    return form.classes != 1 and not form.label and bool((in_range | (labels == IGNORED)).all())
