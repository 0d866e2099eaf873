"""Shared by all tests: fixed seeds, one thread per worker, tiny sizes, no hub."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)  # tensors here are tiny, and pytest-xdist runs one worker per core

TINY = {
    "dim": 16,
    "layers": 2,
    "heads": 2,
    "mlp": 32,
    "vocab": 53,
    "max_length": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> dict[str, object]:
    """Sizes of a model that builds in milliseconds; pass as keywords to `effzoo.build`."""
    return dict(TINY)
