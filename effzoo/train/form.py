"""The form of the examples of a model: their columns, shapes and labels, which every example is compared with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effzoo.checked import IGNORED, LABEL_NAMES, UNUSED
from effzoo.errors import InputError, did_you_mean, listing
from effzoo.train.batches import TOKEN_TASKS, of_target

_NO_COLUMNS = ("labels", "cache")  # what a model's forward names beside the columns of data


def accepted(model: nn.Module) -> tuple[str, ...]:
    """The inputs that a model's forward names, without the labels."""
    return tuple(name for name in inspect.signature(model.forward).parameters if name not in _NO_COLUMNS)


@dataclass(frozen=True)
class Form:
    """What the examples of a model look like.

    what: the name of the data in errors.
    read: the columns that the model reads.
    task: of the model, which says what labels are.
    classes: how many labels there are; of a language model, its vocabulary.
    vocab: token ids lie below it; None where they are not looked up.
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
        """The columns that are read of one example, as tensors; labels are named so. Raises InputError."""
        present = self.present(index, row)
        if set(present) != set(self.columns):
            self._refuse_columns(index, present)
        example = {}
        for name in self.columns:
            example["labels" if name in LABEL_NAMES else name] = self.tensor(index, name, present[name])
        self._check_tokens(index, example)
        if "labels" in example:
            example["labels"] = self.label_of(index, example["labels"])
            self._check_answer(index, example)
        return example

    def _refuse_columns(self, index: int, present: Mapping[str, Any]) -> None:
        wanted, there = set(self.columns), present.keys()
        missing, strange = sorted(wanted - there, key=str), sorted(there - wanted, key=str)
        if missing and missing[0] in LABEL_NAMES:
            raise InputError(f"{self.what}: example {index} has no label; every example needs one")
        self._check_known(index, strange)
        lack = f"lacks {missing[0]!r}, which {'example 0' if index else 'another example'} has" if missing else ""
        raise InputError(
            f"{self.what}: example {index} {lack or f'has {strange[0]!r}, which example 0 lacks'}; "
            "give a column to every example or to none (None counts as missing)"
        )

    def present(self, index: int, row: Any) -> dict[str, Any]:
        """What an example has of the columns that count: all but None, texts and the numbers that tokenizers add."""
        if not isinstance(row, Mapping):
            raise InputError(
                f"{self.what}: example {index} is a {type(row).__name__}, not a mapping of columns such as "
                f"{{'input_ids': [...], 'labels': 0}}"
            )
        wanted = {*self.read, *(LABEL_NAMES if self.label is not None or not self.columns else ())}
        columns = {name: value for name, value in row.items() if value is not None}
        ignored = [name for name, value in columns.items() if isinstance(value, str)]
        ignored += [*LABEL_NAMES, *UNUSED]
        return {name: value for name, value in columns.items() if name in wanted or name not in ignored}

    def _check_known(self, index: int, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.read and name not in LABEL_NAMES:
                raise InputError(
                    f"{self.what}: example {index} has the column {name!r}, which the model does not "
                    f"read{did_you_mean(name, self.read)} It reads {listing(self.read)} and labels; rename the column "
                    "or remove it."
                )

    def tensor(self, index: int, name: str, value: Any) -> Tensor:
        """A value as a tensor: floats and booleans as they are, integers as int64. Raises InputError."""
        if isinstance(value, str) and name in LABEL_NAMES:
            raise InputError(
                f"{self.what}: example {index} has the label {value!r}; labels are integers, "
                "effzoo.data.load_text maps names to them"
            )
        try:
            first = value[0] if isinstance(value, (list, tuple)) and value else value
            numpy = isinstance(first, (np.ndarray, np.generic))
            tensor = torch.as_tensor(np.asarray(value) if numpy else value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise InputError(
                f"{self.what}: example {index}: {name} is {short(value)}, which is no array of numbers ({error})"
            ) from None
        if tensor.is_complex():
            raise InputError(
                f"{self.what}: example {index}: {name} is {short(value)}, complex numbers, which no model reads"
            )
        if tensor.dtype == torch.uint64 and bool((tensor.view(torch.int64) < 0).any()):
            raise InputError(
                f"{self.what}: example {index}: {name} is {short(value)}, with a number that does not fit into 63 bits"
            )
        return tensor if tensor.is_floating_point() or tensor.dtype == torch.bool else tensor.long()

    def _check_tokens(self, index: int, example: Mapping[str, Tensor]) -> None:
        tokens = "input_ids" if "input_ids" in example else "inputs_embeds"
        ids, where = example[tokens], f"{self.what}: example {index}"
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
        for name, value in example.items():
            if name in (tokens, "task_ids") or (name == "labels" and self.task not in TOKEN_TASKS):
                continue
            if value.ndim == 0 or (len(value) != len(ids) and not of_target(name, self.task)):
                raise InputError(
                    f"{where}: {name} has shape {tuple(value.shape)}, its {tokens} has {len(ids)} positions"
                )
        task = example.get("task_ids")
        if task is not None and (task.ndim or task.is_floating_point()):
            raise InputError(f"{where}: task_ids is one integer, got {short(task.tolist())}")

    def _check_answer(self, index: int, example: Mapping[str, Tensor]) -> None:
        """Refuse an answer that is not within its example."""
        if self.task != "question_answering":
            return
        label, tokens = example["labels"], len(example["input_ids" if "input_ids" in example else "inputs_embeds"])
        if bool(((label != IGNORED) & ((label < 0) | (label >= tokens))).any()):
            raise InputError(
                f"{self.what}: example {index} has the label {label.tolist()}, its tokens are 0 to {tokens - 1}"
            )

    def label_of(self, index: int, label: Tensor) -> Tensor:
        """The label, of the kind that the first example has. Raises InputError.

        A class is an integer, an answer two (its first and last token), regression takes any finite number, several
        labels at once are floats from 0 to 1.
        """
        where, one_each = f"{self.what}: example {index}", self.task not in TOKEN_TASKS
        if one_each and self.label is not None and tuple(label.shape) != self.label:
            raise InputError(
                f"{where} has a label of shape {tuple(label.shape)}, example 0 one of shape "
                f"{self.label}; give all the same"
            )
        if self.task == "question_answering":
            if tuple(label.shape) != (2,) or label.is_floating_point():
                raise InputError(
                    f"{where} has the label {short(label.tolist())}; a label is two integers, the first and the last "
                    "token of the answer"
                )
            return label.long()
        if one_each and self.classes == 1:
            if label.numel() != 1 or not bool(torch.isfinite(label).all()):
                raise InputError(
                    f"{where} has the label {short(label.tolist())}; with num_labels=1 a label is one finite number"
                )
            return label.to(torch.get_default_dtype())
        if one_each and label.ndim:
            if not label.is_floating_point() or tuple(label.shape) != (self.classes,):
                raise InputError(
                    f"{where} has the label {short(label.tolist())}; a label is an integer from 0 to "
                    f"{self.classes - 1}, or a list of {self.classes} floats where several labels may hold"
                )
            if not bool(((label >= 0) & (label <= 1)).all()):
                raise InputError(
                    f"{where} has the label {short(label.tolist())}; where several labels may hold, "
                    "each is a number from 0 to 1"
                )
            return label
        if label.is_floating_point():
            raise InputError(
                f"{where} has the label {short(label.tolist())}; labels are integers, floats are for num_labels=1"
            )
        wrong = label[(label != IGNORED) & ((label < 0) | (label >= self.classes))]
        if wrong.numel():
            raise InputError(
                f"{where} has the label {int(wrong.flatten()[0])}, the model has {self.classes} classes (0 to "
                f"{self.classes - 1}); check num_labels"
            )
        return label.long()


def short(value: Any) -> str:
    """A value as Python writes it, in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
