"""What a run gave: its history, its metrics and the files that it left."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from effzoo.train.checkpoints import ADAPTER
from effzoo.train.gradients import Untouched


@dataclass(frozen=True)
class Result:
    """What a run gave.

    metrics: the last evaluation (the best one's where `Saving(best=...)` was given) and train_loss, the mean over all
        steps.
    history: one entry per logged step: step, epoch, loss (mean since the entry before), learning_rate (the largest),
        grad_norm, eval_*. In stages also stage, to which the steps since the entry before belong; with a teacher also
        the parts of the loss without their weights, loss_labels, loss_logits, ....
    steps: optimizer steps of the whole run.
    seconds: of this call.
    peak_memory: bytes; what the allocator held on CUDA during the call, elsewhere the resident set of this process
        since it started.
    last, best: checkpoints.
    weights: the adapter's folder (several adapters: a folder that holds one each); where all parameters were trained,
        the file of the model, or the index of several, in a folder that `effzoo.load` takes.
    untouched: the trained tensors that got no gradient in this call, or only zeros; false when there is none. As text,
        a sentence with their share, and with what the run was too short to tell.
    """

    metrics: dict[str, float]
    history: list[dict[str, Any]]
    steps: int
    seconds: float
    peak_memory: int
    last: Path | None
    best: Path | None
    weights: Path
    untouched: Untouched = field(default_factory=Untouched)

    @property
    def adapter(self) -> Path | None:
        """The folder for `load_adapter`, when an adapter was trained."""
        return self.weights if self.weights.name == ADAPTER else None


def metrics_of(history: list[dict[str, Any]], step: int | None) -> dict[str, float]:
    """The evaluation at a step (None: the last one), and the mean loss of all steps."""
    evaluations = [entry for entry in history if "eval_loss" in entry and step in (None, entry["step"])]
    evaluation = evaluations[-1] if evaluations else {}
    metrics = {key: value for key, value in evaluation.items() if key.startswith("eval_")}
    return {**metrics, "train_loss": _mean_loss(history)}


def _mean_loss(history: list[dict[str, Any]]) -> float:
    """The mean over all steps; each entry's loss is the mean since the entry before."""
    total, before = 0.0, 0
    for entry in history:
        if "loss" in entry:
            total, before = total + entry["loss"] * (entry["step"] - before), entry["step"]
    return total / max(before, 1)


def peak_memory(device: torch.device) -> int:
    """The largest memory in bytes: of CUDA's allocator since it was reset, else of this process since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
