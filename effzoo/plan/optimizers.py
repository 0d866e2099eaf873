"""How many numbers an optimizer keeps for each tensor that it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Shape = Sequence[int]


def _rows_and_columns(shape: Shape) -> int:
    """One mean per row and one per column of the last two axes; a vector's entries are kept as they are (Shazeer &
    Stern 2018, section 3)."""
    if len(shape) < 2:
        return math.prod(shape)
    return math.prod(shape[:-1]) + math.prod((*shape[:-2], shape[-1]))


STATES: dict[str, Callable[[Shape], int]] = {
    # first and second moments (Kingma & Ba 2015; Loshchilov & Hutter 2019)
    "adamw": lambda shape: 2 * math.prod(shape),
    "adam": lambda shape: 2 * math.prod(shape),
    "sgd": lambda shape: 0,
    "momentum": lambda shape: math.prod(shape),
    "adafactor": _rows_and_columns,  # without first moments, as is its default
}
