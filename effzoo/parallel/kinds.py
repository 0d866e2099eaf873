"""What each attention kind exchanges so that a rank computes its own positions exactly.

full                 keys and values around the ring
window, chunks       the positions that the first and the last query see beyond the slice; keys and values of sinks;
                     keys, values and outputs of global tokens, which are few
blockwise            the key blocks that the permutation of a head names for its query blocks (`blocks.py`)
linformer            the sum over ranks of E K and F V
perceiver            the softmax of the latents over the keys of all ranks
nystromformer        the means over segments and what the landmarks read; values near the border for a convolution
linear, performer    the sums S and z of each rank; a causal rank needs those before it alone

lsh is refused; `hashing.py` counts what its exchange would cost.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effzoo.attention.core import AttentionCore, Mask, memory_part, take_positions
from effzoo.attention.features import FeatureAttention, Sums, joined
from effzoo.attention.linformer import Linformer
from effzoo.attention.lsh import LSH
from effzoo.attention.nystromformer import Nystromformer
from effzoo.attention.part import Part, bias_of
from effzoo.attention.perceiver import Perceiver
from effzoo.attention.predicate import PredicateAttention
from effzoo.devices import without_autocast
from effzoo.errors import IncompatibleError
from effzoo.parallel.ranks import Range, Split, attended, fetch, total
from effzoo.parallel.ring import ring
from effzoo.sites import KeysValues


@singledispatch
def attention(
    core: AttentionCore, split: Split, *projected: Any, mask: Mask, memory: KeysValues | None, group: int = 1
) -> Tensor:
    """The output of an attention kind at this rank's positions, [batch, heads, m, head_dim].

    projected, mask: of this rank's positions.
    memory: the same on every rank.
    group: so many heads that follow each other have equal keys and values, of which one is sent.

    Raises IncompatibleError for a kind that cannot be split.
    """
    raise IncompatibleError(
        f"attention {core.name!r} is not computed over ranks: nobody has said what they would exchange; use full, "
        "longformer, local, streaming, blockwise, linformer, perceiver, nystromformer, linear or performer"
    )


def multiple_of(core: AttentionCore) -> int:
    """Slices of a sequence have to be multiples of this for the kind: the size of its chunks."""
    if not isinstance(core, PredicateAttention):
        return 1
    windows = [core.window_of(head) for head in range(core.context.heads)]
    return math.lcm(*(window.chunk for window in windows if window is not None)) if any(windows) else 1


@attention.register
def _(
    core: PredicateAttention,
    split: Split,
    *projected: Any,
    mask: Mask,
    memory: KeysValues | None = None,
    group: int = 1,
) -> Tensor:
    windows = [core.window_of(head) for head in range(core.context.heads)]
    if None in windows or core.by_length:
        raise IncompatibleError(
            f"attention {core.name!r} is not computed over ranks: what a query sees is no window, so it may need every "
            "key; use full, longformer, local or blockwise"
        )
    q, k, v = projected[0], projected[1][:, ::group], projected[2][:, ::group]
    if sees_all(core):
        other = memory_part(q, memory)
        return ring(
            split, q, k, v, mask.key_bias(q.dtype), *([] if other is None else [other]), causal=core.context.causal,
            dropout=core.dropout, backend=core.context.backend,
        )  # fmt: skip
    wanted = [needed(core, split, rank) for rank in range(split.ranks)]
    (first, end), (low, high) = split.range(), wanted[split.rank]
    near = fetch(torch.cat([k, v], dim=-1), split, wanted, 2)
    if group > 1:
        near = near.repeat_interleave(group, dim=1)
    near_k, near_v = near[..., : k.shape[-1]], near[..., k.shape[-1] :]
    near_q = F.pad(q, (0, 0, first - low, high - end))
    whole = _whole(mask, split)
    key_mask, columns = core.key_mask(whole, split.n), core.columns(whole, split.n, q.device)
    parts = [core.part(near_q, near_k, near_v, None if key_mask is None else key_mask[:, low:high])]
    if columns is not None:
        slots = columns.positions.expand(len(q), -1)
        keys, values = (_at_slots(x, slots, slots < split.n, split) for x in projected[1:3])
        seen = columns.seen.expand(-1, -1, split.n, -1)[:, :, low:high]
        parts.append(Part(near_q, keys, values, bias_of(seen, q.dtype)))
    out = core.attend(*parts, memory_part(near_q, memory)).narrow(2, first - low, end - first)
    if mask.is_global is None:
        return out
    return _with_globals(core, split, out, core.of_globals(*projected), mask, memory)


def sees_all(core: AttentionCore) -> bool:
    """Whether every query sees every key, those before it when causal."""
    if not isinstance(core, PredicateAttention):
        return False
    windows = [core.window_of(head) for head in range(core.context.heads)]
    return all(window is not None and window.left is window.right is None for window in windows)


def needed(core: PredicateAttention, split: Split, rank: int) -> Range:
    """The positions that the queries of a rank see, whole chunks."""
    first, end = split.range(rank)
    low, high, unit = first, end, multiple_of(core)
    for head in range(core.context.heads):
        window = core.window_of(head)
        assert window is not None
        chunk, reach = window.chunk, window.dilation * window.chunk
        low = 0 if window.left is None else min(low, first // chunk * chunk - window.left * reach)
        if not core.context.causal:
            last = -(-end // chunk) * chunk
            high = split.n if window.right is None else max(high, last + window.right * reach)
    return max(0, low // unit * unit), min(split.n, high)


def of_all(mask: Mask, split: Split, name: str) -> Tensor | None:
    """`valid` or `is_global` of the whole sequence, bool[batch, n]; gathered once for a batch."""
    own: Tensor | None = getattr(mask, name)
    if own is None:
        return None
    every = [(0, split.n)] * split.ranks
    whole: Tensor = mask.memo(("whole", name), lambda: fetch(own.to(torch.uint8), split, every, 1).bool())
    return whole


def _whole(mask: Mask, split: Split) -> Mask:
    """The mask of the whole sequence."""

    def make() -> Mask:
        valid, is_global = (of_all(mask, split, name) for name in ("valid", "is_global"))
        return Mask(valid, is_global, most_globals=mask.most_globals)

    made: Mask = mask.memo("whole mask", make)
    return made


def _at_slots(x: Tensor, slots: Tensor, filled: Tensor, split: Split) -> Tensor:
    """x [batch, heads, m, d] of each rank at these positions, [batch, heads, slots, d] on every rank."""
    first, end = split.range()
    here = filled & (slots >= first) & (slots < end)
    own = take_positions(x, (slots - first).clamp(0, end - first - 1))
    return total(own * here[:, None, :, None].to(x.dtype), split)


def _with_globals(
    core: PredicateAttention, split: Split, out: Tensor, projected: tuple[Tensor, Tensor, Tensor], mask: Mask,
    memory: KeysValues | None,
) -> Tensor:  # fmt: skip
    """The output, at global tokens that of their own softmax: over the keys of all ranks, and the memory once."""
    q, k, v = projected
    slots, filled = core.slots(_whole(mask, split), split.n)
    first, end = split.range()
    query = _at_slots(q, slots, filled, split)
    key = torch.arange(first, end, device=q.device)[None, None, None, :]
    allowed = core.allowed(
        slots[:, None, :, None], key, Mask(None, mask.is_global), places=split.n,
        query_global=filled[:, None, :, None],
    )  # fmt: skip
    if mask.valid is not None:
        allowed = allowed & mask.valid[:, None, None, :]
    parts = [Part(query, k, v, bias_of(allowed.expand(-1, -1, slots.shape[1], end - first), q.dtype))]
    parts += _on_the_first(split, memory_part(query, memory))
    of_globals = attended(split, *parts, dropout=core.dropout, backend=core.context.backend)
    whole, own = of_all(mask, split, "is_global"), mask.is_global
    assert whole is not None and own is not None
    slot = split.own(whole.cumsum(dim=1) - 1).clamp(min=0)
    return torch.where(own[:, None, :, None], take_positions(of_globals, slot), out)


@attention.register
def _(core: LSH, split: Split, *projected: Any, mask: Mask, memory: KeysValues | None = None, group: int = 1) -> Tensor:
    d, rounds, ranks = core.context.head_dim, core.rounds, split.ranks
    share = rounds * (3 * d + 1) / (2 * d * ranks)
    raise IncompatibleError(
        "attention 'lsh' is not computed over ranks: in each round tokens would travel to the rank of their slot in "
        f"the sort, with {rounds} rounds and {ranks} ranks {share:.2g} times the bytes that gathering all keys takes, "
        + ("more than it saves" if share >= 1 else "which would save, and is not built")
        + "; use longformer or local, or one rank"
    )


@attention.register
def _(
    core: Linformer, split: Split, *projected: Any, mask: Mask, memory: KeysValues | None = None, group: int = 1
) -> Tensor:
    q, k, v = projected
    first, _ = split.range()
    keys = total(core.compressed_slice("k", k, mask, first), split)
    values = total(core.compressed_slice("v", v, mask, first), split)
    return core.attend(Part(q, keys, values), memory_part(q, memory))


@attention.register
def _(
    core: Perceiver, split: Split, *projected: Any, mask: Mask, memory: KeysValues | None = None, group: int = 1
) -> Tensor:
    q, k, v = projected
    z = core.latent_queries().to(k.dtype).expand(k.shape[0], -1, -1, -1)
    part = Part(z, k, torch.cat([k, v], dim=-1), bias=mask.key_bias(k.dtype))
    summary = attended(split, part, dropout=core.dropout, backend=core.context.backend)
    return core.attend(Part(q, summary[..., : k.shape[-1]], summary[..., k.shape[-1] :]), memory_part(q, memory))


@attention.register
def _(
    core: FeatureAttention, split: Split, *projected: Any, mask: Mask, memory: KeysValues | None = None, group: int = 1
) -> Tensor:
    q, k, v = projected
    with without_autocast(q):
        seen = _with_sums_of_ranks(core.sums_of(memory, q, v), split, core.sums(k, v, mask.valid), core.context.causal)
        if core.context.causal:
            return core.continued(q, k, v, mask.valid, seen)
        return core.read(q, seen, v.dtype)


def _with_sums_of_ranks(here: Sums, split: Split, own: Sums, earlier: bool) -> Sums:
    """The sums `here` joined with those of all ranks, or of the ranks before this one."""
    one_each = Split(split.group, tuple(range(split.ranks + 1)))
    wanted = [(0, rank if earlier else split.ranks) for rank in range(split.ranks)]
    found = fetch(torch.cat(own, dim=-1).unsqueeze(2), one_each, wanted, 2)
    # the first rank gets none, and gradients travel between all
    here = Sums(here.top, here.total + 0 * found[..., 1:].sum())
    return joined(here, *(Sums(each[..., :1].detach(), each[..., 1:]) for each in found.unbind(dim=2)))


@attention.register
def _(
    core: Nystromformer, split: Split, *projected: Any, mask: Mask, memory: KeysValues | None = None, group: int = 1
) -> Tensor:
    q, k, v = projected
    bias = mask.key_bias(q.dtype)
    if core.landmarks is None:
        other = memory_part(q, memory)
        out = ring(
            split, q, k[:, ::group], v[:, ::group], bias, *([] if other is None else [other]), causal=False,
            dropout=core.dropout, backend=core.context.backend,
        )  # fmt: skip
    else:
        means, there = core.segments(split.n, Mask(of_all(mask, split, "valid")), k)
        own = split.own(means, 3)
        q_, k_ = total(own @ q, split), total(own @ k, split)
        parts = [Part(q_, k, v, bias), *_on_the_first(split, memory_part(q_, memory))]
        read = attended(split, *parts, dropout=core.dropout, backend=core.context.backend)
        out = core.through_landmarks(q, q_, k_, read, there)
    if core.conv is None:
        return out
    if mask.valid is not None and not core.hf:
        v = v.masked_fill(~mask.valid[:, None, :, None], 0.0)
    half, (first, end) = core.conv.in_features // 2, split.range()
    wanted = [(max(0, low - half), min(split.n, high + half)) for low, high in map(split.range, range(split.ranks))]
    near = core.convolved(fetch(v, split, wanted, 2), Mask())
    return out + near.narrow(2, first - wanted[split.rank][0], end - first)


def _on_the_first(split: Split, memory: Part | None) -> list[Part]:
    """A memory that is seen on the first rank, and there on all, as gradients travel."""
    if memory is None:
        return []
    unseen = bias_of(torch.full((1, 1, 1, memory.k.shape[2]), split.rank == 0, device=memory.k.device), memory.k.dtype)
    return [replace(memory, bias=unseen)]
