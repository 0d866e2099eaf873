"""A run that has not begun: its record, the arguments of Trainer, and its batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from effzoo.architectures import Transformer
from effzoo.errors import OptionError
from effzoo.peft.training import hooked, learning_rates
from effzoo.train.batches import CalibrationBatches, Counting, Loader, Order, Pad
from effzoo.train.examples import Collated, Examples, Raw
from effzoo.train.form import accepted
from effzoo.train.preconditions import SCHEDULES, on_cpu
from effzoo.train.record import adapters, name_of, of_model, rates
from effzoo.train.settings import LARGEST, Every, Optimisation, Saving
from effzoo.train.stages import StageSpan
from effzoo.train.teaching import Teaching, fingerprint

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True)
class Setup:
    """What `finetune` was given, checked.

    processes, process: how many there are, and which of them this is.
    learning_rate: None for each method's own.
    """

    model: Transformer
    train: Examples | Raw
    evaluate: Examples | Raw | None
    output_dir: Path
    epochs: float
    max_steps: int | None
    batch_size: int
    learning_rate: float | None
    precision: str
    group_by_length: bool
    num_workers: int
    seed: int
    progress: bool
    teaching: Teaching | None
    optimisation: Optimisation
    saving: Saving
    collator: Callable[[list[Any]], Mapping[str, Any]] | None
    processes: int
    process: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train) / (self.batch_size * self.optimisation.gradient_accumulation * self.processes))

    @property
    def steps(self) -> int:
        """Of the whole run. Raises OptionError for more than can be counted."""
        steps = self.max_steps or math.ceil(self.epochs * self.steps_per_epoch)
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
        decay, rate = self.optimisation.weight_decay, self.largest_rate
        if decay >= 1 and rate * decay >= 1:
            raise OptionError(
                f"weight_decay={decay:g} at learning rate {rate:g} takes all of every weight in one step; give less "
                f"than {1 / rate:g}"
            )

    def record(self, stages: Sequence[StageSpan]) -> dict[str, Any]:
        """What a checkpoint must share with this run to be resumed by it."""
        run, teaching = self.optimisation, self.teaching
        record = {
            "adapters": adapters(self.model), "examples": len(self.train), "steps": self.steps, "seed": self.seed,
            "processes": self.processes, "batch_size": self.batch_size,
            "gradient_accumulation": run.gradient_accumulation, "group_by_length": self.group_by_length,
            **rates(self.model, self.learning_rate), "weight_decay": run.weight_decay, "warmup": run.warmup,
            "schedule": run.schedule, "clip": run.clip, "precision": self.precision,
            "collator": name_of(self.collator), "data": self.train.digest,
            "evaluation": None if self.evaluate is None else self.evaluate.digest, "best": self.saving.best,
            "model": of_model(self.model),
            "distillation": None if teaching is None
            else {**asdict(teaching.settings), "teacher": fingerprint(teaching.teacher)},
        }  # fmt: skip
        if any(span.stage.name for span in stages):
            record["stages"] = {span.stage.name: span.steps for span in stages}
        if any(hooked(self.model, "calibrate")):
            record["calibration_batches"] = run.calibration_batches
        return record

    def arguments(self, stages: Sequence[StageSpan]) -> TrainingArguments:
        """The settings in the words of Trainer."""
        from transformers import TrainingArguments

        saving = self.saving
        arguments = TrainingArguments(
            output_dir=str(self.output_dir), use_cpu=on_cpu(), seed=self.seed, max_steps=self.steps,
            bf16=self.precision == "bfloat16", fp16=self.precision == "float16",
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=saving.eval_batch_size or self.batch_size,
            gradient_accumulation_steps=self.optimisation.gradient_accumulation, learning_rate=self.largest_rate,
            weight_decay=self.optimisation.weight_decay, max_grad_norm=self.optimisation.clip or 0.0,
            lr_scheduler_type=SCHEDULES[self.optimisation.schedule], warmup_steps=stages[0].warmup,
            logging_steps=saving.log_every, logging_nan_inf_filter=False,
            eval_strategy="no" if self.evaluate is None else "steps",
            eval_steps=self._number(saving.evaluate_every),
            save_strategy="no" if saving.save_every is None else "steps",
            save_steps=self._number(saving.save_every),
            disable_tqdm=not self.progress, report_to="none", ddp_find_unused_parameters=True, label_names=["labels"],
        )  # fmt: skip
        # several GPUs are for several processes; Trainer would else use DataParallel
        arguments._n_gpu = min(arguments.n_gpu, 1)
        return arguments

    def loaders(self, device: torch.device) -> list[Loader]:
        """The batches of this process: of training, and of evaluation where there is one."""
        shared = {"process": self.process, "processes": self.processes}
        orders = [
            (self.train, Order(len(self.train), self.batch_size, seed=self.seed, lengths=self._lengths, **shared))
        ]
        if self.evaluate is not None:
            size = self.saving.eval_batch_size or self.batch_size
            orders.append((self.evaluate, Order(len(self.evaluate), size, lengths=self.evaluate.lengths, **shared)))
        return [
            Loader(
                examples,
                order,
                Counting(self._collate, self.model.task, self.model.num_labels, examples[0]),
                self.num_workers,
                pin_memory=device.type == "cuda",
            )
            for examples, order in orders
        ]

    def first_batches(self, device: torch.device) -> CalibrationBatches:
        """The batches for `effzoo.peft.calibrate`, the same in every process."""
        order = Order(len(self.train), self.batch_size, seed=self.seed, lengths=self._lengths)
        return CalibrationBatches(self.train, order, self._collate, self.optimisation.calibration_batches, device)

    def _number(self, every: Every) -> int:
        """Of steps between two evaluations, say; where there is none, of all steps."""
        if every is None:
            return self.steps
        return self.steps_per_epoch if every == "epoch" else every

    @property
    def _collate(self) -> Callable[[list[Any]], Mapping[str, Any]]:
        known = accepted(self.model)
        if self.collator is None:
            return Pad(self.model.task, self.model.config.pad_token, known)
        return Collated(self.collator, known, "train")

    @property
    def _lengths(self) -> Sequence[int] | None:
        return self.train.lengths if self.group_by_length else None
