"""What LSH attention would send over ranks, counted on sorts: tokens to the ranks of their slots, or all keys to all.

In each round of hashing positions are sorted by bucket, and slots are cut into chunks, which follow each other over the
ranks. A token at another rank than its slot sends query-key and value there, and gets output and log-sum-exp back; a
rank also gets the keys of the chunks before its first. With random buckets a share (R - 1) / R of tokens moves, so

    slots / gathered = rounds (3 d + 1) / (2 d R),  about 1.5 rounds / R.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effzoo.attention.hashing import buckets_of, sort
from effzoo.attention.lsh import LSH


@dataclass(frozen=True)
class Hashed:
    """Numbers that a rank sends forward, in the mean over ranks, for a head of an example.

    slots: tokens to the ranks of their slots, and results back.
    gathered: queries-keys and values of each rank to all others; the ring of full attention sends as many.
    """

    slots: float
    gathered: float


def hashed(core: LSH, qk: Tensor, ranks: int) -> Hashed:
    """Both ways for query-keys [batch, heads, n, d] of a whole sequence, spread over ranks in contiguous slices."""
    batch, heads, n, d = qk.shape
    _, place = sort(buckets_of(qk, core.rotations[: core.rounds], core.factors))
    holder = torch.arange(n, device=qk.device) * ranks // n
    owner = place // core.chunk * ranks // -(-n // core.chunk)
    moved = float((owner != holder).sum()) / (batch * heads)
    border = core.rounds * (core.before + core.after) * core.chunk * (ranks - 1)
    return Hashed((moved * (3 * d + 1) + border * 2 * d) / ranks, 2 * d * n * (ranks - 1) / ranks)
