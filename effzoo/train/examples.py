"""The examples of a run: every one is checked, before the first step where that is cheap, else when it is read."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from effzoo.architectures import Transformer
from effzoo.architectures.heads import LABEL_DTYPES
from effzoo.checked import IGNORED
from effzoo.errors import InputError, did_you_mean, listing
from effzoo.sites import prompt_rows
from effzoo.train.batches import LABEL_NAMES, TOKEN_TASKS

_UNUSED = {  # numbers that tokenizers and data sets carry beside what a model reads
    "id", "idx", "index", "length", "special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping",
    "num_truncated_tokens",
}  # fmt: skip
_AT_ONCE = 10_000  # rows of a table that are looked at together
_NO_COLUMNS = ("labels", "cache")  # what a model's forward names beside the columns of data


def accepted(model: nn.Module) -> tuple[str, ...]:
    """The inputs that a model's forward names, without the labels."""
    return tuple(name for name in inspect.signature(model.forward).parameters if name not in _NO_COLUMNS)


@dataclass(frozen=True)
class Form:
    """What the examples of a model look like.

    what: the data, in words.
    read: the columns that the model reads.
    task, classes: what labels are; classes is the number of labels, of a language model its vocabulary.
    vocab: token ids lie below it, None where they are not looked up.
    columns: those of the first example that are read; every other has the same.
    label: the shape of the first one's label, where an example has one label; None without labels.
    """

    what: str
    read: tuple[str, ...]
    task: str
    classes: int
    vocab: int | None
    columns: tuple[str, ...] = ()
    label: tuple[int, ...] | None = None

    def checked(self, index: int, row: Any) -> dict[str, Tensor]:
        """The columns that are read of one example, as tensors; labels are named so. Raises InputError with its
        number."""
        present = self._present(index, row)
        if set(present) != set(self.columns):
            wanted, there = set(self.columns), present.keys()
            missing, strange = sorted(wanted - there, key=str), sorted(there - wanted, key=str)
            if missing and missing[0] in LABEL_NAMES:
                raise InputError(f"{self.what}: example {index} has no label; every example needs one")
            self._check_known(index, strange, row)
            lack = f"lacks {missing[0]!r}, which {'example 0' if index else 'another example'} has" if missing else ""
            raise InputError(
                f"{self.what}: example {index} {lack or f'has {strange[0]!r}, which example 0 lacks'}; "
                "give a column to every example or to none (None counts as missing)"
            )
        found = {
            ("labels" if name in LABEL_NAMES else name): self._tensor(index, name, present[name])
            for name in self.columns
        }
        self._check_tokens(index, found)
        if "labels" in found:
            found["labels"] = self._label(index, found["labels"])
        return found

    def _present(self, index: int, row: Any) -> dict[str, Any]:
        """What an example has of the columns that count: all but None, texts and the numbers that tokenizers add."""
        if not isinstance(row, Mapping):
            raise InputError(
                f"{self.what}: example {index} is a {type(row).__name__}, not a mapping of columns such as "
                f"{{'input_ids': [...], 'labels': 0}}"
            )
        names = [name for name, value in row.items() if value is not None]
        wanted = {*self.read, *(LABEL_NAMES if self.label is not None or not self.columns else ())}
        return {
            name: row[name]
            for name in names
            if name in wanted or not (name in LABEL_NAMES or isinstance(row[name], str) or name in _UNUSED)
        }

    def _check_known(self, index: int, names: Sequence[str], row: Mapping[str, Any]) -> None:
        for name in names:
            if name not in self.read and name not in LABEL_NAMES:
                raise InputError(
                    f"{self.what}: example {index} has the column {name!r}, which the model does not "
                    f"read{did_you_mean(name, self.read)} "
                    f"It reads {listing(self.read)} and labels; rename the column or remove it."
                )

    def _tensor(self, index: int, name: str, value: Any) -> Tensor:
        if isinstance(value, str) and name in LABEL_NAMES:
            raise InputError(
                f"{self.what}: example {index} has the label {value!r}; labels are integers, "
                "effzoo.data.load_text maps names to them"
            )
        try:
            numpy = isinstance(
                value[0] if isinstance(value, (list, tuple)) and value else value, (np.ndarray, np.generic)
            )
            found = torch.as_tensor(np.asarray(value) if numpy else value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise InputError(
                f"{self.what}: example {index}: {name} is {_short(value)}, which is no array of numbers ({error})"
            ) from None
        if found.is_complex():
            raise InputError(
                f"{self.what}: example {index}: {name} is {_short(value)}, complex numbers, which no model reads"
            )
        if found.dtype == torch.uint64 and bool((found.view(torch.int64) < 0).any()):
            raise InputError(
                f"{self.what}: example {index}: {name} is {_short(value)}, with a number that does not fit into 63 bits"
            )
        return found if found.is_floating_point() or found.dtype == torch.bool else found.long()

    def _check_tokens(self, index: int, found: Mapping[str, Tensor]) -> None:
        tokens = "input_ids" if "input_ids" in found else "inputs_embeds"
        ids, where = found[tokens], f"{self.what}: example {index}"
        if tokens == "input_ids" and ids.ndim == 1 and not ids.numel():
            raise InputError(f"{where} is empty")
        if tokens == "input_ids" and (ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool):
            raise InputError(f"{where}: input_ids is a list of integers, got {_dtype(ids)} of shape {tuple(ids.shape)}")
        if tokens == "inputs_embeds" and (ids.ndim < 2 or not ids.is_floating_point() or not ids.numel()):
            raise InputError(
                f"{where}: inputs_embeds is a list of vectors of floats, got {_dtype(ids)} of shape {tuple(ids.shape)}"
            )
        if tokens == "input_ids" and self.vocab is not None and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab:
            raise InputError(
                f"{where}: input_ids are in [0, {self.vocab}), got {int(ids.min())} to "
                f"{int(ids.max())}; is this the model's tokenizer?"
            )
        for name, value in found.items():
            if name in (tokens, "task_ids") or (name == "labels" and self.task not in TOKEN_TASKS):
                continue
            if value.ndim == 0 or len(value) != len(ids):
                raise InputError(
                    f"{where}: {name} has shape {tuple(value.shape)}, its {tokens} has {len(ids)} positions"
                )
        if "task_ids" in found and (found["task_ids"].ndim or found["task_ids"].is_floating_point()):
            raise InputError(f"{where}: task_ids is one integer, got {_short(found['task_ids'].tolist())}")

    def _label(self, index: int, label: Tensor) -> Tensor:
        """The label, of the kind that the first example has. Regression: any finite number. Several labels at once:
        floats from 0 to 1."""
        where, alone = f"{self.what}: example {index}", self.task not in TOKEN_TASKS
        if alone and self.label is not None and tuple(label.shape) != self.label:
            raise InputError(
                f"{where} has a label of shape {tuple(label.shape)}, example 0 one of shape "
                f"{self.label}; give all the same"
            )
        if alone and self.classes == 1:
            if label.numel() != 1 or not bool(torch.isfinite(label).all()):
                raise InputError(
                    f"{where} has the label {_short(label.tolist())}; with num_labels=1 a label is one finite number"
                )
            return label.to(torch.get_default_dtype())
        if alone and label.ndim:
            if not label.is_floating_point() or tuple(label.shape) != (self.classes,):
                raise InputError(
                    f"{where} has the label {_short(label.tolist())}; a label is an integer from 0 to "
                    f"{self.classes - 1}, "
                    f"or a list of {self.classes} floats where several labels may hold"
                )
            if not bool(((label >= 0) & (label <= 1)).all()):
                raise InputError(
                    f"{where} has the label {_short(label.tolist())}; where several labels may hold, "
                    "each is a number from 0 to 1"
                )
            return label
        if label.is_floating_point():
            raise InputError(
                f"{where} has the label {_short(label.tolist())}; labels are integers, floats are for num_labels=1"
            )
        wrong = label[(label != IGNORED) & ((label < 0) | (label >= self.classes))]
        if wrong.numel():
            raise InputError(
                f"{where} has the label {int(wrong.flatten()[0])}, the model has {self.classes} classes (0 to "
                f"{self.classes - 1}); check num_labels"
            )
        return label.long()


class Examples(Dataset[dict[str, Tensor]]):
    """Examples as tensors of the columns that a model reads. lengths: in tokens; None where only reading each would
    tell.

    digest: a hash of all that is read, the same for a list and a table of the same rows; None for data whose rows are
        read only when they are asked for, unless it has a text `fingerprint` of its own.
    """

    def __init__(
        self, data: Any, form: Form, limit: int | None, lengths: list[int] | None = None, digest: str | None = None
    ):
        self.data, self.form, self.limit, self.lengths, self.digest = data, form, limit, lengths, digest

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._checked(index, self.data[index])

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """As `datasets.Dataset` has it: several rows are read at once where that is quicker."""
        if hasattr(self.data, "__getitems__"):
            return [
                self._checked(index, row)
                for index, row in zip(indices, self.data.__getitems__(list(indices)), strict=True)
            ]
        return [self[index] for index in indices]

    def _checked(self, index: int, row: Any) -> dict[str, Tensor]:
        found = self.form.checked(index, row)
        tokens = len(found["input_ids" if "input_ids" in found else "inputs_embeds"])
        if self.limit is not None and tokens > self.limit:
            raise InputError(
                f"{self.form.what}: example {index} has {tokens} tokens, {self.limit} fit; truncate it, or build "
                "with a larger max_length"
            )
        return found


def examples(data: Any, model: nn.Module, what: str, *, labelled: bool = True) -> Examples:
    """The examples of a model, all looked at where they are a list or a table, and each when it is read in any case.

    data: a `datasets.Dataset`, a list of mappings, or any map-style data set of mappings. Text columns and a few
        known numbers are left out with a report.
    labelled: whether labels are needed; else they are left out. Raises InputError for everything that would be read
        wrongly: no labels, unknown columns, a column that some examples lack, labels out of range, sequences that do
        not fit.
    """
    sized(data, what)
    form = _form(data, model, what, labelled)
    # of predictions, the model itself says it
    limit = cast(Any, model).config.max_length - prompt_rows(model) if labelled else None
    if _is_table(data) and data.format["type"] != "custom":  # else a transform runs when an example is read
        data = data.select_columns([name for name in data.column_names if name in form.columns])
        found = _survey(form, _table(data, form))
    elif isinstance(data, Sequence):
        found = _survey(form, (_row(form, index, row) for index, row in enumerate(data)))
    else:
        own = getattr(data, "fingerprint", None)
        return Examples(data, form, limit, digest=own if isinstance(own, str) else None)
    lengths, digest, counted = found
    if limit is not None:
        _check_lengths(lengths, limit, what)
    if labelled and not counted:
        raise InputError(
            f"{what}: no label of any example counts (all are {IGNORED}, or before the first position "
            "that is predicted)"
        )
    return Examples(data, form, limit, lengths, digest)


def fits_teacher(lengths: Sequence[int], teacher: Transformer) -> None:
    """Raise InputError when a teacher cannot read the longest examples of its student."""
    limit = teacher.config.max_length - prompt_rows(teacher)
    if max(lengths) > limit:
        raise InputError(
            f"the longest example has {max(lengths)} tokens, the teacher reads {limit}; truncate them to {limit}, or "
            "build the teacher with a larger "
            "max_length"
        )


def sized(data: Any, what: str) -> None:
    """Raise InputError for what is no map-style data set with at least one example."""
    if isinstance(data, (str, bytes)) or hasattr(data, "__fspath__"):
        raise InputError(
            f"{what} is {str(data)[:99]!r}; examples are needed: effzoo.data.load_text reads a file, "
            "effzoo.data.tokenise makes them of it"
        )
    if isinstance(data, Mapping):
        parts = all(hasattr(value, "column_names") or _is_rows(value) for value in data.values())
        hint = (
            "give one of them"
            if parts
            else ("give a list of rows, or datasets.Dataset.from_dict(...) of these columns")
        )
        raise InputError(f"{what} is a mapping of {listing(map(str, data))}; {hint}")
    if hasattr(data, "iloc"):
        raise InputError(
            f"{what} is a {type(data).__name__}, which gives columns, not examples; "
            "give datasets.Dataset.from_pandas(...) or .to_dict('records') of it"
        )
    if isinstance(data, DataLoader):
        raise InputError(
            f"{what} is a DataLoader, which gives batches; give its examples (loader.dataset), and "
            "batch_size= beside them"
        )
    rows = hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, (type, IterableDataset))
    if not rows or getattr(data, "ndim", 1) == 0:
        raise InputError(
            f"{what} needs a length and access by index, as a list or a datasets.Dataset has; got {_short(data)}. "
            "What can be iterated becomes a list by list(...)."
        )
    if len(data) == 0:
        raise InputError(f"{what} is empty")


