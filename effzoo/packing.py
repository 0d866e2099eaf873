"""Short documents joined into long rows, in which they do not see each other (`effzoo.data.pack`)."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from effzoo.annotations import Count, Seed
from effzoo.checked import IGNORED, LABEL_NAMES, UNUSED
from effzoo.errors import DataError, listing, shown

TASKS = ("causal_lm", "masked_lm", "token_classification")


class Packed(Sequence[dict[str, Tensor]]):
    """Rows of documents, each made when it is asked for.

    documents: the numbers of the documents of each row, in their order there.
    lengths: of the rows, in tokens.
    length: the most tokens of a row.
    full: the share of rows times length that holds tokens.
    """

    def __init__(self, data: Any, documents: list[list[int]], lengths: list[int], length: int, task: str):
        self.data, self.documents, self.lengths, self.length, self.task = data, documents, lengths, length, task
        self.full = sum(lengths) / (len(lengths) * length)
        self.digest = getattr(data, "digest", None)

    def __len__(self) -> int:
        return len(self.documents)

    @overload
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Tensor]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        numbers = self.documents[index]
        return joined([(number, self.data[number]) for number in numbers], self.task)

    def __repr__(self) -> str:
        documents = sum(map(len, self.documents))
        return f"{documents:,} documents in {len(self):,} rows of up to {self.length} tokens, {self.full:.1%} full"


class PackedStream:
    """The rows of a stream of documents, of which `window` at a time are packed."""

    def __init__(self, data: Iterable[Any], length: int, task: str, seed: int, window: int):
        self.data, self.length, self.task, self.seed, self.window = data, length, task, seed, window
        self.epoch = 0
        if isinstance(fingerprint := getattr(data, "fingerprint", None), str):
            self.fingerprint = f"{fingerprint} packed {length} {seed} {window}"

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        random = np.random.RandomState((self.seed * 1_000_003 + self.epoch) % 2**32)
        waiting: list[tuple[int, Any]] = []
        for number, document in enumerate(self.data):
            waiting.append((number, document))
            if len(waiting) == self.window:
                yield from self._rows(waiting, random)
                waiting = []
        yield from self._rows(waiting, random)

    def _rows(self, documents: list[tuple[int, Any]], random: np.random.RandomState) -> Iterator[dict[str, Tensor]]:
        lengths = [_length(number, document, self.length) for number, document in documents]
        rows = fitted(lengths, self.length)
        return (joined([documents[place] for place in rows[row]], self.task) for row in random.permutation(len(rows)))


def pack(
    data: Any, max_length: Count, *, task: str = "causal_lm", seed: Seed = 0, window: Count = 2000
) -> Packed | PackedStream:
    """Tokenised documents joined into rows of up to `max_length` tokens: nothing is cut, lost or repeated.

    `document_ids` 1, 1, ..., 2, 2, ... say to the model which tokens belong together: each document is computed as it
    is alone, and its positions start again. `print` of the result says how full the rows are.

    data: documents as `tokenise` gives them, with columns of one entry per token: a table, a list, any map-style data
        set, or a stream (an iterable that can be read again), of which the result is one.
    max_length: of the rows, in tokens; that of the model is the most that it reads.
    task: "causal_lm" leaves out the label of the first token of each document, which nothing predicts; "masked_lm" and
        "token_classification" keep every label.
    seed: of the order in which documents are taken.
    window: documents that are packed together, longest first, each into the fullest row that has room (best-fit
        decreasing): larger fills better.

    Raises DataError for a document that does not fit into a row, and for one that has one label as a whole.
    """
    check_task(task)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        if not len(data):
            raise DataError("there are no documents to pack")
        return packed(data, _lengths(data, max_length), max_length, task, seed, window)
    if not hasattr(data, "__iter__") or iter(data) is data:
        raise DataError(f"documents are in a table, a list or a stream that can be read again, got {shown(data)}")
    return PackedStream(data, max_length, task, seed, window)


def check_task(task: str) -> None:
    """Raise DataError for a task whose rows hold one document each."""
    if task == "classification":
        raise DataError(
            "classification has one label per row, so a row holds one document; group_by_length of finetune saves "
            "padding"
        )
    if task not in TASKS:
        raise DataError(f"task is one of {listing(TASKS)}, got {task!r}")


def packed(data: Any, lengths: Sequence[int], length: int, task: str, seed: int = 0, window: int = 2000) -> Packed:
    """Documents of known lengths as rows; `pack` for the arguments."""
    order: list[int] = np.random.RandomState(seed).permutation(len(lengths)).tolist()
    rows: list[list[int]] = []
    for start in range(0, len(order), window):
        numbers = order[start : start + window]
        rows += [[numbers[place] for place in row] for row in fitted([lengths[i] for i in numbers], length)]
    return Packed(data, rows, [sum(lengths[number] for number in row) for row in rows], length, task)


def fitted(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Which of the lengths go into each row: longest first, each into the fullest row that has room.

    Best-fit decreasing: at most 11/9 of the fewest rows, and 4 more (Johnson 1974, Fast algorithms for bin packing).
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens that are free, row), sorted
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        at = bisect_left(room, (lengths[place], 0))
        if at == len(room):
            rows.append([])
            free, row = length, len(rows) - 1
        else:
            free, row = room.pop(at)
        rows[row].append(place)
        insort(room, (free - lengths[place], row))
    return rows


def joined(documents: Sequence[tuple[int, Mapping[str, Any]]], task: str) -> dict[str, Tensor]:
    """One row of documents with their numbers, one after another."""
    columns: dict[str, list[Tensor]] = {}
    lengths = []
    for number, document in documents:
        tokens = len(document[_tokens_of(document)])
        lengths.append(tokens)
        for name, value in _per_token(number, document, tokens).items():
            columns.setdefault("labels" if name in LABEL_NAMES else name, []).append(value)
    for name, values in columns.items():
        if len(values) != len(documents):
            numbers = ", ".join(str(number) for number, _ in documents)
            raise DataError(f"some of the documents {numbers} have the column {name!r} and some have not")
    if task == "causal_lm" and "labels" in columns:
        columns["labels"] = [torch.cat([x.new_full((1,), IGNORED), x[1:]]) for x in columns["labels"]]
    row = {name: torch.cat(values) for name, values in columns.items()}
    return {**row, "document_ids": torch.arange(1, len(documents) + 1).repeat_interleave(torch.tensor(lengths))}


def _per_token(number: int, document: Mapping[str, Any], tokens: int) -> dict[str, Tensor]:
    """The columns with one entry per token; texts and the numbers of tokenizers are left out."""
    columns = {}
    for name, value in document.items():
        if value is None or isinstance(value, str) or name in UNUSED:
            continue
        tensor = torch.as_tensor(value)
        if tensor.ndim == 0 or len(tensor) != tokens:
            raise DataError(
                f"example {number}: {name} has shape {tuple(tensor.shape)}, not one entry for each of {tokens} tokens, "
                "so it has no place in a row of several documents"
            )
        columns[name] = tensor
    return columns


def _tokens_of(document: Mapping[str, Any]) -> str:
    return "input_ids" if document.get("input_ids") is not None else "inputs_embeds"


def _length(number: int, document: Any, most: int) -> int:
    """The tokens of a document. Raises DataError for none, and for more than a row holds."""
    if not isinstance(document, Mapping) or document.get(_tokens_of(document)) is None:
        raise DataError(f"example {number} is no mapping with 'input_ids' or 'inputs_embeds'; tokenise it first")
    return _fits(number, len(document[_tokens_of(document)]), most)


def _fits(number: int, tokens: int, most: int) -> int:
    if not 1 <= tokens <= most:
        problem = (
            f"has {tokens} tokens, a row {most}; truncate it, or give a larger max_length" if tokens else "is empty"
        )
        raise DataError(f"example {number} {problem}")
    return tokens


def _lengths(data: Any, most: int) -> list[int]:
    """Of the documents, in tokens."""
    if hasattr(data, "with_format") and "input_ids" in getattr(data, "column_names", ()):
        import pyarrow.compute

        lengths: list[Any] = []
        for part in data.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000):
            lengths += pyarrow.compute.list_value_length(part["input_ids"]).to_pylist()
        return [_fits(number, tokens or 0, most) for number, tokens in enumerate(lengths)]
    return [_length(number, data[number], most) for number in range(len(data))]
