"""The evaluation of a run: exact means over all examples of all processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from effzoo.architectures import Transformer
from effzoo.checked import IGNORED
from effzoo.errors import InputError, OptionError, shown
from effzoo.train.batches import COUNTED, Loader
from effzoo.train.processes import Processes
from effzoo.train.streams import StreamLoader
from effzoo.train.supervised import Supervised


@torch.no_grad()
def evaluate(
    supervised: Supervised,
    loader: Loader | StreamLoader,
    processes: Processes,
    metrics: Callable[[Any], Mapping[str, float]] | None = None,
) -> dict[str, float]:
    """The mean loss over all counted labels, accuracy or perplexity, and the user's metrics."""
    supervised.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # losses, counted labels, hits, labels that can be hit
    answers: list[tuple[int, Any, Any]] = []  # number of the example, logits, labels
    for indices, batch, _ in loader.of_pass():
        if not indices and not processes.in_step:
            continue  # a filler, for processes whose forward passes wait for each other
        counted = int(batch.pop(COUNTED))
        batch = processes.here(batch)
        loss, logits, positions = supervised(**batch)
        if not indices:
            continue
        labels = batch["labels"] if positions is None else batch["labels"][:, positions]
        hits, scored = _hits(logits, labels, supervised.model)
        here = torch.tensor([loss.item() * counted, counted, hits, scored], dtype=torch.float64)
        if processes.place_in_sequence:  # the first of those that compute it together counts it
            here[: 4 if positions is None else 2] = 0
        sums += here
        if metrics is not None and not processes.place_in_sequence:
            if len(logits) != len(indices):
                raise InputError(
                    f"metrics reads one row of logits for each example, and the collator makes {len(logits)} rows of "
                    f"{len(indices)} examples; leave metrics out"
                )
            answers += zip(indices, logits.float().cpu().numpy(), batch["labels"].cpu().numpy(), strict=True)
    total = torch.tensor(processes.gathered(sums.tolist()), dtype=torch.float64).sum(dim=0)
    values = _metrics(total.tolist(), supervised.model)
    if metrics is not None:
        theirs = metrics(_prediction([answer for part in processes.gathered(answers) for answer in part]))
        try:
            values |= {key: float(value) for key, value in theirs.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise OptionError(f"metrics returns numbers by name, got {shown(theirs)} ({error})") from None
    return values


def _metrics(sums: list[float], model: Transformer) -> dict[str, float]:
    """The mean loss, with accuracy where labels can be hit, and perplexity for a language model."""
    total, count, hits, scored = sums
    loss = total / max(count, 1)
    if scored:
        return {"loss": loss, "accuracy": hits / scored}
    if model.task.endswith("_lm"):
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    return {"loss": loss}


def _hits(logits: Tensor, labels: Tensor, model: Transformer) -> tuple[int, int]:
    """How many counted labels the largest logit hits, and of how many.

    (0, 0) for language models, regression and several labels at once. Of an answer, the first and the last token are
    two labels.
    """
    if model.task == "question_answering":
        logits = logits.transpose(1, 2)
    one_of_many = not labels.is_floating_point() and labels.shape == logits.shape[:-1] and model.num_labels > 1
    if not one_of_many or model.task.endswith("_lm"):
        return 0, 0
    counted = labels != IGNORED
    return int(((logits.argmax(dim=-1) == labels) & counted).sum()), int(counted.sum())


def _prediction(answers: list[tuple[int, Any, Any]]) -> EvalPrediction:
    """Logits and labels in the order of the data; sequences of unequal length are padded with -100."""
    answers = sorted(answers, key=lambda answer: answer[0])
    return EvalPrediction(
        predictions=_stack([logits for _, logits, _ in answers]), label_ids=_stack([labels for *_, labels in answers])
    )


def _stack(arrays: list[Any]) -> Any:
    shape = np.max([array.shape for array in arrays], axis=0)
    stacked: Any = np.full((len(arrays), *shape), IGNORED, dtype=arrays[0].dtype)
    for number, array in enumerate(arrays):
        stacked[(number, *map(slice, array.shape))] = array
    return stacked
