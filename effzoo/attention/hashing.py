"""Locality-sensitive hashing by random rotations (Kitaev et al. 2020, Reformer, arXiv:2001.04451, section 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from einops import rearrange
from torch import Tensor


def automatic(max_length: int, chunk: int) -> tuple[int, ...]:
    """How many buckets a sequence of max_length needs: 2 n / chunk, as a power of two, in factors where one would make
    the rotations large.

    One and two factors are those of HF; more of them, where two would be larger than 2 chunk, keep the cost of hashing
    at n log n.
    """
    power = max(1, (2 * (max_length // chunk)).bit_length() - 1)
    if 2**power <= 2 * max(math.isqrt(max_length // chunk), chunk):
        return (2**power,)
    largest = (2 * max(chunk, 4)).bit_length() - 1
    count = max(2, -(-power // largest))
    return tuple(2 ** ((power + index) // count) for index in range(count))


def draw_rotations(seed: int, layer: int, rounds: range, heads: int, head_dim: int, factors: Sequence[int]) -> Tensor:
    """Standard normal rotations [rounds, heads, head_dim, sum(factors) / 2]; those of one round do not depend on the
    other rounds.

    From a generator of their own: torch's random state stays where it is.
    """
    width = sum(factor // 2 for factor in factors)
    drawn = [torch.empty(0, heads, head_dim, width, device="cpu")]
    for index in rounds:
        source = torch.Generator("cpu").manual_seed(((seed * 1_000_003 + layer) * 1_000_003 + index) % 2**63)
        drawn.append(torch.randn(1, heads, head_dim, width, generator=source, device="cpu"))
    return torch.cat(drawn)


@torch.no_grad()
def buckets_of(x: Tensor, rotations: Tensor, factors: Sequence[int]) -> Tensor:
    """The bucket of each row of x [batch, heads, n, d] in each round: argmax of [x R, -x R], int64[rounds, batch,
    heads, n].

    With factors b_1, b_2, ... the bucket is sum_f bucket_f b_1 ... b_(f-1), each bucket_f from rotations of its own.
    Computed in float32 or better, also under autocast.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    found = torch.zeros(rotations.shape[0], *x.shape[:3], dtype=torch.int64, device=x.device)
    start, product = 0, 1
    device = x.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        for factor in factors:
            half = factor // 2
            if half:  # the rounds side by side: to multiply by each would make a copy of x for it
                side_by_side = rotations[..., start : start + half].to(exact).movedim(0, 2).flatten(2)
                turned = rearrange(x.to(exact) @ side_by_side, "b h n (rounds half) -> rounds b h n half", half=half)
                place = turned.abs().argmax(dim=-1, keepdim=True)
                found += product * (place + half * (turned.gather(-1, place) < 0)).squeeze(-1)
            start, product = start + half, product * factor
    return found


def sort(buckets: Tensor) -> tuple[Tensor, Tensor]:
    """Positions in the order of (bucket, position) along the last axis, and the place of each position in that
    order."""
    order = buckets.sort(dim=-1, stable=True).indices
    return order, torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
