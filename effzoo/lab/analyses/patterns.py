"""Who attends whom: pairs by formula, the attention matrix that a core really computes, and the four steps of LSH
attention.

Sliding windows and global tokens: Beltagy et al. 2020, Longformer, arXiv:2004.05150, section 3.1. Hashing, sorting and
chunks: Kitaev et al. 2020, Reformer, arXiv:2001.04451, section 2 and figure 2; the steps here are computed by the
functions that the core `lsh` itself uses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from effzoo.attention import AttentionCore, Mask
from effzoo.attention.hashing import buckets_of, sort
from effzoo.attention.rounds import HashingRounds, Sorted
from effzoo.errors import OptionError


def window_pairs(n: int, window: int, dilation: int = 1) -> int:
    """Pairs (i, j) with |i - j| <= dilation window / 2 and dilation dividing i - j.

        sum over |k| <= window / 2 of n - dilation |k|

    Raises OptionError for an odd window.
    """
    if window < 0 or window % 2 or n < 1 or dilation < 1:
        raise OptionError(
            f"a window is even and at least 0, n and dilation at least 1; got window={window}, n={n}, "
            f"dilation={dilation}"
        )
    return sum(max(0, n - dilation * abs(k)) for k in range(-window // 2, window // 2 + 1))


def global_pairs(n: int, window: int, globals: int) -> int:
    """Pairs of a sliding window with `globals` first positions that attend all and are attended by all."""
    if not 0 <= globals < n:
        raise OptionError(f"global tokens are fewer than the {n} positions, got {globals}")
    return 2 * globals * n - globals**2 + window_pairs(n - globals, window)


def chunk_pairs(n: int, chunk: int, back: int = 1) -> int:
    """Pairs of n positions in chunks, where a query sees its chunk and `back` chunks before it, itself left out."""
    if chunk < 1 or back < 0 or n < 1:
        raise OptionError(f"chunk and n are at least 1 and back at least 0, got chunk={chunk}, n={n}, back={back}")
    sizes = [min(chunk, n - start) for start in range(0, n, chunk)]
    return sum(size * sum(sizes[max(0, at - back) : at + 1]) for at, size in enumerate(sizes)) - n


@torch.no_grad()
def attention_matrix(core: AttentionCore, *projected: Tensor, mask: Mask | None = None) -> Tensor:
    """The weights [batch, heads, n, n] with which `core.forward` adds up values.

    They are its output where the values are the identity. For cores with one projection of values, of any kind, whether
    it has a pattern or not.

    projected: the projections that are compared, each [batch, heads, n, head_dim], in the core's order and without the
        values.
    """
    first = projected[0]
    values = torch.eye(first.shape[2], dtype=first.dtype).expand(*first.shape[:3], -1)
    mode = core.training
    core.eval()
    try:
        out: Tensor = core(*projected, values, mask=mask or Mask())
        return out
    finally:
        core.train(mode)


def same_bucket(q: Tensor, k: Tensor, rotations: Tensor, factors: Sequence[int]) -> Tensor:
    """bool[rounds, batch, heads, n, n]: whether query i and key j hash into one bucket, under the same rotations."""
    return buckets_of(q, rotations, factors).unsqueeze(-1) == buckets_of(k, rotations, factors).unsqueeze(-2)


def in_order_of(pairs: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Pairs [..., n, n] with rows sorted by the buckets [..., n] of queries, columns by those of keys; stable."""
    of_queries, of_keys = (sort(buckets)[0] for buckets in (queries, keys))
    pairs = pairs.gather(-2, of_queries.unsqueeze(-1).expand(pairs.shape))
    return pairs.gather(-1, of_keys.unsqueeze(-2).expand(pairs.shape))


def within_reach(buckets: Tensor, chunk: int, back: int = 1) -> Tensor:
    """Whether key j is in the chunk of query i or in `back` chunks before it, bool[rounds, batch, heads, n, n].

    buckets: [..., n], by which positions are sorted.
    """
    rounds, batch, heads, n = buckets.shape
    tiles = Sorted(HashingRounds(chunk, before=back), buckets)
    query, key = tiles.by_chunk(tiles.query.long(), tiles.key.long())  # n where a slot is empty
    place = (query * (n + 1) + key).transpose(1, 2)
    reach = torch.zeros(rounds, batch * heads, (n + 1) ** 2, dtype=torch.bool, device=buckets.device)
    reach.scatter_(-1, place.flatten(2), torch.ones_like(place, dtype=torch.bool).flatten(2))
    return reach.view(rounds, batch, heads, n + 1, n + 1)[..., :n, :n]


def caught(qk: Tensor, pairs: Tensor) -> Tensor:
    """The share of full attention that lies on some pairs, a number per query [batch, heads, n].

    Full attention with shared queries and keys: softmax over j != i of x_i . x_j / |x_j|, for qk = x [batch, heads, n,
    d].
    """
    scores = qk @ F.normalize(qk, dim=-1).transpose(-1, -2)
    scores.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
    return (scores.softmax(dim=-1) * pairs).sum(dim=-1)


def clusters(n: int, dim: int, count: int, *, spread: float = 0.4, length: float = 8.0, seed: int = 0) -> Tensor:
    """n vectors [1, 1, n, dim] around `count` random directions, for which hashing is made."""
    draw = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(count, dim, generator=draw), dim=-1)
    directions = centres[torch.randint(count, (n,), generator=draw)]
    return (
        length * F.normalize(directions + spread * torch.randn(n, dim, generator=draw) / dim**0.5, dim=-1)[None, None]
    )
