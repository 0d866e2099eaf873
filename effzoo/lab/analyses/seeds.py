"""Numbers of several seeds: their mean and range as a cell of a table, and a claim judged for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence


def mean(values: Iterable[float]) -> float:
    """The mean of at least one number."""
    numbers = list(values)
    return sum(numbers) / len(numbers)


def percent(values: Iterable[float]) -> str:
    """Shares in percent: the mean (the smallest to the largest)."""
    numbers = [100 * value for value in values]
    return f"{mean(numbers):.1f} ({min(numbers):.1f} to {max(numbers):.1f})"


def judged(seeds: Sequence[str], holds: Callable[[str], bool]) -> tuple[bool, ...]:
    """Whether something holds, for each seed, as `Claim` takes it."""
    return tuple(bool(holds(seed)) for seed in seeds)
