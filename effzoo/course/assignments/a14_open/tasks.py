"""What is right: enough test reviews, within the limits. The labels of the test reviews never leave this process."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import effzoo
from effzoo import data, zoo
from effzoo.course.task import OF_A_GRADING, Call, Draw, Task
from effzoo.errors import DataError

REVIEWS = Path(effzoo.__file__).parent.parent / "data/movie_reviews.jsonl.gz"
TRAIN, TEST, LONGEST = 400, 400, 2048
NUMBERS = 150_000
HARNESS = "effzoo.course.assignments.a14_open.harness"


@cache
def reviews() -> tuple[list[Tensor], Tensor]:
    """The tokens of every review, at most LONGEST, and whether it is positive."""
    if not REVIEWS.is_file():
        raise DataError(
            f"this assignment reads {REVIEWS.name} of a checkout, and {REVIEWS} is not there; grade it there"
        )
    rows = [json.loads(line) for line in gzip.decompress(REVIEWS.read_bytes()).splitlines()]
    tokenizer = data.tokenizer_of(zoo.config("minilm"))
    tokens: Any = tokenizer([row["text"] for row in rows], truncation=True, max_length=LONGEST)
    return [torch.tensor(ids) for ids in tokens["input_ids"]], torch.tensor(
        [row["label"] == "pos" for row in rows]
    ).long()


@dataclass
class Run(Task):
    """One training of what was handed in, and what it says of reviews that it has not seen.

    least: the share of the test reviews that it must classify right.
    """

    least: float

    def calls(self, seed: int) -> list[Call]:
        ids, labels = reviews()
        order = Draw(seed // OF_A_GRADING).order(len(ids)).tolist()  # the same for every task of one grading
        train, test = order[:TRAIN], order[TRAIN : TRAIN + TEST]
        given = {"train_ids": [ids[i] for i in train], "labels": labels[train], "test_ids": [ids[i] for i in test]}
        about = {"module": HARNESS, "program": "run"}
        return [Call("harness", f"{TRAIN} reviews to train on, {TEST} to classify", given, labels[test], about)]

    def differs(self, call: Call, value: Any) -> str:
        logits, numbers = value["logits"], value["numbers"]
        if not isinstance(logits, Tensor) or logits.shape != (TEST, 2) or not torch.isfinite(logits).all():
            return (
                "the logits of the test reviews are not finite numbers [400, 2]; a smaller rate may be what they need"
            )
        if numbers > NUMBERS:
            return (
                f"{numbers:,} numbers were changed or added, and at most {NUMBERS:,} may be; attach something smaller"
            )
        found = accuracy(logits, call.right)
        if found >= self.least:
            return ""
        share = float((logits.argmax(dim=1) == logits.argmax(dim=1)[0]).double().mean())
        same = " (all have the same label: nothing was learned, or the rate is too large)" * (share > 0.97)
        return f"{found:.1%} of the test reviews are right{same}, and {self.least:.0%} are asked for"

    def board(self, calls: Sequence[Call], values: Sequence[Any]) -> dict[str, float]:
        value, labels = values[0], calls[0].right
        loss = float(F.cross_entropy(value["logits"], labels))
        figures = {"accuracy": accuracy(value["logits"], labels), "loss": loss}
        return {**figures, "seconds": float(value["seconds"]), "numbers": float(value["numbers"])}


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(dim=1) == labels).double().mean())


class Laws(Task):
    """Whatever the file registers keeps its contract."""

    def calls(self, seed: int) -> list[Call]:
        return [
            Call("harness", "the checks of what the file registers", {}, [], {"module": HARNESS, "program": "laws"})
        ]

    def differs(self, call: Call, value: Any) -> str:
        return "" if value == [] else str(value[0])


TASKS: dict[str, Task] = {"limits": Run(0.0), "learns": Run(0.56), "good": Run(0.60), "laws": Laws()}
