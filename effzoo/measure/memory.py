"""Peak memory of one pass: from the allocator on CUDA; on a CPU the largest resident size of a process that does
nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import torch

from effzoo.measure.timing import once, out_of_memory, release

OUT_OF_MEMORY = "out of memory"


class Measurable(Protocol):
    """A dataclass of plain values that makes a pass to measure."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def device(self) -> str: ...

    def runner(self) -> Callable[[], object]:
        """What is timed: one call is one pass."""


@dataclass(frozen=True)
class Peak:
    """bytes: above those before the layer was made; its weights and inputs count.
    seconds: of the first pass; of the second on CUDA, where the first compiles kernels.
    failed: why there are no bytes."""

    bytes: int | None
    seconds: float | None = None
    failed: str = ""


def peak(case: Measurable, limit: float | None = None) -> Peak:
    """Peak memory of a case. limit: seconds after which a pass on the CPU is given up, and no second one is begun on
    CUDA."""
    if torch.device(case.device).type == "cuda":
        measured = _on_cuda(case, limit)
        release(case.device)
        return measured
    given = {
        "module": type(case).__module__,
        "class": type(case).__qualname__,
        "case": asdict(case),
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", "effzoo.measure.worker", json.dumps(given)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return Peak(None, None, f"longer than {limit:.0f} s")
    if done.returncode == -9:  # the system's answer when memory runs out
        return Peak(None, None, OUT_OF_MEMORY)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Peak(None, None, OUT_OF_MEMORY if out_of_memory(RuntimeError(last)) else last)
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def _on_cuda(case: Measurable, limit: float | None) -> Peak:
    release(case.device)
    before = torch.cuda.memory_allocated(case.device)
    torch.cuda.reset_peak_memory_stats(case.device)
    try:
        run: Callable[[], object] = case.runner()
        seconds = once(run, case.device)
        if limit is None or seconds <= limit:
            seconds = once(run, case.device)
    except Exception as error:  # as on the CPU, where it ends a process of its own
        return Peak(None, None, reason(error))
    return Peak(torch.cuda.max_memory_allocated(case.device) - before, seconds)


def reason(error: BaseException) -> str:
    """An error in one line, for a row of results."""
    if out_of_memory(error):
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {''.join(str(error).strip().splitlines()[:1])}"
