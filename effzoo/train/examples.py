"""The examples of a run: every one is checked, before the first step where that is cheap, else when it is read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from effzoo.architectures import Transformer
from effzoo.architectures.heads import LABEL_DTYPES
from effzoo.checked import IGNORED, LABEL_NAMES, UNUSED
from effzoo.errors import InputError, did_you_mean, listing
from effzoo.sites import prompt_length
from effzoo.train.batches import TOKEN_TASKS
from effzoo.train.form import Form, accepted, short
from effzoo.train.streams import Stream
from effzoo.train.survey import of_list, of_table, survey


class Examples(Dataset[dict[str, Tensor]]):
    """Examples as tensors of the columns that a model reads.

    limit: the most tokens that fit.
    lengths: in tokens; None for data whose rows are read only when they are asked for.
    digest: a hash of all that is read, the same for a list and a table of the same rows. Data whose rows are read when
        asked for have their text `fingerprint`, or None.
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
            rows = self.data.__getitems__(list(indices))
            return [self._checked(index, row) for index, row in zip(indices, rows, strict=True)]
        return [self[index] for index in indices]

    def _checked(self, index: int, row: Any) -> dict[str, Tensor]:
        return _read(self.form, self.limit, index, row)


def _read(form: Form, limit: int | None, index: int, row: Any) -> dict[str, Tensor]:
    """An example as tensors, checked."""
    example = form.checked(index, row)
    tokens = tokens_of(example)
    if limit is not None and tokens > limit:
        raise InputError(
            f"{form.what}: example {index} has {tokens} tokens, {limit} fit; truncate it, or build with a larger "
            "max_length"
        )
    return example


def tokens_of(example: Mapping[str, Tensor]) -> int:
    """How many tokens an example has."""
    return len(example["input_ids" if "input_ids" in example else "inputs_embeds"])


def examples(data: Any, model: nn.Module, what: str, *, labelled: bool = True) -> Examples:
    """The examples of a model: all are checked where they are a list or a table, and each when it is read in any case.

    data: a `datasets.Dataset`, a list of mappings, or any map-style data set of mappings. Text columns and a few
        known numbers are left out with a report.
    what: the name of the data in errors.
    labelled: whether labels are needed; else they are left out.

    Raises InputError for everything that would be read wrongly: no labels, unknown columns, a column that some examples
        lack, labels out of range, sequences that do not fit.
    """
    sized(data, what)
    form = _form(_first(data, what), model, what, labelled)
    # of predictions, the model itself says it
    limit = most_tokens(model) if labelled else None
    if _is_table(data) and data.format["type"] != "custom":  # else a transform runs when an example is read
        data = data.select_columns([name for name in data.column_names if name in form.columns])
        lengths, digest, counted = survey(form, of_table(data, form))
    elif isinstance(data, Sequence):
        lengths, digest, counted = survey(form, of_list(data, form))
    else:
        fingerprint = getattr(data, "fingerprint", None)
        return Examples(data, form, limit, digest=fingerprint if isinstance(fingerprint, str) else None)
    if limit is not None:
        _check_lengths(lengths, limit, what)
    if labelled and not counted:
        raise InputError(
            f"{what}: no label of any example counts (all are {IGNORED}, or before the first position "
            "that is predicted)"
        )
    return Examples(data, form, limit, lengths, digest)


def streamed(data: Any, model: nn.Module, what: str) -> Stream:
    """The examples of a model, of which each is checked when it is read. Raises InputError as `examples` does."""
    stream = Stream(data, what)
    stream.read = partial(_read, _form(stream.first_row, model, what, labelled=True), most_tokens(model))
    stream.read(0, stream.first_row)
    return stream


def most_tokens(model: nn.Module) -> int:
    """The most tokens that fit."""
    return int(cast(Any, model).config.max_length) - prompt_length(model)


