"""Which examples a step sees, how they are padded into one batch, and how many labels of the batch count.

All three are functions of (seed, epoch, step) and the data alone, so that the batches do not depend on how often a run
was interrupted, and the global batch does not depend on how many processes share it. `streams` has the same for data
without a length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from effzoo.checked import IGNORED, LABEL_NAMES, counted
from effzoo.errors import InputError, TrainingError
from effzoo.train.randomness import random_state, set_random_state

if TYPE_CHECKING:
    from effzoo.train.streams import StreamLoader

Example = Mapping[str, Any]
Batch = dict[str, Tensor]
TOKEN_TASKS = ("token_classification", "masked_lm", "causal_lm", "seq2seq_lm")
OF_TARGET = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")

COUNTED = "counted"  # the entry of a batch that holds its number of counted labels
_GROUPED = 50  # optimizer steps whose examples are sorted by length together


def of_target(name: str, task: str) -> bool:
    """Whether a column is as long as the target of an encoder-decoder, and not as the source."""
    return name in OF_TARGET or (name in LABEL_NAMES and task == "seq2seq_lm")


class Order(Sampler[list[int]]):
    """The indices of each batch of one process, as lists.

    A global batch is the next batch_size * processes indices of a permutation; this process takes every P-th of them,
    from its own number on. The last of an epoch may be smaller; nothing is dropped or repeated, so that a process may
    get an empty list.

    size: examples of the data.
    batch_size: examples per process.
    process, processes: the number of this one, and P.
    seed: of the permutation, one for each epoch; None (evaluation) keeps the order of the data, or of the lengths.
    lengths: in tokens; groups examples of similar length, to save padding.
    accumulation: batches of an optimizer step, whose examples are then of similar length as well.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        process: int = 0,
        processes: int = 1,
        seed: int | None = None,
        lengths: Sequence[int] | None = None,
        accumulation: int = 1,
    ):
        self.accumulation = accumulation
        self.size, self.batch_size, self.process, self.processes = size, batch_size, process, processes
        self.seed, self.lengths, self.epoch, self.skip = seed, lengths, 0, 0

    def __len__(self) -> int:
        return -(-self.size // (self.batch_size * self.processes))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.global_batches()[self.skip :]:
            yield batch[self.process :: self.processes]

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """skip: batches of the epoch that are left out, because an earlier run has read them."""
        self.epoch, self.skip = epoch, skip

    def global_batches(self) -> list[list[int]]:
        """Every batch of this epoch, over all processes."""
        step, lengths = self.batch_size * self.processes, self.lengths
        if self.seed is None:
            order = list(range(self.size)) if lengths is None else sorted(range(self.size), key=lengths.__getitem__)
            return _chunks(order, step)
        generator = torch.Generator().manual_seed((self.seed << 24) + self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        if lengths is None:
            return _chunks(order, step)
        together = step * self.accumulation  # so that the steps are the same however often a step accumulates
        groups = [sorted(group, key=lambda index: -lengths[index]) for group in _chunks(order, together * _GROUPED)]
        steps = [examples for group in groups for examples in _chunks(group, together)]
        whole = [examples for examples in steps if len(examples) == together]
        shuffled = [whole[index] for index in torch.randperm(len(whole), generator=generator).tolist()]
        shuffled += [examples for examples in steps if len(examples) < together]
        return [batch for examples in shuffled for batch in _chunks(examples, step)]


def _chunks(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


class Part(NamedTuple):
    """A batch, the numbers of its examples in the data, and whether it is the last of a pass."""

    numbers: list[int]
    batch: Batch
    last: bool


class Loader(DataLoader[Any]):
    """A DataLoader in a given order, with random state of its own: iterating leaves the global generator as it was."""

    def __init__(self, data: Any, order: Order, collate: Callable[[list[Any]], Batch], workers: int, pin_memory: bool):
        super().__init__(
            data,
            batch_sampler=order,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(0),
        )
        self.order = order

    def of_pass(self, epoch: int = 0, skip: int = 0) -> Iterator[Part]:
        """The batches of a pass over the data, from the one with number `skip` on."""
        self.order.set_epoch(epoch, skip)
        count = len(self.order) - skip
        for number, (indices, batch) in enumerate(zip(self.order, self, strict=True), 1):
            yield Part(indices, batch, number == count)


class Steps(Iterator[list[Batch]]):
    """The batches of each optimizer step, pass after pass; the last step of a pass may have fewer.

    epoch, done: the pass that is read, and its steps that were given.
    ended: whether the last step was the last of its pass.

    Raises TrainingError where a pass has no examples.
    """

    def __init__(self, loader: Loader | StreamLoader, accumulation: int):
        self.loader, self.accumulation = loader, accumulation
        self.go_to(0, 0)

    def go_to(self, epoch: int, done: int) -> None:
        """Go on after so many steps of a pass."""
        self.epoch, self.done, self.ended = epoch, done, False
        self.parts: Iterator[Part] | None = None

    def __next__(self) -> list[Batch]:
        if self.ended:
            self.go_to(self.epoch + 1, 0)
        if self.parts is None:
            self.parts = self.loader.of_pass(self.epoch, skip=self.done * self.accumulation)
        parts = list(islice(self.parts, self.accumulation))
        if not parts:
            if not self.done:
                raise TrainingError(f"train gives no examples in pass {self.epoch}; a stream can be read again")
            self.ended = True  # a run is resumed that ended with a pass
            return next(self)
        self.done, self.ended = self.done + 1, parts[-1].last
        return [part.batch for part in parts]


class Pad:
    """Examples -> tensors padded on the right to the longest example, [batch, n].

    input_ids are padded with the model's pad token (0 when it has none), masks and types with 0, labels per token with
    -100. task_ids, one number for each example, are stacked; attention_mask is added when examples differ in length.

    Raises InputError for examples with other columns than the first, or columns of unequal length.
    """

    def __init__(self, task: str, pad_token: int | None, accepted: Sequence[str]):
        self.task, self.accepted = task, tuple(accepted)
        self.fill = {"input_ids": pad_token or 0, "decoder_input_ids": pad_token or 0, "labels": IGNORED}

    def __call__(self, examples: list[Example]) -> Batch:
        columns = dict.fromkeys(name for example in examples for name in example)
        names = [name for name in columns if name in self.accepted or name in LABEL_NAMES]
        tokens = "input_ids" if "input_ids" in names else "inputs_embeds"
        lengths = [len(example[tokens]) for example in examples]
        batch: Batch = {}
        for name in names:
            try:
                values = [torch.as_tensor(example[name]) for example in examples]
            except KeyError:
                raise InputError(
                    f"some examples have the column {name!r} and some have not; give it to all or none"
                ) from None
            entry = "labels" if name in LABEL_NAMES else name
            if entry == "labels" and self.task not in TOKEN_TASKS:
                batch[entry] = torch.stack(
                    [v.to(torch.get_default_dtype()) if v.is_floating_point() else v.long() for v in values]
                )
                continue
            if entry == "task_ids":
                batch[entry] = torch.stack(values).long()
                continue
            for value, length in zip(values, lengths, strict=True):
                if value.ndim == 0 or (len(value) != length and not of_target(name, self.task)):
                    raise InputError(
                        f"{name} of an example has shape {tuple(value.shape)}, its {tokens} has {length} positions"
                    )
            batch[entry] = torch.nn.utils.rnn.pad_sequence(
                values, batch_first=True, padding_value=self.fill.get(entry, 0)
            )
        if "attention_mask" not in batch and min(lengths) < max(lengths):
            batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        return batch


class Counting:
    """A collator that also counts the labels of its batch.

    Every process has to take every step: one that got no example of a small last batch is given `filler`, of which no
    label counts.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], task: str, num_labels: int, filler: Any):
        self.collate, self.task, self.num_labels, self.filler = collate, task, num_labels, filler

    def __call__(self, examples: list[Any]) -> Batch:
        batch = dict(self.collate(examples or [self.filler]))
        count = counted(batch["labels"], self.task, self.num_labels) if examples else torch.tensor(0)
        return {**batch, COUNTED: count}


class CalibrationBatches:
    """The first batches of a training for `effzoo.peft.calibrate`, the same in every process, on a device.

    They are read when somebody iterates, and every global generator is left as it was: a run whose methods do not look
    at data draws the same numbers.
    """

    def __init__(
        self, lists: Callable[[], Iterable[list[Any]]], collate: Callable[[list[Any]], Any], count: int,
        device: torch.device,
    ):  # fmt: skip
        self.lists, self.collate, self.count, self.device = lists, collate, count, device
        self.batches: list[Batch] = []

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __iter__(self) -> Iterator[Batch]:
        if not self.batches:
            state = random_state(self.device)
            for examples in islice(self.lists(), self.count):
                batch = dict(self.collate(examples))
                tensors = {key: x.to(self.device) for key, x in batch.items() if isinstance(x, Tensor)}
                self.batches.append(batch | tensors)
            set_random_state(state, self.device)
        return iter(self.batches)
