"""How many query-key pairs an attention kind sees: what its arithmetic is proportional to."""

from __future__ import annotations

import torch

from effzoo.attention import AttentionCore, Mask, PredicateAttention
from effzoo.attention.lsh import LSH
from effzoo.errors import IncompatibleError

TOGETHER = 2**22  # pairs that are looked at together


def pairs(core: AttentionCore, n: int, rows: int | None = None, device: str = "cpu") -> float:
    """Pairs of one head, the mean over the heads, in a sequence of n tokens without padding; of LSH, the slots that a
    chunk sees in every round.

    The predicate is asked for some queries after the other, so that memory is that of `TOGETHER` pairs, whatever n is.
    rows: count on so many queries, evenly taken, and scale up. Raises IncompatibleError for kinds that are no
    predicate, other than LSH.
    """
    if isinstance(core, LSH):
        return float(core.rounds * n * (core.before + 1 + core.after) * core.chunk)
    if not isinstance(core, PredicateAttention):
        raise IncompatibleError(
            f"attention {core.name!r} sees no pairs of positions: it makes keys and values fewer first"
        )
    query = torch.arange(n, device=device)
    if rows is not None and rows < n:
        query = (torch.arange(rows, device=device) * 2 + 1) * n // (2 * rows)
    total = 0.0
    for some in torch.split(query, max(1, TOGETHER // (n * core.context.heads))):
        seen = core.seen_at(some[None], n, Mask())
        total += float(seen.sum()) / seen.shape[1]
    return total * n / len(query)
