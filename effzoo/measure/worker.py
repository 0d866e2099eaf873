"""One case in a process of its own, `python -m effzoo.measure.worker JSON`, started by `effzoo.measure.memory.peak`."""

from __future__ import annotations

import gc
import importlib
import json
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from effzoo.measure.layer import Case
from effzoo.measure.memory import Peak


def forget_peak() -> int:
    """Begin a new peak where the system can (Linux), and what is resident now, in bytes; elsewhere the largest size so
    far."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if reset.exists():
        reset.write_text("5")
        return _entry(status.read_text(), "VmRSS")
    return resident_peak()


def resident_peak() -> int:
    """The largest resident size of this process since the last `forget_peak`, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        return _entry(status.read_text(), "VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, the other system without /proc


def _entry(status: str, name: str) -> int:
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])


def main() -> None:
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    case = getattr(importlib.import_module(given["module"]), given["class"])(**given["case"])
    Case("full", "train", 16, 16, 2).runner()()  # loads what is loaded once
    gc.collect()
    before = forget_peak()
    run = case.runner()
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    print(json.dumps(asdict(Peak(resident_peak() - before, seconds))))


if __name__ == "__main__":
    main()
