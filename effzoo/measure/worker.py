"""One case in a process of its own, `python -m effzoo.measure.worker JSON`, started by `effzoo.measure.memory.peak`."""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from dataclasses import asdict

import torch

from effzoo.measure.layer import Case
from effzoo.measure.memory import Peak


def resident() -> int:
    """The largest resident size of this process so far, in bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size


def main() -> None:
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    case = getattr(importlib.import_module(given["module"]), given["class"])(**given["case"])
    Case("full", "train", 16, 16, 2).runner()()  # loads what is loaded once
    before = resident()
    run = case.runner()
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    print(json.dumps(asdict(Peak(resident() - before, seconds))))


if __name__ == "__main__":
    main()
