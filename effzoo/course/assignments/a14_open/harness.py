"""What runs around a solution: MiniLM's first layers, the solution's training, and what it says of the test reviews."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from effzoo import checks, registry
from effzoo.architectures import Transformer
from effzoo.builder import build
from effzoo.lab.texts import minilm
from effzoo.train import predict

DONE: list[dict[str, Any]] = []  # the one run of a process, which several tasks judge


def base(layers: int, length: int, attention: str) -> Transformer:
    """The first layers of MiniLM with its weights, frozen, with a fresh head for two labels."""
    whole = minilm(2)
    model: Transformer = build(
        "minilm", layers=layers, attention=attention, max_length=max(512, length), task="classification", num_labels=2,
        pooling="mean", dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    kept, weights = model.state_dict(), whole.state_dict()
    if length > 512:  # positions behind those of MiniLM repeat them
        name = next(key for key in kept if key.startswith("embeddings.position"))
        weights[name] = weights[name].repeat(-(-length // 512), 1)[: len(kept[name])]
    model.load_state_dict({key: weights[key] for key in kept})
    return model.requires_grad_(False)


def run(names: dict[str, Any], train_ids: list[Tensor], labels: Tensor, test_ids: list[Tensor]) -> dict[str, Any]:
    """Of the test reviews the logits [reviews, 2]; how many numbers are new or changed; the seconds."""
    if not DONE:
        torch.set_num_threads(2)
        length, layers = int(names["LENGTH"]), int(names["LAYERS"])
        model = base(layers, length, str(names["ATTENTION"]))
        before = {key: x.clone() for key, x in model.state_dict().items()}
        train = [
            {"input_ids": ids[:length].tolist(), "labels": int(y)} for ids, y in zip(train_ids, labels, strict=True)
        ]
        started = time.perf_counter()
        names["adapt"](model, train)
        logits = predict(model, [{"input_ids": ids[:length].tolist()} for ids in test_ids], progress=False)
        seconds = time.perf_counter() - started
        DONE.append({"logits": logits.double(), "numbers": changed(before, model.state_dict()), "seconds": seconds})
    return DONE[0]


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> int:
    """How many numbers are new, or differ."""
    return sum(
        int((x != before[key]).sum()) if key in before and before[key].shape == x.shape else x.numel()
        for key, x in after.items()
    )


def laws(names: dict[str, Any]) -> list[str]:
    """What is red of the kinds and methods that the file registers."""
    red = []
    for kind, view in (("attention", registry.attention), ("peft", registry.peft)):
        for name in view.names():
            if view.get(name).__module__.startswith("effzoo_file_"):
                report = checks.check(kind, name, until_red=True)
                red += [f"{name}: {result.reason}" for result in report.failures]
    return red
