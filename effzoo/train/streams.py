"""Streams: examples that are read one after another, each pass from the beginning, and of which nobody knows how many.

`datasets.IterableDataset`, `torch.utils.data.IterableDataset` and any other iterable that can be read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from effzoo.errors import InputError
from effzoo.train.batches import Batch, Part

Numbered = tuple[list[int], list[Any], bool]


class Stream:
    """The examples of an iterable, each made by `read(number, row)` when it is wanted.

    first: the first one.

    Raises InputError for one that can be read once only, and for an empty one.
    """

    lengths = None

    def __init__(self, data: Any, what: str):
        self.data, rows = data, iter(data)
        if rows is data:
            raise InputError(
                f"{what} is a {type(data).__name__}, which can be read once; a stream is read anew for each pass and "
                "to resume: give a datasets.IterableDataset, an object whose __iter__ starts anew, or a list"
            )
        nothing = object()
        self.first_row = next(rows, nothing)
        if self.first_row is nothing:
            raise InputError(f"{what} is empty")
        fingerprint = getattr(data, "fingerprint", None)
        self.digest = fingerprint if isinstance(fingerprint, str) else None
        self.read: Callable[[int, Any], Any] = lambda _, row: row

    def rows(self, epoch: int) -> Iterator[tuple[int, Any]]:
        """The rows of a pass with their numbers, unread."""
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)
        return enumerate(self.data)

    @property
    def first(self) -> Any:
        return self.read(0, self.first_row)


class Checked:
    """The examples of a stream, read, each time from the beginning."""

    def __init__(self, stream: Stream):
        self.stream, self.epoch, self.fingerprint = stream, 0, stream.digest

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        return (self.stream.read(number, row) for number, row in self.stream.rows(self.epoch))


def is_stream(data: Any) -> bool:
    """Whether examples can be iterated and not be asked for by number."""
    if isinstance(data, (str, bytes, type, Mapping, DataLoader)) or hasattr(data, "iloc"):
        return False
    return isinstance(data, IterableDataset) or (hasattr(data, "__iter__") and not hasattr(data, "__getitem__"))


class StreamOrder(IterableDataset[Numbered]):
    """The batches of one process: of the next batch_size * processes examples every P-th, as in `Order`.

    Each is (numbers of its examples, the examples, whether it is the last of the pass). What an earlier run has read is
    read once more and left out, which is exact whatever the stream does.
    """

    def __init__(self, stream: Stream, batch_size: int, *, process: int = 0, processes: int = 1):
        self.stream, self.size, self.process, self.processes = stream, batch_size * processes, process, processes
        self.epoch, self.skip = 0, 0

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """skip: batches of the pass that are left out."""
        self.epoch, self.skip = epoch, skip

    def __iter__(self) -> Iterator[Numbered]:
        rows = islice(self.stream.rows(self.epoch), self.skip * self.size, None)
        waiting = list(islice(rows, self.size))
        while waiting:
            following = list(islice(rows, 1))
            own = waiting[self.process :: self.processes]
            read = self.stream.read
            yield [number for number, _ in own], [read(number, row) for number, row in own], not following
            waiting = following and [*following, *islice(rows, self.size - 1)]


class StreamLoader(DataLoader[Any]):
    """A DataLoader of a stream, with random state of its own."""

    def __init__(self, order: StreamOrder, collate: Callable[[list[Any]], Batch], pin_memory: bool):
        of_part: Any = _Collate(collate)
        super().__init__(
            order, batch_size=None, collate_fn=of_part, pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        self.order = order

    def of_pass(self, epoch: int = 0, skip: int = 0) -> Iterator[Part]:
        """The batches of a pass over the data, from the one with number `skip` on."""
        self.order.set_epoch(epoch, skip)
        return (Part(*values) for values in self)


class _Collate:
    def __init__(self, collate: Callable[[list[Any]], Batch]):
        self.collate = collate

    def __call__(self, part: Numbered) -> tuple[list[int], Batch, bool]:
        numbers, examples, last = part
        return numbers, self.collate(examples), last
