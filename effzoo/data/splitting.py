"""A table divided at random, with the same share of each label in every part: `split`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from effzoo.annotations import Seed
from effzoo.data.texts import check_table
from effzoo.errors import DataError, listing

if TYPE_CHECKING:
    from datasets import Dataset


def split(
    data: Dataset, parts: Mapping[str, float | int] | Sequence[float | int] = (0.8, 0.1, 0.1), *, seed: Seed = 0
) -> dict[str, Dataset]:
    """Divide a table at random, with the same share of each label in every part, up to one example.

    parts: fractions (floats, at most 1 together) or counts (integers) by name; a sequence of two is train and test, one
        of three is train, validation and test. What they leave over is in no part.
    seed: of the division; the same data and seed give the same parts.

    Raises DataError.
    """
    check_table(data)
    if not isinstance(parts, Mapping):
        known: dict[int, tuple[str, ...]] = {2: ("train", "test"), 3: ("train", "validation", "test")}
        if len(parts) not in known:
            raise DataError(f"{len(parts)} parts need names; give a mapping, such as {{'train': 0.9, 'test': 0.1}}")
        parts = dict(zip(known[len(parts)], parts, strict=True))
    sizes = _sizes(parts, len(data))
    random = np.random.RandomState(seed)  # whose stream numpy keeps the same in every version
    column = next((name for name in ("label", "labels") if hasattr(data.features.get(name), "names")), None)
    labels = np.asarray(np.zeros(len(data), dtype=int) if column is None else data[column])
    waiting = {value: list(random.permutation(np.flatnonzero(labels == value))) for value in np.unique(labels)}
    tables = {}
    for name, size in sizes.items():
        left = [len(rows) for rows in waiting.values()]
        shares = _largest_remainders([count * size / max(sum(left), 1) for count in left], size)
        chosen = []
        for rows, share in zip(waiting.values(), shares, strict=True):
            chosen += [rows.pop() for _ in range(share)]
        tables[name] = data.select([int(row) for row in random.permutation(chosen)])
    return tables


def _sizes(parts: Mapping[str, float | int], total: int) -> dict[str, int]:
    values = list(parts.values())
    kinds = {type(value) for value in values}
    if kinds not in ({int}, {float}) or min(values) <= 0:
        raise DataError(f"parts are all fractions (floats above 0) or all counts (integers above 0), got {dict(parts)}")
    if isinstance(values[0], int):
        if sum(values) > total:
            raise DataError(f"parts of {listing(map(str, values))} examples need {sum(values)}, there are {total}")
        return {name: int(size) for name, size in parts.items()}
    if sum(values) > 1 + 1e-9:
        raise DataError(f"fractions add up to at most 1, got {sum(values):.4g} from {dict(parts)}")
    sizes = dict(zip(parts, _largest_remainders([v * total for v in values], round(sum(values) * total)), strict=True))
    for name, size in sizes.items():
        if size == 0:
            raise DataError(
                f"{name} gets none of the {total} examples at fraction {parts[name]}; give a larger "
                "fraction or more data"
            )
    return sizes


def _largest_remainders(shares: list[float], total: int) -> list[int]:
    """Integers that add up to total, as the shares do, each less than 1 from its share (Hamilton's method)."""
    whole = [int(share + 1e-9) for share in shares]
    for index in sorted(range(len(shares)), key=lambda i: whole[i] - shares[i])[: total - sum(whole)]:
        whole[index] += 1
    return whole
