"""Locality-sensitive hashing by random rotations (Kitaev et al. 2020, Reformer, arXiv:2001.04451, section 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from effzoo.devices import without_autocast


def automatic(max_length: int, chunk: int) -> tuple[int, ...]:
    """The number of buckets, 2 max_length / chunk as a power of two, in factors where it is large.

    One and two factors are those of HF; more, where two would be larger than 2 chunk, keep hashing at O(n log n).
    """
    power = max(1, (2 * (max_length // chunk)).bit_length() - 1)
    if 2**power <= 2 * max(math.isqrt(max_length // chunk), chunk):
        return (2**power,)
    largest = (2 * max(chunk, 4)).bit_length() - 1
    count = max(2, -(-power // largest))
    return tuple(2 ** ((power + index) // count) for index in range(count))


def draw_rotations(seed: int, layer: int, rounds: range, heads: int, head_dim: int, factors: Sequence[int]) -> Tensor:
    """Standard normal rotations [rounds, heads, head_dim, sum(factors) / 2]; each round has a generator of its own."""
    width = sum(factor // 2 for factor in factors)
    drawn = [torch.empty(0, heads, head_dim, width, device="cpu")]
    for index in rounds:
        source = torch.Generator("cpu").manual_seed(((seed * 1_000_003 + layer) * 1_000_003 + index) % 2**63)
        drawn.append(torch.randn(1, heads, head_dim, width, generator=source, device="cpu"))
    return torch.cat(drawn)


@torch.no_grad()
def buckets_of(x: Tensor, rotations: Tensor, factors: Sequence[int]) -> Tensor:
    """argmax [x R, -x R] of x [batch, heads, n, d] in each round, int64[rounds, batch, heads, n].

    With factors b_1, b_2, ... the bucket is sum_f bucket_f b_1 ... b_(f-1), where each bucket_f has its own R. Computed
    in float32 or better, also under autocast.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    buckets = torch.zeros(rotations.shape[0], *x.shape[:3], dtype=torch.int64, device=x.device)
    start, product = 0, 1
    with without_autocast(x):
        for factor in factors:
            half = factor // 2
            if half:  # rounds side by side: one product, without a copy of x for each
                side_by_side = rotations[..., start : start + half].to(exact).movedim(0, 2).flatten(2)
                turned = rearrange(x.to(exact) @ side_by_side, "b h n (rounds half) -> rounds b h n half", half=half)
                place = turned.abs().argmax(dim=-1, keepdim=True)
                buckets += product * (place + half * (turned.gather(-1, place) < 0)).squeeze(-1)
            start, product = start + half, product * factor
    return buckets


def sort(buckets: Tensor) -> tuple[Tensor, Tensor]:
    """Positions sorted by (bucket, position) along the last axis, and the place of each position among them."""
    order = buckets.sort(dim=-1, stable=True).indices
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return order, torch.empty_like(order).scatter_(-1, order, places)