class Raw:
    """Examples as they are, for a collator of the user's own."""

    lengths, digest = None, None

    def __init__(self, data: Any):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


class Collated:
    """A user's collator; each batch that it returns is checked. Raises InputError for one that is no input of the
    model."""

    def __init__(self, collator: Callable[[list[Any]], Any], known: Sequence[str], what: str):
        self.collator, self.known, self.what = collator, tuple(known), what

    def __call__(self, rows: list[Any]) -> Mapping[str, Tensor]:
        batch = self.collator(rows)
        if not isinstance(batch, Mapping):
            raise InputError(
                f"the collator returns {type(batch).__name__} for {self.what}; a mapping of tensors is needed"
            )
        _check_columns(list(batch), {}, self.known, f"what the collator returns for {self.what}", labelled=True)
        if "labels" not in batch:
            raise InputError(f"the collator returns no 'labels' for {self.what}, only {listing(batch)}")
        for name, value in batch.items():
            if not isinstance(value, Tensor):
                raise InputError(
                    f"the collator returns a {type(value).__name__} as {name!r} for {self.what}; a tensor is needed"
                )
        labels = batch["labels"]  # counted before the model reads them, where only int64 holds -100 beside every class
        return {**batch, "labels": labels.long() if labels.dtype in LABEL_DTYPES else labels}


