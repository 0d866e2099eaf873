"""Shared by all tests: fixed seeds, one thread per worker, tiny sizes, no hub."""

import gc
import os
from collections.abc import Iterator

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


@pytest.fixture(scope="module")
def forks() -> Iterator[None]:
    """What is checked or graded runs in forks of one process, and does not wait for torch to be imported each time."""
    from effzoo.checks.server import ready  # not every file of tests needs it

    with ready():
        yield


@pytest.fixture
def tiny() -> dict[str, object]:
    """Sizes of a model that builds in milliseconds; pass as keywords to `effzoo.build`."""
    return dict(TINY)


LONGEST = [
    "matrix", "sharded", "sharded_loading", "course_assignments", "parallel", "triton", "checks", "plan",
    "state_machine", "train_hooks", "train_faults", "simulated_cuda", "train_processes", "compile", "cli", "parity",
    "convert_fields", "gpu_suite", "perceiver", "options_drawn",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets the files that take longest begin first, so that no core waits for one at the end, and marks as slow the
    cells of a `cover` test that are not needed for each value of its parameters to occur."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    tests: dict[object, list[pytest.Function]] = {}
    for item in items:
        if item.get_closest_marker("cover"):
            tests.setdefault((item.path, item.originalname), []).append(item)
    for cells in tests.values():
        names = cells[0].get_closest_marker("cover").args or tuple(cells[0].callspec.params)
        values = {cell: {(name, repr(cell.callspec.params[name])) for name in names} for cell in cells}
        missing = set.union(*values.values())
        while missing:
            best = max(cells, key=lambda cell: len(values[cell] & missing))
            missing -= values[best]
            cells.remove(best)
        for cell in cells:
            cell.add_marker("slow")


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """Takes what is there when a file's tests begin, above all what was imported, out of the garbage collector's walks:
    each training asks for one, and over all modules and tests it takes longer than a tiny training."""
    gc.collect()
    gc.freeze()
