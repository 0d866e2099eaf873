"""What a rank sends and computes for one attention layer, by closed forms: nothing runs, no process is started.

sent      bytes forward and backward, equal to those that `counted` counts
scores    pairs of a query and a key of one head, the mean over heads: attention takes 4 d operations for each
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

import torch

from effzoo.attention.blockwise import Blockwise
from effzoo.attention.core import AttentionCore, Mask
from effzoo.attention.features import CHUNK, FeatureAttention
from effzoo.attention.linformer import Linformer
from effzoo.attention.nystromformer import Nystromformer
from effzoo.attention.perceiver import Perceiver
from effzoo.attention.predicate import PredicateAttention
from effzoo.errors import IncompatibleError
from effzoo.parallel.blocks import Wanted, segments
from effzoo.parallel.kinds import needed, sees_all
from effzoo.parallel.ranks import Split, overlap


@dataclass(frozen=True)
class Sent:
    """Bytes that one rank sends for a layer, forward and backward."""

    forward: float
    backward: float


@dataclass(frozen=True)
class Shapes:
    """What bytes depend on besides the kind.

    batch: sequences of a batch, without padding.
    dtype: of keys and values; log-sum-exps and the gradients of keys on the ring are in float32 or better.
    group: heads of queries that share a head of keys and values.
    globals: the most global tokens of a sequence.
    """

    batch: int = 1
    dtype: torch.dtype = torch.float32
    group: int = 1
    globals: int = 0

    def rows(self, core: AttentionCore, group: int = 1) -> int:
        """Bytes of one vector for each head and example."""
        heads, d = core.context.heads // group, core.context.head_dim
        return self.batch * heads * d * self.dtype.itemsize

    def exact(self, core: AttentionCore, group: int = 1) -> int:
        """`rows` in float32 or better."""
        return self.rows(core, group) // self.dtype.itemsize * torch.promote_types(self.dtype, torch.float32).itemsize


@singledispatch
def sent(core: AttentionCore, split: Split, shapes: Shapes) -> Sent:
    """Bytes that this rank of the split sends for one layer. Raises IncompatibleError for a kind that is not split."""
    raise IncompatibleError(f"attention {core.name!r} is not computed over ranks, so there is nothing to send")


@singledispatch
def scores(core: AttentionCore, split: Split) -> float:
    """Pairs of a query of this rank and a key that it sees, of a head, in the mean. Raises as `sent`."""
    raise IncompatibleError(f"attention {core.name!r} is not computed over ranks")


def _reduced(split: Split, size: float) -> float:
    """Bytes of an all-reduce."""
    return 2 * (split.ranks - 1) / split.ranks * size


def _ring(core: AttentionCore, split: Split, shapes: Shapes) -> Sent:
    """n - (positions of the next rank) keys and values, forward and backward, and their gradients home."""
    if split.ranks == 1:
        return Sent(0, 0)
    keys = 2 * shapes.rows(core, shapes.group) * (split.n - split.size((split.rank + 1) % split.ranks))
    return Sent(keys, keys + 2 * shapes.exact(core, shapes.group) * split.n)


def _columns(core: PredicateAttention, split: Split) -> int:
    """Keys that queries see beside their window in every input."""
    columns = core.columns(Mask(), split.n, torch.device("meta"))
    return 0 if columns is None else columns.positions.shape[1]


@sent.register
def _(core: PredicateAttention, split: Split, shapes: Shapes) -> Sent:
    """Around the ring: n - (positions of the next rank) keys and values twice, and their gradients home. A window: what
    others need of this rank, and the gradients of what this one needed; global tokens by all-reduces."""
    row, others = 2 * shapes.rows(core, shapes.group), [rank for rank in range(split.ranks) if rank != split.rank]
    if sees_all(core):
        return _ring(core, split, shapes)
    held, mine = split.range(), needed(core, split, split.rank)
    shared = [overlap(held, needed(core, split, rank)) for rank in others]
    given = sum(end - first for first, end in filter(None, shared))
    taken = mine[1] - mine[0] - (held[1] - held[0])
    reduced, wide = _reduced(split, 2 * _columns(core, split) * shapes.rows(core)), 0.0  # keys and values of sinks
    if shapes.globals and core.knows_globals():
        reduced = _reduced(split, 4 * shapes.globals * shapes.rows(core))  # keys, values, queries, outputs
        wide = len(others) * shapes.globals * shapes.exact(core) / core.context.head_dim  # log-sum-exps
    return Sent(row * given + reduced + wide, row * taken + reduced)


@sent.register
def _(core: Blockwise, split: Split, shapes: Shapes) -> Sent:
    """The key blocks that others name of this rank's positions, and the gradients of those that it named."""
    block = core.block_size(split.n)

    def shared(rank: int, held: int) -> int:
        """Positions, over the heads, that a rank wants of those that another holds."""
        wanted = Wanted.of(core, [block], [split.n], shapes.group, split, rank)
        return sum(end - first for _, _, (first, end), _ in wanted.shared(split.range(held)))

    others = [rank for rank in range(split.ranks) if rank != split.rank]
    row = 2 * shapes.batch * core.context.head_dim * shapes.dtype.itemsize
    return Sent(
        row * sum(shared(rank, split.rank) for rank in others), row * sum(shared(split.rank, rank) for rank in others)
    )