def _form(data: Any, model: nn.Module, what: str, labelled: bool) -> Form:
    """What all examples look like, from the first one."""
    try:
        first = data[0]
    except (KeyError, IndexError, TypeError, NotImplementedError) as error:
        raise InputError(f"{what}: example 0 cannot be read by its number ({type(error).__name__}: {error})") from None
    task, config, known = str(model.task), cast(Any, model).config, accepted(model)
    vocab = getattr(config, "vocab", None)
    classes = vocab if task.endswith("_lm") else getattr(model, "num_labels", 1)
    form = Form(what, known, task, int(cast(Any, classes) or 1), None if not vocab else int(vocab))
    if isinstance(first, Mapping) and _is_table(data):
        first = {name: _filled(data, name, value) for name, value in first.items()}
    present = form._present(0, first)
    _check_columns(list(first), first, known, what, labelled)
    columns = tuple(name for name in present if labelled or name not in LABEL_NAMES)
    if not labelled:
        return replace(form, columns=columns)
    label = next((name for name in columns if name in LABEL_NAMES), None)
    if label is None:
        raise InputError(f"{what}: example 0 has no label; every example needs one")
    shape = () if task in TOKEN_TASKS else tuple(form._label(0, form._tensor(0, label, first[label])).shape)
    return replace(form, columns=columns, label=shape)


