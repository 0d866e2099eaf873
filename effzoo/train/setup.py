"""A run that has not begun: its record and its batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from effzoo.architectures import Transformer
from effzoo.arguments import LARGEST
from effzoo.errors import OptionError
from effzoo.packing import Packed
from effzoo.peft.training import hooked, learning_rates
from effzoo.train.batches import CalibrationBatches, Counting, Loader, Order, Pad
from effzoo.train.examples import Collated, Examples, Raw
from effzoo.train.form import accepted
from effzoo.train.record import adapters, name_of, of_model, rates
from effzoo.train.settings import Every, Optimisation, Saving
from effzoo.train.stages import StageSpan
from effzoo.train.streams import Stream, StreamLoader, StreamOrder
from effzoo.train.teaching import Teaching, fingerprint


@dataclass(frozen=True)
class Setup:
    """What `finetune` was given, checked.

    processes, process: how many there are, and which of them this is.
    learning_rate: None for each method's own.
    """

    model: Transformer
    train: Examples | Raw | Stream | Packed
    evaluate: Examples | Raw | Stream | None
    output_dir: Path
    epochs: float
    max_steps: int | None
    batch_size: int
    learning_rate: float | None
    precision: str
    group_by_length: bool
    packing: bool
    num_workers: int
    seed: int
    teaching: Teaching | None
    optimisation: Optimisation
    saving: Saving
    collator: Callable[[list[Any]], Mapping[str, Any]] | None
    processes: int
    process: int

    @property
    def steps_per_epoch(self) -> int | None:
        """None for a stream."""
        if isinstance(self.train, Stream):
            return None
        return math.ceil(len(self.train) / (self.batch_size * self._batches_of_step))

    @property
    def _batches_of_step(self) -> int:
        """Of all processes."""
        return self.optimisation.gradient_accumulation * self.processes

    @property
    def steps(self) -> int:
        """Of the whole run. Raises OptionError for more than can be counted."""
        steps = self.max_steps or math.ceil(self.epochs * (self.steps_per_epoch or 0))
        if steps > LARGEST:
            raise OptionError(
                f"epochs={self.epochs!r} of {self.steps_per_epoch:,} steps are more than {LARGEST:,} steps; "
                "train shorter"
            )
        return steps

    @property
    def largest_rate(self) -> float:
        """The largest learning rate of a trained tensor."""
        return max(learning_rates(self.model, self.learning_rate).values(), default=self.learning_rate or 0.0)

    def check_decay(self) -> None:
        """OptionError for a weight decay that leaves nothing of a weight after one step."""
        decay = self.optimisation.weight_decay
        rate = self.largest_rate * max([1.0, *self.optimisation.rates.values()])
        if decay >= 1 and rate * decay >= 1:
            raise OptionError(
                f"weight_decay={decay:g} at learning rate {rate:g} takes all of every weight in one step; give less "
                f"than {1 / rate:g}"
            )

    def record(self, stages: Sequence[StageSpan]) -> dict[str, Any]:
        """What a checkpoint must share with this run to be resumed by it."""
        run, teaching = self.optimisation, self.teaching
        examples = None if isinstance(self.train, Stream) else len(self.train)
        record = {
            "adapters": adapters(self.model), "examples": examples, "steps": self.steps, "seed": self.seed,
            "processes": self.processes, "batch_size": self.batch_size,
            "gradient_accumulation": run.gradient_accumulation, "group_by_length": self.group_by_length,
            **rates(self.model, self.learning_rate), "weight_decay": run.weight_decay, "warmup": run.warmup,
            "schedule": run.schedule, **self._optimizer(), "clip": run.clip, "precision": self.precision,
            "collator": name_of(self.collator), "data": self.train.digest,
            "evaluation": None if self.evaluate is None else self.evaluate.digest, "best": self.saving.best,
            "model": of_model(self.model),
            "distillation": None if teaching is None
            else {**asdict(teaching.settings), "teacher": fingerprint(teaching.teacher)},
        }  # fmt: skip
        if any(span.stage.name for span in stages):
            record["stages"] = {span.stage.name: span.steps for span in stages}
        if self.packing:
            record["packing"] = True
        if any(hooked(self.model, "calibrate")):
            record["calibration_batches"] = run.calibration_batches
        return record

    def _optimizer(self) -> dict[str, Any]:
        """The settings of the optimizer that are not the usual ones, as a checkpoint records them."""
        run = self.optimisation
        named = run.optimizer if isinstance(run.optimizer, str) else name_of(run.optimizer)
        given = {"optimizer": named, "rates by name": dict(run.rates), "schedule_options": dict(run.schedule_options)}
        usual = {"optimizer": "adamw", "rates by name": {}, "schedule_options": {}}
        return {key: value for key, value in given.items() if value != usual[key]}

    def loaders(self, device: torch.device) -> tuple[Loader | StreamLoader, Loader | StreamLoader | None]:
        """The batches of this process: of training, and of evaluation where there is one."""
        train = self._loader(self.train, self.batch_size, device, self.seed, self._lengths)
        if self.evaluate is None:
            return train, None
        size = self.saving.eval_batch_size or self.batch_size
        return train, self._loader(self.evaluate, size, device, None, self.evaluate.lengths)

    def _loader(
        self, examples: Examples | Raw | Stream | Packed, size: int, device: torch.device, seed: int | None,
        lengths: Sequence[int] | None,
    ) -> Loader | StreamLoader:  # fmt: skip
        pin = device.type == "cuda"
        filler = examples.first if isinstance(examples, Stream) else examples[0]
        what = "evaluate" if seed is None else "train"
        collate = Counting(self._collate(what), self.model.task, self.model.num_labels, filler)
        shared = {"process": self.process, "processes": self.processes}
        if isinstance(examples, Stream):
            return StreamLoader(StreamOrder(examples, size, **shared), collate, pin)
        accumulation = self.optimisation.gradient_accumulation
        order = Order(len(examples), size, seed=seed, lengths=lengths, accumulation=accumulation, **shared)
        return Loader(examples, order, collate, self.num_workers, pin)

    def first_batches(self, device: torch.device) -> CalibrationBatches:
        """The batches for `effzoo.peft.calibrate`, the same in every process.

        Their examples are those of so many optimizer steps, cut into batches that fit into memory.
        """
        count = self.optimisation.calibration_batches * self._batches_of_step
        return CalibrationBatches(self._first_lists, self._collate("train"), count, device)

    def _first_lists(self) -> Iterable[list[Any]]:
        """The examples of each batch of the first pass."""
        if isinstance(self.train, Stream):
            return (examples for _, examples, _ in StreamOrder(self.train, self.batch_size))
        train = self.train
        order = Order(
            len(train), self.batch_size, seed=self.seed, lengths=self._lengths, accumulation=self._batches_of_step
        )
        return ([train[index] for index in indices] for indices in order.global_batches())

    def number(self, every: Every) -> int:
        """Of steps between two evaluations, say; where it is not known or there is none, of all steps."""
        return (self.steps_per_epoch if every == "epoch" else every) or self.steps

    def _collate(self, what: str) -> Callable[[list[Any]], Mapping[str, Any]]:
        """what: the name of the data in errors."""
        known = accepted(self.model)
        if self.collator is None:
            return Pad(self.model.task, self.model.config.pad_token, known)
        return Collated(self.collator, known, what)

    @property
    def _lengths(self) -> Sequence[int] | None:
        return self.train.lengths if self.group_by_length else None
