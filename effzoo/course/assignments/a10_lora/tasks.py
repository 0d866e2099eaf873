"""What is right: the zoo's lora with the factors that are given, and phi by the projections on both spaces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effzoo.course.entries import Method
from effzoo.course.task import Draw, Function, Task

LORA = "lora[rank=4, alpha=8]"


def phi(a: Tensor, b: Tensor, i: int, j: int) -> float:
    """tr(P_A P_B) / min(i, j), with P the projection on the first directions: another way to the same number."""
    p, q = (directions(x, k).mT @ directions(x, k) for x, k in ((a, i), (b, j)))
    return float((p * q).sum() / min(i, j))


def directions(x: Tensor, k: int) -> Tensor:
    """The first k right singular vectors, [k, d]."""
    return torch.linalg.svd(x, full_matrices=False).Vh[:k]


def not_squared(a: Tensor, b: Tensor, i: int, j: int) -> float:
    return float((directions(a, i) @ directions(b, j).mT).norm() / min(i, j))


def by_larger(a: Tensor, b: Tensor, i: int, j: int) -> float:
    return phi(a, b, i, j) * min(i, j) / max(i, j)


def of_rows(a: Tensor, b: Tensor, i: int, j: int) -> float:
    return float((a[:i] @ b[:j].mT).square().sum() / min(i, j))


def matrices(draw: Draw) -> dict[str, Any]:
    """Two factors of one width that share a direction in part, as two runs do."""
    d, i, j = draw.whole(8, 20), draw.whole(1, 4), draw.whole(1, 4)
    shared = draw.normal(1, d)
    a, b = (draw.normal(rows, d) + 3 * draw.normal(rows, 1) * shared for rows in (4, 6))
    return {"a": a, "b": b, "i": i, "j": j}


TASKS: dict[str, Task] = {
    "start": Method(LORA, way="start"),
    "trained": Method(LORA, way="trained"),
    "change": Method(LORA),
    "gradients": Method(LORA, way="gradients"),
    "merged": Method(LORA, way="merged"),
    "similarity": Function(
        "phi",
        right=phi,
        arguments=matrices,
        wrong={
            "the norm is not squared: phi is ||U_A^T U_B||_F^2 / min(i, j)": not_squared,
            "it is divided by max(i, j) in place of min(i, j)": by_larger,
            "rows of the matrices stand where their singular vectors belong": of_rows,
        },
    ),
}