def _filled(data: Any, name: str, value: Any) -> Any:
    """The first value of a column of a table, or another one if that is None: a column that is None throughout is no
    column."""
    if value is not None or name not in data.column_names:
        return value
    return next((part for part in data.with_format(None)[name] if part is not None), None)


def _check_columns(names: list[str], first: Mapping[str, Any], known: Sequence[str], what: str, labelled: bool) -> None:
    """Which columns there are; those that hold texts, or what tokenizers add, are left out with a report."""
    labels = [name for name in LABEL_NAMES if name in names]
    if labelled and len(labels) != 1:
        problem = "has no labels" if not labels else f"has several label columns ({listing(labels)})"
        raise InputError(f"{what} {problem}; one column is named 'labels' or 'label'. Columns: {listing(names)}.")
    tokens = [name for name in ("input_ids", "inputs_embeds") if name in names and first.get(name, ()) is not None]
    if len(tokens) != 1:
        raise InputError(
            f"{what} needs either 'input_ids' or 'inputs_embeds'; tokenise it first. Columns: {listing(names)}."
        )
    ignored = []
    for name in names:
        if name in known or name in LABEL_NAMES:
            continue
        if name not in first or not (isinstance(first[name], str) or name in _UNUSED or first[name] is None):
            raise InputError(
                f"{what} has the column {name!r}, which the model does not read{did_you_mean(name, known)} It reads "
                f"{listing(known)} and labels; "
                "rename the column or remove it."
            )
        ignored.append(name)
    if ignored:
        logging.getLogger("effzoo").warning(
            "%s: the columns %s are not read by the model and left out", what, listing(ignored)
        )


def _check_lengths(lengths: list[int], limit: int, what: str) -> None:
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] > limit:
        too_long = sum(length > limit for length in lengths)
        raise InputError(
            f"{what}: example {longest} has {lengths[longest]} tokens and {too_long} of {len(lengths)} have more "
            f"than the {limit} that fit; "
            f"truncate them to {limit}, or build the model with a larger max_length"
        )


