"""Checks of training data before the first step: the columns, their lengths, the labels."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from effzoo.architectures import Transformer
from effzoo.architectures.heads import IGNORED
from effzoo.errors import InputError, did_you_mean, listing
from effzoo.sites import prompt_rows
from effzoo.train.batches import LABEL_NAMES

_UNUSED = {  # numbers that tokenizers and data sets carry beside what a model reads
    "id", "idx", "index", "length", "special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "num_truncated_tokens",
}  # fmt: skip


def accepted(model: nn.Module) -> tuple[str, ...]:
    """The inputs that a model's forward names, without the labels."""
    return tuple(name for name in inspect.signature(model.forward).parameters if name != "labels")


def check(data: Any, model: Transformer, what: str) -> tuple[Any, list[int] | None]:
    """The data with the columns that the model reads, and the length of each example in tokens (None when only reading each would tell).

    data: a `datasets.Dataset`, a list of mappings, or any map-style data set of mappings; of the last only the first example is
    looked at. Text columns and a few known numbers are left out with a report. Raises InputError for everything that would train on
    the wrong thing: no labels, unknown columns, labels out of range, sequences that do not fit.
    """
    sized(data, what)
    names = list(data.column_names) if _is_arrow(data) else list(data[0])
    label = _check_columns(names, {name: data[0][name] for name in names}, accepted(model), what)
    limit = model.config.max_length - prompt_rows(model)
    tokens = "input_ids" if "input_ids" in names else "inputs_embeds"
    if _is_arrow(data):
        unused = [name for name in names if name not in accepted(model) and name not in LABEL_NAMES]
        data = data.remove_columns(unused)
        if data.format["type"] == "custom":  # a transform that runs when an example is read
            return data, None
        lengths, labels = _columns_of_arrow(data, tokens, label)
    elif isinstance(data, Sequence):
        lengths, labels = [len(row[tokens]) for row in data], [row[label] for row in data]
    else:
        lengths, labels = [len(data[0][tokens])], [data[0][label]]
    _check_lengths(lengths, limit, what)
    if model.task == "classification" and model.num_labels > 1:
        _check_classes(labels, model.num_labels, what)
    return data, lengths if len(lengths) == len(data) else None


def fits_teacher(lengths: Sequence[int], teacher: Transformer) -> None:
    """Raise InputError when a teacher cannot read the longest examples of its student."""
    limit = teacher.config.max_length - prompt_rows(teacher)
    if max(lengths) > limit:
        raise InputError(
            f"the longest example has {max(lengths)} tokens, the teacher reads {limit}; truncate them to {limit}, or build the teacher with a larger "
            "max_length"
        )


def sized(data: Any, what: str) -> None:
    """Raise InputError for what is no map-style data set with at least one example."""
    if isinstance(data, Mapping):
        raise InputError(f"{what} is a mapping of {listing(map(str, data))}; give one of them")
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise InputError(f"{what} needs a length and access by index, as a list or a datasets.Dataset has; got {type(data).__name__}")
    if len(data) == 0:
        raise InputError(f"{what} is empty")


def check_batch(batch: Any, model: Transformer, what: str) -> None:
    """Raise InputError when what a user's collator returns is no input of the model."""
    if not isinstance(batch, Mapping):
        raise InputError(f"the collator returns {type(batch).__name__} for {what}; a mapping of tensors is needed")
    _check_columns(list(batch), dict(batch), accepted(model), f"what the collator returns for {what}", strict=True)
    if "labels" not in batch:
        raise InputError(f"the collator returns no 'labels' for {what}, only {listing(batch)}")


def _check_columns(names: list[str], first: Mapping[str, Any], known: Sequence[str], what: str, strict: bool = False) -> str:
    labels = [name for name in LABEL_NAMES if name in names]
    if len(labels) != 1:
        problem = "has no labels" if not labels else f"has several label columns ({listing(labels)})"
        raise InputError(f"{what} {problem}; one column is named 'labels' or 'label'. Columns: {listing(names)}.")
    if ("input_ids" in names) == ("inputs_embeds" in names):
        raise InputError(f"{what} needs either 'input_ids' or 'inputs_embeds'; tokenise it first. Columns: {listing(names)}.")
    ignored = []
    for name in names:
        if name in known or name in LABEL_NAMES:
            continue
        if strict or not (isinstance(first[name], str) or name in _UNUSED):
            raise InputError(
                f"{what} has the column {name!r}, which the model does not read{did_you_mean(name, known)} It reads {listing(known)} and labels; "
                "rename the column or remove it."
            )
        ignored.append(name)
    if ignored:
        logging.getLogger("effzoo").warning("%s: the columns %s are not read by the model and left out", what, listing(ignored))
    return labels[0]


def _check_lengths(lengths: list[int], limit: int, what: str) -> None:
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] > limit:
        too_long = sum(length > limit for length in lengths)
        raise InputError(
            f"{what}: example {longest} has {lengths[longest]} tokens and {too_long} of {len(lengths)} have more than the {limit} that fit; "
            f"truncate them to {limit}, or build the model with a larger max_length"
        )
    if min(lengths) == 0:
        raise InputError(f"{what}: example {lengths.index(0)} is empty")


def _check_classes(labels: Iterable[Any], classes: int, what: str) -> None:
    for index, label in enumerate(labels):
        value = label.item() if isinstance(label, Tensor) and label.ndim == 0 else label
        if value is None:
            raise InputError(f"{what}: example {index} has no label")
        if isinstance(value, int) and not (0 <= value < classes or value == IGNORED):
            raise InputError(f"{what}: example {index} has the label {value}, the model has {classes} classes (0 to {classes - 1}); check num_labels")
        if isinstance(value, str):
            raise InputError(f"{what}: example {index} has the label {value!r}; labels are integers, effzoo.data.load_text maps names to them")


def _columns_of_arrow(data: Any, tokens: str, label: str) -> tuple[list[int], list[Any]]:
    import pyarrow.compute

    lengths: list[int] = []
    labels: list[Any] = []
    for part in data.with_format("arrow").iter(batch_size=10_000):
        lengths += pyarrow.compute.list_value_length(part[tokens]).to_pylist()
        labels += part[label].to_pylist() if not str(part[label].type).startswith(("list", "large_list", "fixed_size_list")) else []
    return lengths, labels


def _is_arrow(data: Any) -> bool:
    return hasattr(data, "column_names") and hasattr(data, "with_format")
