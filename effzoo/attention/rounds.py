"""Rounds of hashing, a few heads at a time: what is sorted, gathered and masked for them stays in the processor's cache and is made again backward.

`HashingRounds.parts` is the plain twin, a part of the one softmax for every round, all heads at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effzoo.attention.hashing import Sorted
from effzoo.attention.kernel import merge
from effzoo.attention.part import Folded, Kernel, Layout, Part, Tile

TOGETHER = 2**19  # numbers of a tensor of queries or keys


@dataclass(frozen=True, eq=False)
class HashingRounds(Layout):
    """Attention in every round of `Sorted`; a part with these rounds is given its buckets [rounds, batch, heads, n].

    cut: buckets, lengths -> the tiles of some heads. biases: tiles, buckets -> the additive bias of each round, [groups, chunks, chunk, width].
    lengths [batch]: how many tokens there are.
    """

    cut: Callable[[Tensor, Tensor], Sorted]
    biases: Callable[[Sorted, Tensor], Iterator[Tensor]]
    lengths: Tensor

    def plain(self, part: Part) -> list[Part]:
        buckets = _buckets(part.given)
        tiles, found = self.cut(buckets, self.lengths), []
        rounds = zip(tiles.queries(part.q), tiles.keys(part.k), tiles.keys(part.v), self.biases(tiles, buckets), strict=True)
        for index, (queries, keys, values, bias) in enumerate(rounds):
            fold, unfold = tiles.folds(index)
            found.append(Part(queries, keys, values, bias, scale=part.scale, layout=Folded(fold=fold, unfold=unfold)))
        return found

    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, heads, n, _ = q.shape
        out = v.new_empty(batch, n, heads, v.shape[-1]).transpose(1, 2)
        lse = q.new_empty(batch, heads, n, 1, dtype=torch.promote_types(q.dtype, torch.float32))
        for where, tiles, rounds in self._few(q, given):
            of_q, of_k, of_v = (_rows(x[where]) for x in (q, k, v))
            results = []
            for index, number, bias in rounds:
                fold, unfold = tiles.folds(index)
                tile = _tile(fold(of_q), tiles.keys_of(of_k, index), tiles.keys_of(of_v, index), bias)
                one_out, one_lse = kernel.forward(tile, number)
                results.append((unfold(_chunks_first(one_out)), unfold(_chunks_first(one_lse).unsqueeze(-1))))
            out[where], lse[where] = merge(*results)
        return out, lse

    def backward(
        self, kernel: Kernel, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *given: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients = tuple(x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v))
        exact = torch.promote_types(q.dtype, torch.float32)
        for where, tiles, rounds in self._few(q, given):
            of_grad, of_q, of_k, of_v, of_out, of_lse = (_rows(x[where]) for x in (grad, q, k, v, out, lse))
            sums: list[Tensor] = []
            for index, number, bias in rounds:
                fold, unfold = tiles.folds(index)
                tile = _tile(fold(of_q), tiles.keys_of(of_k, index), tiles.keys_of(of_v, index), bias)
                folded = (_chunks_first(x) for x in (fold(of_grad), fold(of_out), fold(of_lse).squeeze(-1)))
                found = [_chunks_first(x) for x in kernel.backward(tile, number, *folded)]
                placed = unfold(found[0]), tiles.keys_back(found[1], index), tiles.keys_back(found[2], index)
                sums = [x.to(exact) for x in placed] if not sums else [total.add_(x) for total, x in zip(sums, placed, strict=True)]
            for whole, total in zip(gradients, sums, strict=True):
                whole[where] = total
        return gradients  # type: ignore[return-value]

    def _few(self, q: Tensor, given: Sequence[Tensor | None]) -> Iterator[tuple[tuple[slice, slice], Sorted, Iterator[tuple[int, int, Tensor]]]]:
        """Which examples and heads, their tiles, and for each round its index, its number among all and its bias; always in the same order."""
        buckets = _buckets(given)
        batch, heads, n, d = q.shape
        together = max(1, TOGETHER // max(1, n * d))
        examples, of_heads = max(1, together // heads), min(together, heads)
        count = 0
        for example in range(0, batch, examples):
            for head in range(0, heads, of_heads):
                where = slice(example, example + examples), slice(head, head + of_heads)
                own = buckets[:, where[0], where[1]]
                tiles = self.cut(own, self.lengths[where[0]])
                yield where, tiles, zip(range(tiles.rounds), range(count, count + tiles.rounds), self.biases(tiles, own), strict=True)
                count += tiles.rounds


def _tile(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tile:
    return Tile(_chunks_first(q), _chunks_first(k), _chunks_first(v), _chunks_first(bias), causal=False)


def _buckets(given: Sequence[Tensor | None]) -> Tensor:
    (buckets,) = given
    assert buckets is not None
    return buckets


def _chunks_first(x: Tensor) -> Tensor:
    """[groups, chunks, ...] and back: the flash operator writes its first axis outermost, and a few heads are then in order without a copy."""
    return x.transpose(0, 1)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