def fits_teacher(lengths: Sequence[int], teacher: Transformer) -> None:
    """Raise InputError when a teacher cannot read the longest examples of its student."""
    limit = teacher.config.max_length - prompt_length(teacher)
    if max(lengths) > limit:
        raise InputError(
            f"the longest example has {max(lengths)} tokens, the teacher reads {limit}; truncate them to {limit}, or "
            "build the teacher with a larger max_length"
        )


def sized(data: Any, what: str) -> None:
    """Raise InputError for what is no map-style data set with at least one example."""
    if isinstance(data, (str, bytes)) or hasattr(data, "__fspath__"):
        raise InputError(
            f"{what} is {str(data)[:99]!r}; examples are needed: effzoo.data.load_text reads a file, "
            "effzoo.data.tokenise makes them of it"
        )
    if isinstance(data, Mapping):
        splits = all(hasattr(value, "column_names") or _is_list_of_mappings(value) for value in data.values())
        hint = "give a list of rows, or datasets.Dataset.from_dict(...) of these columns"
        hint = "give one of them" if splits else hint
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
    by_index = hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, IterableDataset)
    if not by_index or isinstance(data, type) or getattr(data, "ndim", 1) == 0:
        raise InputError(
            f"{what} needs a length and access by index, as a list or a datasets.Dataset has; got {short(data)}. "
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
    """A user's collator, whose batches are checked. Raises InputError for one that is no input of the model."""

    def __init__(self, collator: Callable[[list[Any]], Any], known: Sequence[str], what: str):
        self.collator, self.known, self.what = collator, tuple(known), what

    def __call__(self, examples: list[Any]) -> Mapping[str, Tensor]:
        batch = self.collator(examples)
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


def _first(data: Any, what: str) -> Any:
    """The first row, with the first value of each column of a table that is not None."""
    try:
        first = data[0]
    except (KeyError, IndexError, TypeError, NotImplementedError) as error:
        raise InputError(f"{what}: example 0 cannot be read by its number ({type(error).__name__}: {error})") from None
    if isinstance(first, Mapping) and _is_table(data):
        return {name: _filled(data, name, value) for name, value in first.items()}
    return first


def _form(first: Any, model: nn.Module, what: str, labelled: bool) -> Form:
    """What all examples look like, from the first one."""
    task, config, known = str(model.task), cast(Any, model).config, accepted(model)
    vocab = getattr(config, "vocab", None)
    classes = vocab if task.endswith("_lm") else getattr(model, "num_labels", 1)
    form = Form(what, known, task, int(cast(Any, classes) or 1), None if not vocab else int(vocab))
    present = form.present(0, first)
    _check_columns(list(first), first, known, what, labelled)
    columns = tuple(name for name in present if labelled or name not in LABEL_NAMES)
    if not labelled:
        return replace(form, columns=columns)
    label = next((name for name in columns if name in LABEL_NAMES), None)
    if label is None:
        raise InputError(f"{what}: example 0 has no label; every example needs one")
    shape = () if task in TOKEN_TASKS else tuple(form.label_of(0, form.tensor(0, label, first[label])).shape)
    return replace(form, columns=columns, label=shape)


def _filled(data: Any, name: str, value: Any) -> Any:
    """The first value of a column of a table that is not None; None throughout makes no column."""
    if value is not None or name not in data.column_names:
        return value
    return next((value for value in data.with_format(None)[name] if value is not None), None)


def _check_columns(names: list[str], first: Mapping[str, Any], known: Sequence[str], what: str, labelled: bool) -> None:
    """Refuse columns that are not read; those of texts, and what tokenizers add, are left out with a report."""
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
        if name not in first or not (isinstance(first[name], str) or name in UNUSED or first[name] is None):
            raise InputError(
                f"{what} has the column {name!r}, which the model does not read{did_you_mean(name, known)} It reads "
                f"{listing(known)} and labels; rename the column or remove it."
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
            f"than the {limit} that fit; truncate them to {limit}, or build the model with a larger max_length"
        )


def _is_list_of_mappings(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and isinstance(value[0], Mapping)


def _is_table(data: Any) -> bool:
    return hasattr(data, "column_names") and hasattr(data, "with_format")
