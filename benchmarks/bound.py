"""How close each kind comes to what its arithmetic allows: the time of full attention times the share of pairs that the
kind computes.

Attention alone, without projections: share = time of full attention * pairs / n^2 / time of the kind, in the same
rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from effzoo.attention import Context, Mask, create
from effzoo.attention.core import AttentionCore
from effzoo.attention.lsh import LSH
from effzoo.measure import interleaved, ratio
from effzoo.measure.layer import DTYPES
from effzoo.measure.pairs import pairs


def training(core: AttentionCore, n: int, dtype: str, device: str) -> Callable[[], object]:
    """Forward and backward of a core on random projections, which are views of [batch, n, heads, d] as in a layer."""
    draw = torch.Generator().manual_seed(1)
    shape = (1, n, core.context.heads, core.context.head_dim)
    made = [
        torch.randn(shape, generator=draw).to(device, DTYPES[dtype]).transpose(1, 2)
        for _ in (*core.projections, "gradient")
    ]
    leaves = [x.requires_grad_() for x in made[: 2 if isinstance(core, LSH) else 3]]
    mask = Mask()

    def run() -> object:
        return torch.autograd.grad(core(*leaves, mask=mask), leaves, made[-1])

    return run


def measure(
    kinds: list[str], n: int, heads: int, head_dim: int, dtype: str, seconds: float, device: str
) -> list[dict[str, Any]]:
    """A row for every kind."""
    context = Context(heads=heads, head_dim=head_dim, max_length=n)
    cores = {kind: create(kind, context).to(device) for kind in ["full", *kinds]}
    times = interleaved(
        {kind: training(core, n, dtype, device) for kind, core in cores.items()}, seconds=seconds, device=device
    )
    rows = []
    for kind in kinds:
        times_of_full, allowed = ratio(times["full"], times[kind]), pairs(cores[kind], n, device=device) / n**2
        rows.append({
            "suite": "bound", "attention": kind, "n": n, "heads": heads, "head_dim": head_dim, "dtype": dtype,
            "device": device, "pairs": allowed,
            "seconds": times[kind].median, "full_seconds": times["full"].median, "rounds": len(times[kind].seconds),
            "share": times_of_full.median * allowed, "share_quartiles": [allowed * x for x in times_of_full.spread],
        })  # fmt: skip
    return rows