# Of some examples, by name: the number of axes and the shape of each, [rows, axes + 1]; and their numbers, one after
# another.
Columns = dict[str, tuple[Any, Any]]


def _survey(form: Form, parts: Iterator[Columns]) -> tuple[list[int], str, int]:
    """The lengths, a hash of everything that is read, and how many labels count, of examples that are right."""
    streams: dict[str, tuple[Any, Any]] = {}
    lengths: list[int] = []
    counted = 0
    for part in parts:
        tokens = part["input_ids" if "input_ids" in part else "inputs_embeds"]
        lengths += tokens[0][:, 1].tolist()
        for name, (shapes, values) in part.items():
            of_shapes, of_values = streams.setdefault(name, (hashlib.sha256(), hashlib.sha256()))
            of_shapes.update(np.ascontiguousarray(shapes, dtype=np.int64).tobytes())
            of_values.update(
                np.ascontiguousarray(values, dtype=np.float64 if values.dtype.kind == "f" else np.int64).tobytes()
            )
        if "labels" in part:
            shapes, values = part["labels"]
            starts = len(shapes) if form.task == "causal_lm" else 0  # the first label of each is predicted by nothing
            counted += int((values != IGNORED).sum()) - (
                starts and int(sum(values[at] != IGNORED for at in _starts(shapes)))
            )
    whole = hashlib.sha256()
    for name, (of_shapes, of_values) in sorted(streams.items()):
        whole.update(f"{name} {of_shapes.hexdigest()} {of_values.hexdigest()}".encode())
    return lengths, whole.hexdigest()[:16], counted


def _starts(shapes: Any) -> Any:
    return np.concatenate([[0], np.cumsum(shapes[:, 1])[:-1]])


def _row(form: Form, index: int, row: Any) -> Columns:
    """One example, checked."""
    found: Columns = {}
    for name, value in form.checked(index, row).items():
        kind = torch.float64 if value.is_floating_point() else torch.int64
        found[name] = np.array([[value.ndim, *value.shape]]), value.detach().cpu().to(kind).numpy().ravel()
    return found


def _table(data: Any, form: Form) -> Iterator[Columns]:
    """The rows of a table, many at a time where they are plainly right; else one by one, which finds what is wrong."""
    start = 0
    for part in data.with_format("arrow").iter(batch_size=_AT_ONCE):
        columns = {("labels" if name in LABEL_NAMES else name): _plain(part[name]) for name in part.column_names}
        whole = {name: column for name, column in columns.items() if column is not None}
        if len(whole) == len(form.columns) == len(columns) and _plainly_right(whole, form):
            yield whole
        else:
            rows = data.with_format(None).select(range(start, start + len(part)))
            yield from (_row(form, start + index, row) for index, row in enumerate(rows))
        start += len(part)


def _plain(column: Any) -> tuple[Any, Any] | None:
    """Shapes and values of a column of numbers or of lists of numbers without a gap; None for any other."""
    import pyarrow as pa
    import pyarrow.compute

    lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if column.null_count:
        return None
    values = pa.compute.list_flatten(column) if lists else column
    if values.null_count or not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        return None
    if not lists:
        return np.zeros((len(column), 1), dtype=np.int64), values.to_numpy()
    lengths = pa.compute.list_value_length(column).to_numpy()
    return np.column_stack([np.ones(len(lengths), dtype=np.int64), lengths]), values.to_numpy()


def _plainly_right(columns: Columns, form: Form) -> bool:
    """Whether all rows surely pass `Form.checked`, and read as the same numbers."""
    shapes, ids = columns.get("input_ids", (None, None))
    if shapes is None or shapes.shape[1] != 2 or ids.dtype.kind not in "iu" or not shapes[:, 1].all():
        return False
    if form.vocab is not None and not 0 <= ids.min() <= ids.max() < form.vocab:
        return False
    for name, (own, values) in columns.items():
        alone = name == "task_ids" or (name == "labels" and form.task not in TOKEN_TASKS)
        if (
            values.dtype.kind not in "iu"
            or own.shape[1] != (1 if alone else 2)
            or not (alone or np.array_equal(own, shapes))
        ):
            return False
        if name == "labels" and (
            form.classes == 1
            or form.label
            or not (((values >= 0) & (values < form.classes)) | (values == IGNORED)).all()
        ):
            return False
    return True


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_rows(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and isinstance(value[0], Mapping)


def _is_table(data: Any) -> bool:
    return hasattr(data, "column_names") and hasattr(data, "with_format")