@sent.register
def _(core: Linformer, split: Split, shapes: Shapes) -> Sent:
    """All-reduces of E K and F V."""
    reduced = _reduced(split, 2 * core.k * shapes.rows(core))
    return Sent(reduced, reduced)


@sent.register
def _(core: Perceiver, split: Split, shapes: Shapes) -> Sent:
    """An all-reduce of the latents' outputs, of width 2 d, and their log-sum-exps to all."""
    latents = core.latents.num_embeddings
    reduced = _reduced(split, 2 * latents * shapes.rows(core))
    wide = (split.ranks - 1) * latents * shapes.exact(core) / core.context.head_dim
    return Sent(reduced + wide, reduced)


@sent.register
def _(core: Nystromformer, split: Split, shapes: Shapes) -> Sent:
    """All-reduces of the landmarks and of what they read, their log-sum-exps to all; values for the convolution."""
    if core.landmarks is None:
        whole = _ring(core, split, shapes)
    else:
        landmarks = min(core.landmarks, split.n)
        reduced = _reduced(split, 3 * landmarks * shapes.rows(core))
        wide = (split.ranks - 1) * landmarks * shapes.exact(core) / core.context.head_dim
        whole = Sent(reduced + wide, reduced)
    given = taken = 0
    if core.conv is not None:
        half, (first, end) = core.conv.in_features // 2, split.range()
        near = [(max(0, low - half), min(split.n, high + half)) for low, high in map(split.range, range(split.ranks))]
        shared = [overlap((first, end), near[rank]) for rank in range(split.ranks) if rank != split.rank]
        given = sum(high - low for low, high in filter(None, shared))
        taken = near[split.rank][1] - near[split.rank][0] - (end - first)
    row = shapes.rows(core)
    return Sent(whole.forward + row * given, whole.backward + row * taken)


@sent.register
def _(core: FeatureAttention, split: Split, shapes: Shapes) -> Sent:
    """The sums, d + 2 numbers for each feature: to all other ranks, or to those behind it; and their gradients back."""
    sums = core.features * (core.context.head_dim + 2) * shapes.exact(core) / core.context.head_dim
    others = split.ranks - 1
    if not core.context.causal:
        return Sent(others * sums, others * sums)
    return Sent((others - split.rank) * sums, split.rank * sums)


@scores.register
def _(core: PredicateAttention, split: Split) -> float:
    """Of a window the keys in it, at borders of the sequence as well."""
    m, n, causal = split.size(), split.n, core.context.causal
    if sees_all(core):
        pieces = split.pieces()
        return float(sum((first + 1 + end) * (end - first) // 2 for first, end in pieces)) if causal else float(m * n)
    total = 0.0
    for head in range(core.context.heads):
        window = core.window_of(head)
        if window is None:
            raise IncompatibleError(f"attention {core.name!r} is not computed over ranks")
        left = n if window.left is None else window.left * window.chunk
        right = 0 if causal else n if window.right is None else window.right * window.chunk
        inside = (window.chunk + 1) / 2 if causal else window.chunk  # of its own chunk, in the mean
        total += m * min(n, left + inside + right + _columns(core, split))
    return total / core.context.heads


@scores.register
def _(core: Blockwise, split: Split) -> float:
    block, total = core.block_size(split.n), 0.0
    for permutation in core.permutations:
        for (first, end), (low, high), diagonal in segments(core, permutation, block, split.n, split, split.rank):
            total += (end - first) * (high - low - ((end - first - 1) / 2 if diagonal else 0))
    return total / core.context.heads


@scores.register
def _(core: Linformer, split: Split) -> float:
    """E K and F V take as many operations as attention to k keys."""
    return 2.0 * split.size() * core.k


@scores.register
def _(core: Perceiver, split: Split) -> float:
    """The summary has values of width 2 d."""
    return 2.5 * split.size() * core.latents.num_embeddings


@scores.register
def _(core: FeatureAttention, split: Split) -> float:
    """S and what is read of it take as many operations as attention to one key for each feature; causal layers multiply
    out the pairs of a chunk as well."""
    d, inside = core.context.head_dim, CHUNK / 2 if core.context.causal else 0
    return split.size() * (core.features + inside * (core.features + d) / (2 * d))


@scores.register
def _(core: Nystromformer, split: Split) -> float:
    """Means of queries and keys and two softmaxes over the landmarks; Z is computed on every rank."""
    if core.landmarks is None:
        return float(split.size() * split.n)
    m, d = min(core.landmarks, split.n), core.context.head_dim
    return 3.0 * split.size() * m + (8 * core.iterations * m**3 + 4 * m * m * d) / (4 * d)
