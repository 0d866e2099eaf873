"""Training in the lab: examples as tensors, a loop with everything that methods do in training, and accuracy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from effzoo import peft
from effzoo.errors import TrainingError
from effzoo.peft.attach import acting
from effzoo.peft.training import WHOLE

Batch = dict[str, Tensor]
# options of `fit`: Adam at a rate that falls to 0
ADAM: dict[str, Any] = {"weight_decay": 0.0, "warmup": 0.0, "clip": None, "bfloat16": False}
_CALIBRATION = 4  # batches that methods see which choose by data


@dataclass(frozen=True)
class Examples:
    """Labelled examples.

    inputs: what the model takes, by name; the first axis is that of the examples.
    labels: [examples].
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, indices: Any) -> Examples:
        """Some of them: a slice, indices or a mask."""
        return Examples({name: x[indices] for name, x in self.inputs.items()}, self.labels[indices])

    def batch(self, indices: Any) -> Batch:
        """A batch for the model, cut to its longest example where there is an attention_mask."""
        batch = {name: x[indices] for name, x in self.inputs.items()}
        if "attention_mask" in batch:
            longest = int(batch["attention_mask"].sum(dim=1).max())
            batch = {name: x[:, :longest] for name, x in batch.items()}
        return {**batch, "labels": self.labels[indices]}

    def batches(self, size: int) -> Iterator[Batch]:
        """All of them once, in order."""
        for start in range(0, len(self), size):
            yield self.batch(slice(start, start + size))

    def stream(self, size: int, seed: int) -> Iterator[Batch]:
        """Batches without end, each epoch in a new order and without its last examples that fill no batch."""
        draw, size = torch.Generator().manual_seed(seed), min(size, len(self))
        while True:
            order = torch.randperm(len(self), generator=draw)
            for start in range(0, len(self) - size + 1, size):
                yield self.batch(order[start : start + size])


def fit(
    model: nn.Module,
    batches: Iterator[Batch],
    steps: int,
    *,
    learning_rate: float | None = None,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    clip: float | None = 1.0,
    bfloat16: bool | None = None,
    calibration: Sequence[Batch] | None = None,
    after: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train what is trainable with AdamW, and return the loss of each step.

    The loop is that of `effzoo/peft/training.py`, with all hooks of the active adapters, which are finished at the end.
    `effzoo.finetune` is for long runs; this one writes nothing.

    batches: labelled inputs of the model by name, one for each step.
    steps: optimizer steps, of all stages together.
    learning_rate: None is each method's own, and 5e-5 without adapters.
    warmup: the share of each stage in which the learning rate rises; then it falls to 0 along a line.
    clip: the largest norm of the gradient; None for no limit.
    bfloat16: forward passes under autocast; None where that is faster here and the weights are float32.
    calibration: what methods see that choose by looking at data; None for the first four batches.
    after: called with the step and its loss.

    Raises TrainingError for a loss that is not a number.
    """
    adapters = bool(acting(model))
    if adapters:
        peft.calibrate(model, [next(batches) for _ in range(_CALIBRATION)] if calibration is None else calibration)
    if bfloat16 is None:
        bfloat16 = next(model.parameters()).dtype == torch.float32 and bfloat16_is_faster()
    losses: list[float] = []
    model.train()
    for stage, number in peft.timetable(model, steps) if adapters else [(WHOLE, steps)]:
        if adapters:
            peft.begin(model, stage)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        rates = (
            peft.learning_rates(model, learning_rate)
            if adapters
            else dict.fromkeys(named, 5e-5 if learning_rate is None else learning_rate)
        )
        optimizer = torch.optim.AdamW(
            [{"params": [named[name]], "lr": rate} for name, rate in rates.items()], weight_decay=weight_decay
        )
        warm = max(1, round(warmup * number))
        timetable = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, warm=warm, steps=number))
        for step in range(number):
            peft.schedule(model, step / number)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
                loss = peft.loss(model, **next(batches)) if adapters else model(**next(batches)).loss
            losses.append(float(loss.detach()))
            if losses[-1] != losses[-1]:
                raise TrainingError(f"the loss is not a number at step {len(losses)}; try a smaller learning rate")
            optimizer.zero_grad()
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(list(named.values()), clip)
            if adapters:
                peft.after_backward(model)
            optimizer.step()
            timetable.step()
            if after is not None:
                after(len(losses), losses[-1])
    if adapters:
        peft.finish(model)
    model.eval()
    return losses


def _rate(step: int, *, warm: int, steps: int) -> float:
    """Up linearly for `warm` steps, then down to 0."""
    return min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)), 1.0)


@torch.no_grad()
def logits(model: nn.Module, examples: Examples, size: int = 64) -> Tensor:
    """What the model says of each example, in order, float32; the model is left in the mode it was in."""
    mode = model.training
    model.eval()
    try:
        answers = [
            model(**{name: x for name, x in batch.items() if name != "labels"}).logits.float()
            for batch in examples.batches(size)
        ]
    finally:
        model.train(mode)
    return torch.cat(answers)


def accuracy(model: nn.Module, examples: Examples, size: int = 64) -> float:
    """The share of examples whose label has the largest logit."""
    return float((logits(model, examples, size).argmax(dim=-1) == examples.labels).float().mean())


@cache
def bfloat16_is_faster() -> bool:
    """Whether matrix products in bfloat16 take less than 0.7 of float32's time on this processor, measured now."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(2048, 384, dtype=dtype), torch.ones(384, 1536, dtype=dtype)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        seconds[dtype] = sorted(times)[3]
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]
