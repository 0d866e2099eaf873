"""Blockwise attention: each head attends between blocks that a permutation pairs (Qiu et al. 2020, BlockBERT, arXiv:1911.02972, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from effzoo.annotations import Count, Few
from effzoo.attention import reference
from effzoo.attention.core import AttentionCore, Context, KeysValues, Mask, memory_part, of_heads
from effzoo.attention.part import Part, bias_of
from effzoo.errors import InputError, OptionError
from effzoo.registry import attention

Permutation = tuple[int, ...]


@dataclass(frozen=True)
class _Pairs:
    """Query blocks, the key blocks they see, and their heads, each [pairs]; blocks are places in an axis (heads blocks).

    width: how many keys of the key block exist. causal: query and key block are the same one, under the causal triangle.
    """

    queries: Tensor
    keys: Tensor
    heads: Tensor
    width: int
    causal: bool


@attention.register("blockwise", "blockbert")
class Blockwise(AttentionCore):
    """Query block i of a head with permutation p sees exactly key block p(i): softmax over {j : block(j) = p(block(i))} of q_i . k_j / sqrt(d).

    The identity makes a head local, a cyclic shift makes it look far. Cost O(n^2 / blocks), without any mask unless there is padding.

    blocks: how many. block: length of a block, ceil(max_length / blocks) when None. Blocks are places, not shares of a sequence: position i is
    in block i // block whatever the length of the input, as in BlockBERT, whose inputs are always max_length long. So a sequence gives the same
    alone and in a batch, and a causal output does not change when the sequence grows. The last block may be shorter or empty; inputs
    end at blocks * block positions.
    permutations: of the blocks, counted from 1 as in the lecture: ((1, 2, 3), (2, 3, 1)); by default the identity and as many cyclic
    shifts as there are blocks and heads. groups: heads per permutation, in order, such as (10, 2); by default (10:2 and 8:2:2 of
    12 heads), a sixth of the heads (at least one) for each permutation but the first, which has the rest.

    A row whose key block holds no key gives 0, as every row without keys: key blocks after the end of a short sequence, and, when
    causal (j <= i), key blocks after the query's own. Give `block` when most inputs are much shorter than max_length.
    """

    paper = "Qiu et al. 2020, Blockwise self-attention for long document understanding (BlockBERT), arXiv:1911.02972, section 3"
    cost = "n^2 / blocks"

    def __init__(
        self,
        context: Context,
        *,
        blocks: Few = 2,
        permutations: Sequence[Sequence[int]] | None = None,
        groups: Sequence[int] | None = None,
        block: Count | None = None,
    ):
        super().__init__(context)
        chosen = _shifts(blocks, context.heads) if permutations is None else _checked(permutations, blocks)
        sizes = _emphasis(len(chosen), context.heads) if groups is None else tuple(groups)
        if len(sizes) != len(chosen) or min(sizes) < 1 or sum(sizes) != context.heads:
            fitting = f"at most {context.heads} permutations" if len(chosen) > context.heads else _emphasis(len(chosen), context.heads)
            raise OptionError(
                f"blockwise: groups are heads per permutation, {len(chosen)} numbers of at least 1 that sum to the {context.heads} heads, "
                f"got {sizes}; try {fitting}"
            )
        self.blocks, self.block = blocks, block or -(-context.max_length // blocks)
        self.permutations = tuple(p for p, size in zip(chosen, sizes, strict=True) for _ in range(size))  # one per head, from 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, memory: KeysValues | None = None) -> Tensor:  # type: ignore[override]
        n = q.shape[2]
        block = min(self.block, n)
        used = self._used(n, block)
        plan, order = mask.memo(("blockwise", self.permutations, self.context.causal, block, n), lambda: self._plan(n, block, q.device))
        blocks = tuple(rearrange(_filled(x, used * block - n), "b h (blocks c) d -> b (h blocks) c d", c=block) for x in (q, k, v))
        outs = [self._attend(pairs, blocks, bias, memory) for pairs, bias in zip(plan, self._biases(plan, block, mask, q.dtype), strict=True)]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1).index_select(1, order)
        return rearrange(out, "b (h blocks) c d -> b h (blocks c) d", h=self.context.heads)[:, :, :n]

    def _attend(self, pairs: _Pairs, projected: tuple[Tensor, ...], bias: Tensor | None, memory: KeysValues | None) -> Tensor:
        """Attention of some pairs of blocks, [b, (h blocks), c, d] -> [b, pairs, c, d]; the pairs take the place of the heads."""
        q, k, v = projected
        queries = q if len(pairs.queries) == q.shape[1] else q.index_select(1, pairs.queries)  # all of them stand in order
        remembered = memory_part(queries, of_heads(memory, pairs.heads))
        if pairs.width == 0:
            if remembered is not None:
                return self.attend(remembered)
            return v.index_select(1, pairs.queries).masked_fill(torch.ones((), dtype=torch.bool, device=v.device), 0.0)  # 0, and a gradient of 0
        keys, values = (x[:, :, : pairs.width].index_select(1, pairs.keys) for x in (k, v))
        return self.attend(Part(queries, keys, values, bias, causal=pairs.causal), remembered)

    def _biases(self, plan: list[_Pairs], block: int, mask: Mask, dtype: torch.dtype) -> list[Tensor | None]:
        """Padding of the key blocks of each call, [b, pairs, 1, width]; None when there is none."""
        if mask.valid is None:
            return [None] * len(plan)
        valid, heads = mask.valid, self.context.heads

        def make() -> list[Tensor | None]:
            whole = F.pad(valid, (0, -valid.shape[1] % block), value=False)
            blocks = rearrange(whole, "b (blocks c) -> b blocks c", c=block).repeat(1, heads, 1)
            return [bias_of(blocks[:, pairs.keys, None, : pairs.width], dtype) for pairs in plan]

        return mask.memo(("blockwise padding", self.permutations, self.context.causal, block, dtype), make)

    def _plan(self, n: int, block: int, device: torch.device) -> tuple[list[_Pairs], Tensor]:
        """The pairs sorted into few calls that need no mask, and where each pair (head, block) stands in their concatenation."""
        used = self._used(n, block)
        last = n - (used - 1) * block  # keys in the last block
        calls: dict[tuple[int, bool], list[tuple[int, int, int]]] = {}
        for head, permutation in enumerate(self.permutations):
            for query in range(used):
                key = permutation[query]
                diagonal = self.context.causal and key == query  # its padding stands after every real query
                width = block if key < used - 1 or diagonal else last
                if key >= used or (self.context.causal and key > query):
                    key, width, diagonal = query, 0, False
                calls.setdefault((width, diagonal), []).append((head * used + query, head * used + key, head))
        plan = []
        for (width, diagonal), pairs in calls.items():
            queries, keys, heads = (torch.tensor(column, device=device) for column in zip(*pairs, strict=True))
            plan.append(_Pairs(queries, keys, heads, width, diagonal))
        return plan, torch.cat([pairs.queries for pairs in plan]).argsort()

    def _used(self, n: int, block: int) -> int:
        """How many blocks hold a position."""
        if n > self.blocks * self.block:
            raise InputError(
                f"blockwise has {self.blocks} blocks of {self.block} positions, {self.blocks * self.block} in all, got {n}; "
                f"build the model with max_length={n}, or with block={-(-n // self.blocks)}"
            )
        return -(-n // block)

    def pattern(self, n: int, mask: Mask) -> Tensor:
        allowed = reference.padding(n, mask.valid)
        block_of = torch.arange(n, device=allowed.device) // self.block
        seen = torch.tensor(self.permutations, device=allowed.device)[:, block_of]  # the key block of each query, [heads, n]
        allowed = allowed & (seen[:, :, None] == block_of)
        return allowed & (reference.distance(n, allowed.device) >= 0) if self.context.causal else allowed


def _filled(x: Tensor, more: int) -> Tensor:
    """The sequence with `more` rows of zeros at its end, [b, h, n, d]; a pad by nothing would copy."""
    return F.pad(x, (0, 0, 0, more)) if more else x


def _shifts(blocks: int, heads: int) -> list[Permutation]:
    """The identity and the cyclic shifts, at most one permutation per head."""
    return [tuple((block + shift) % blocks for block in range(blocks)) for shift in range(min(blocks, heads))]


def _emphasis(permutations: int, heads: int) -> tuple[int, ...]:
    """Heads per permutation: a sixth for each but the first, less when that leaves none for the first."""
    if permutations == 1:
        return (heads,)
    others = max(1, min(heads // 6, (heads - 1) // (permutations - 1)))
    return (heads - others * (permutations - 1), *[others] * (permutations - 1))


def _checked(permutations: Sequence[Sequence[int]], blocks: int) -> list[Permutation]:
    """The permutations, counted from 0."""
    wanted = list(range(1, blocks + 1))
    for permutation in permutations:
        if sorted(permutation) != wanted:
            raise OptionError(
                f"blockwise: a permutation of {blocks} blocks holds each of {tuple(wanted)} once, got {tuple(permutation)}; "
                f"try {tuple(wanted[1:] + wanted[:1])}, or blocks={len(permutation)}"
            )
    if not permutations:
        raise OptionError(f"blockwise: permutations is empty; give at least one of {blocks} blocks, such as ({tuple(wanted)},)")
    return [tuple(block - 1 for block in permutation) for permutation in permutations]
