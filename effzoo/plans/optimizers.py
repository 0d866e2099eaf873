"""How many bytes an optimizer keeps for the tensors that it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

Shape = Sequence[int]
TABLE = 256 * 4  # bytes of the numbers that 8-bit codes stand for


def states(optimizer: str, tensors: Iterable[tuple[Shape, int]]) -> int:
    """Bytes of all states of an optimizer in STATES.

    tensors: shape of each, and bytes of a number of its states that are not quantised.
    """
    given = list(tensors)
    total = sum(STATES[optimizer](shape, width) for shape, width in given)
    shared = optimizer in ("adamw_8bit", "adamw_8bit_paged") and any(math.prod(shape) >= 4096 for shape, _ in given)
    return total + (2 * TABLE if shared else 0)


def _moments(count: int, shape: Shape, width: int) -> int:
    return count * math.prod(shape) * width


def _rows_and_columns(shape: Shape, width: int) -> int:
    """One mean per row and one per column of the last two axes; a vector's entries are kept as they are (Shazeer &
    Stern 2018, section 3)."""
    if len(shape) < 2:
        return math.prod(shape) * width
    return (math.prod(shape[:-1]) + math.prod((*shape[:-2], shape[-1]))) * width


def _bitsandbytes(shape: Shape, width: int) -> int:
    """Two moments of a byte for each number and a float32 scale for each block of 256; float32 below 4,096 numbers."""
    n = math.prod(shape)
    return 8 * n if n < 4096 else 2 * (n + 4 * math.ceil(n / 256))


def _torchao(bits: int, block: int, shape: Shape, width: int) -> int:
    """Two moments of so many bits for each number, a float32 scale for each block and a table of what codes stand for.

    Not quantised below 4,096 numbers, and where blocks do not divide them.
    """
    n = math.prod(shape)
    if n < 4096 or n % block:
        return 2 * n * width
    return 2 * (n * bits // 8 + 4 * n // block + 4 * 2**bits)


STATES: dict[str, Callable[[Shape, int], int]] = {
    # first and second moments (Kingma & Ba 2015; Loshchilov & Hutter 2019)
    "adamw": partial(_moments, 2),
    "adam": partial(_moments, 2),
    "adamw_8bit": _bitsandbytes,  # as in bitsandbytes 0.50; Dettmers et al. 2022, arXiv:2110.02861
    "adamw_8bit_paged": _bitsandbytes,  # those of large tensors may stand in the host's memory
    "adamw_8bit_torchao": partial(_torchao, 8, 256),  # as in torchao 0.18
    "adamw_4bit_torchao": partial(_torchao, 4, 128),
    "sgd": partial(_moments, 0),
    "momentum": partial(_moments, 1),
    "adafactor": _rows_and_columns,  # without first moments, as is its default
}
