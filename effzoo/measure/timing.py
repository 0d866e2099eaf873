"""Time as a ratio: the cases run in turns, A B A B, so that what disturbs a shared machine disturbs them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from effzoo.errors import OptionError


@dataclass(frozen=True)
class Times:
    """Seconds of one case, a round after the other. `spread` holds the first and third quartile."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        return _quartiles(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """The median of a / b over the rounds, in each of which both ran, with the first and third quartile."""

    median: float
    spread: tuple[float, float]

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.spread[0]:.2f} to {self.spread[1]:.2f})"


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    least: int = 3,
    seconds: float = 20.0,
    warm_up: int = 1,
    device: str | torch.device = "cpu",
) -> dict[str, Times]:
    """Seconds of every case, run in turns: at most `rounds` rounds, and no more than `least` once they have taken
    `seconds`.

    warm_up: rounds that do not count. On CUDA the time is that between two events around the call, after the device has
        come to rest.
    """
    if not 1 <= least <= rounds or warm_up < 0:
        raise OptionError(
            f"rounds is at least `least`, which is at least 1, and warm_up not negative; got {rounds}, "
            f"{least} and {warm_up}"
        )
    for _ in range(warm_up):
        for run in cases.values():
            once(run, device)
    times: dict[str, list[float]] = {name: [] for name in cases}
    started = time.perf_counter()
    for done in range(rounds):
        if done >= least and time.perf_counter() - started > seconds:
            break
        for name, run in cases.items():
            times[name].append(once(run, device))
    return {name: Times(tuple(seconds_of)) for name, seconds_of in times.items()}


Maker = Callable[[], Callable[[], object]]


def fitting(makers: Mapping[str, Maker], *, seconds: float, device: str = "cpu") -> tuple[dict[str, Times], bool]:
    """`interleaved` of what is made, and True if it had to run alone: one after the other, because all together did not
    fit into memory.

    What does not fit alone either is left out. Nothing of what failed is alive when the next is tried.
    """
    together = _tried(makers, seconds, device) if makers else {}
    if together is not None:
        return together, False
    times: dict[str, Times] = {}
    for name, make in makers.items() if len(makers) > 1 else ():
        times |= _tried({name: make}, seconds, device) or {}
    return times, True


def _tried(makers: Mapping[str, Maker], seconds: float, device: str) -> dict[str, Times] | None:
    """None: out of memory."""
    try:
        return interleaved({name: make() for name, make in makers.items()}, seconds=seconds, device=device)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    release(device)  # the error, and with it every frame that holds a tensor, is gone here
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, on a GPU or on the CPU."""
    message = str(error)
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or "not enough memory" in message
        or ("can't allocate memory") in message
    )


def release(device: str | torch.device) -> None:
    """Give what nothing holds any more back to the device."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def once(run: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """Seconds of one call."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        run()
        after.record()
        torch.cuda.synchronize(device)
        return float(before.elapsed_time(after)) / 1000
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def ratio(of: Times, to: Times) -> Ratio:
    """How long `of` takes, in times of `to`, from the rounds of one `interleaved`."""
    ratios = [a / b for a, b in zip(of.seconds, to.seconds, strict=True)]
    return Ratio(statistics.median(ratios), _quartiles(ratios))


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
