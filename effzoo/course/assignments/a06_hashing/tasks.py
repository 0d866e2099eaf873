"""What is right: lists in plain Python say which keys a position sees; all rounds are one softmax over counted keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from effzoo.checks.apart import Limits
from effzoo.course.task import Draw, Function, Task

Pair = tuple[Tensor, Tensor]


# --- the hash


def buckets(x: Tensor, rotation: Tensor) -> Tensor:
    """The first of the largest numbers, looked for in a list."""
    found = []
    for row in x.tolist():
        turned = [sum(a * r for a, r in zip(row, column, strict=True)) for column in rotation.T.tolist()]
        both = turned + [-number for number in turned]
        found.append(both.index(max(both)))
    return torch.tensor(found)


def one_half(x: Tensor, rotation: Tensor) -> Tensor:
    return (x @ rotation).argmax(dim=-1)


def by_size(x: Tensor, rotation: Tensor) -> Tensor:
    return (x @ rotation).abs().argmax(dim=-1)


def other_half_first(x: Tensor, rotation: Tensor) -> Tensor:
    turned = x @ rotation
    return torch.cat([-turned, turned], dim=-1).argmax(dim=-1)


def of_signs(x: Tensor, rotation: Tensor) -> Tensor:
    return ((x @ rotation > 0) * 2 ** torch.arange(rotation.shape[1])).sum(dim=-1)


def vectors(draw: Draw) -> dict[str, Any]:
    n, d, half = draw.one_of(1, 7, 30), draw.whole(2, 6), draw.whole(1, 4)
    return {"x": draw.normal(n, d), "rotation": draw.normal(d, half)}


# --- the chunks


def chunks(bucket: Tensor, size: int) -> Tensor:
    """Pairs (bucket, position), sorted as Python sorts them."""
    order = [position for _, position in sorted((b, position) for position, b in enumerate(bucket.tolist()))]
    order += [-1] * (-len(order) % size)
    return torch.tensor(order).view(-1, size)


def places(bucket: Tensor, size: int) -> Tensor:
    order = torch.tensor([*bucket.argsort(stable=True).argsort().tolist()] + [-1] * (-len(bucket) % size))
    return order.view(-1, size)


def sorted_buckets(bucket: Tensor, size: int) -> Tensor:
    order = torch.tensor(sorted(bucket.tolist()) + [-1] * (-len(bucket) % size))
    return order.view(-1, size)


def filled(value: int) -> Callable[[Tensor, int], Tensor]:
    def chunks_filled(bucket: Tensor, size: int) -> Tensor:
        found = chunks(bucket, size)
        return found.masked_fill(found < 0, len(bucket) if value else 0)

    return chunks_filled


def unsorted(bucket: Tensor, size: int) -> Tensor:
    return chunks(torch.zeros_like(bucket), size)


def ties_turned(bucket: Tensor, size: int) -> Tensor:
    pairs = sorted((b, -position) for position, b in enumerate(bucket.tolist()))
    return torch.tensor([-position for _, position in pairs] + [-1] * (-len(pairs) % size)).view(-1, size)


def largest_first(bucket: Tensor, size: int) -> Tensor:
    return chunks(-bucket, size)


def columns(bucket: Tensor, size: int) -> Tensor:
    return chunks(bucket, size).reshape(size, -1).T.contiguous()


def hashed(draw: Draw) -> dict[str, Any]:
    n = draw.one_of(1, 12, 25, 31) if draw.number else 23
    return {"bucket": draw.wholes(0, draw.whole(1, 5), n), "size": draw.whole(2, 7)}


# --- one round


def seen(slots: Tensor, causal: bool, chunks_read: tuple[int, ...] = (-1, 0), itself: bool = False) -> list[list[int]]:
    """Of each position the keys that it reads."""
    rows = [[position for position in row if position >= 0] for row in slots.tolist()]
    found: list[list[int]] = [[] for row in rows for _ in row]
    for number, row in enumerate(rows):
        near = [key for step in chunks_read if 0 <= number + step < len(rows) for key in rows[number + step]]
        for i in row:
            found[i] = [j for j in near if (j < i if causal else j != i) or (itself and j == i)]
    return found


def read(x: Tensor, v: Tensor, keys_of: list[list[int]], normed: bool = True, scale: float = 1.0) -> Pair:
    """The softmax of every position over its list of keys, and the log of its sum of exponentials."""
    keys = x / x.norm(dim=-1, keepdim=True) if normed else x
    outs, lses = [], []
    for i, seen_keys in enumerate(keys_of):
        if not seen_keys:
            outs.append(torch.zeros_like(v[0]))
            lses.append(x.new_tensor(-math.inf))
            continue
        scores = keys[seen_keys] @ x[i] * scale
        lses.append(lse := scores.logsumexp(dim=0))
        outs.append((scores - lse).exp() @ v[seen_keys])
    return torch.stack(outs), torch.stack(lses)


def one_round(x: Tensor, v: Tensor, slots: Tensor, causal: bool) -> Pair:
    return read(x, v, seen(slots, causal))


def around(*chunks_read: int, itself: bool = False) -> Callable[..., Pair]:
    def one_round_around(x: Tensor, v: Tensor, slots: Tensor, causal: bool) -> Pair:
        return read(x, v, seen(slots, causal, chunks_read, itself))

    return one_round_around


def ring(x: Tensor, v: Tensor, slots: Tensor, causal: bool) -> Pair:
    found = seen(slots, causal)
    if len(slots) > 1:
        last = [key for key in slots[-1].tolist() if key >= 0]
        for i in slots[0].tolist():
            found[i] = found[i] + [j for j in last if j < i or not causal]
    return read(x, v, found)


def by_slot(x: Tensor, v: Tensor, slots: Tensor, causal: bool) -> Pair:
    order = [position for position in slots.flatten().tolist() if position >= 0]
    place = {position: at for at, position in enumerate(order)}
    both = seen(slots, causal=False)
    return read(x, v, [[j for j in keys if not causal or place[j] < place[i]] for i, keys in enumerate(both)])


def not_causal(x: Tensor, v: Tensor, slots: Tensor, causal: bool) -> Pair:
    return read(x, v, seen(slots, causal=False))


def not_normed(x: Tensor, v: Tensor, slots: Tensor, causal: bool) -> Pair:
    return read(x, v, seen(slots, causal), normed=False)


def both_normed(x: Tensor, v: Tensor, slots: Tensor, causal: bool) -> Pair:
    return read(x / x.norm(dim=-1, keepdim=True), v, seen(slots, causal))


def scaled(x: Tensor, v: Tensor, slots: Tensor, causal: bool) -> Pair:
    return read(x, v, seen(slots, causal), scale=x.shape[1] ** -0.5)


def as_sorted(x: Tensor, v: Tensor, slots: Tensor, causal: bool) -> Pair:
    order = [position for position in slots.flatten().tolist() if position >= 0]
    out, lse = one_round(x, v, slots, causal)
    return out[order], lse[order]


def out_as_sorted(x: Tensor, v: Tensor, slots: Tensor, causal: bool) -> Pair:
    return as_sorted(x, v, slots, causal)[0], one_round(x, v, slots, causal)[1]


def without_log(x: Tensor, v: Tensor, slots: Tensor, causal: bool) -> Pair:
    out, lse = one_round(x, v, slots, causal)
    return out, lse.exp()


def empty_read(x: Tensor, v: Tensor, slots: Tensor, causal: bool) -> Pair:
    rows = [[-1] * slots.shape[1], *slots.tolist()]
    found: list[list[int]] = [[]] * len(x)
    for before, row in pairwise(rows):
        for i in row:
            if i >= 0:
                found[i] = [j for j in before + row if (j < i if causal else j != i)]
    return read(x, v, found)


def sorted_twice(x: Tensor, v: Tensor, slots: Tensor, causal: bool) -> Pair:
    order = [position for position in slots.flatten().tolist() if position >= 0]
    out, lse = as_sorted(x, v, slots, causal)
    return out[order], lse[order]


def chunked(draw: Draw) -> dict[str, Any]:
    n, size = draw.one_of(9, 14, 22), draw.whole(2, 5)
    n = 1 if draw.number == 2 else n
    slots = chunks(draw.wholes(0, 3, n), size)
    return {"x": draw.normal(n, d := draw.whole(2, 4)), "v": draw.normal(n, d + 1), "slots": slots,
            "causal": draw.number % 2 == 1}  # fmt: skip


def long(draw: Draw) -> dict[str, Any]:
    n = 16_384
    return {"x": draw.normal(n, 2), "v": draw.normal(n, 1), "slots": draw.order(n).view(-1, 4), "causal": False}


# --- more rounds


def merge(outs: Tensor, lses: Tensor) -> Tensor:
    """The weighted mean of the outputs, the weights written out for each position."""
    rows = []
    for i in range(lses.shape[1]):
        largest = max(lses[:, i].tolist())
        parts = [math.exp(lse - largest) if largest > -math.inf else 0.0 for lse in lses[:, i].tolist()]
        rows.append(sum((part * out for part, out in zip(parts, outs[:, i], strict=True)), outs[0, i] * 0))
        rows[-1] = rows[-1] / max(sum(parts), 1e-300)
    return torch.stack(rows)


def mean(outs: Tensor, lses: Tensor) -> Tensor:
    return outs.mean(dim=0)


def total(outs: Tensor, lses: Tensor) -> Tensor:
    return outs.sum(dim=0)


def not_divided(outs: Tensor, lses: Tensor) -> Tensor:
    return (lses.exp()[:, :, None] * outs).sum(dim=0)


def over_positions(outs: Tensor, lses: Tensor) -> Tensor:
    return (lses.softmax(dim=1)[:, :, None] * outs).sum(dim=0)


def by_logs(outs: Tensor, lses: Tensor) -> Tensor:
    return (lses[:, :, None] * outs).sum(dim=0) / lses.sum(dim=0)[:, None]


def parts(draw: Draw) -> dict[str, Any]:
    rounds, n = draw.whole(2, 4), draw.whole(1, 12)
    lses = draw.normal(rounds, n) * 3
    lses = lses + 1000 if draw.number == 3 else lses  # exp(1000) is infinite
    none = draw.yes(0.3, rounds, n) & (draw.number > 0)
    outs = draw.normal(rounds, n, draw.whole(1, 4)).masked_fill(none[:, :, None], 0.0)
    return {"outs": outs, "lses": lses.masked_fill(none, -math.inf)}


# --- the whole


def lsh(x: Tensor, v: Tensor, rotations: Tensor, size: int, causal: bool, alone: bool = True) -> Tensor:
    """One softmax for each position, in whose list of keys a key stands once for each round in which it is seen."""
    lists = [seen(chunks(buckets(x, rotation), size), causal) for rotation in rotations]
    keys_of = [[key for keys in lists for key in keys[i]] for i in range(len(x))]
    out, lse = read(x, v, keys_of)
    return torch.where((lse == -math.inf)[:, None], v, out) if alone else out


def gives_nothing(x: Tensor, v: Tensor, rotations: Tensor, size: int, causal: bool) -> Tensor:
    return lsh(x, v, rotations, size, causal, alone=False)


def first_round(x: Tensor, v: Tensor, rotations: Tensor, size: int, causal: bool) -> Tensor:
    return lsh(x, v, rotations[:1], size, causal)


def keys_once(x: Tensor, v: Tensor, rotations: Tensor, size: int, causal: bool) -> Tensor:
    lists = [seen(chunks(buckets(x, rotation), size), causal) for rotation in rotations]
    out, lse = read(x, v, [sorted({key for keys in lists for key in keys[i]}) for i in range(len(x))])
    return torch.where((lse == -math.inf)[:, None], v, out)


def cut(what: str) -> Callable[..., Tensor]:
    """Without the gradient through keys, queries or both."""

    def lsh_cut(x: Tensor, v: Tensor, rotations: Tensor, size: int, causal: bool) -> Tensor:
        lists = [seen(chunks(buckets(x, rotation), size), causal) for rotation in rotations]
        q, k = (x.detach() if name in what else x for name in ("query", "key"))
        rows = []
        for i in range(len(x)):
            keys = [key for each in lists for key in each[i]]
            near = k[keys] / k[keys].norm(dim=-1, keepdim=True)
            rows.append((near @ q[i]).softmax(dim=0) @ v[keys] if keys else v[i])
        return torch.stack(rows)

    return lsh_cut


def whole(draw: Draw) -> dict[str, Any]:
    n, rounds, d = draw.one_of(11, 18), draw.one_of(1, 3) if draw.number else 3, draw.whole(2, 4)
    n = 1 if draw.number == 2 else n
    return {"x": draw.normal(n, d), "v": draw.normal(n, 3), "rotations": draw.normal(rounds, d, 2), "size": 3,
            "causal": draw.number % 2 == 1}  # fmt: skip


TASKS: dict[str, Task] = {
    "hash": Function(
        "buckets",
        right=buckets,
        arguments=vectors,
        wrong={
            "only x R is looked at: half of the buckets, those of -x R, are never used": one_half,
            "the sign is lost: x and -x are in one bucket, and belong in two": by_size,
            "-x R stands first: it is [x R, -x R]": other_half_first,
            "the signs of x R are read as a binary number; here the bucket is the place of the largest": of_signs,
        },
    ),
    "sort": Function(
        "chunks",
        right=chunks,
        arguments=hashed,
        wrong={
            "these are the places of the positions (argsort of argsort), not the positions in sorted order": places,
            "these are the buckets, sorted; the positions that have them are wanted": sorted_buckets,
            "an empty slot holds 0, which is a position; it holds -1": filled(0),
            "an empty slot holds n; it holds -1": filled(1),
            "the positions are cut into chunks unsorted": unsorted,
            "the largest bucket comes first; the smallest does": largest_first,
            "within a bucket the positions stand in the wrong order: sort by bucket, then by position": ties_turned,
            "the chunks stand in the columns; a row is a chunk": columns,
        },
    ),
    "round": Function(
        "one_round",
        right=one_round,
        arguments=chunked,
        wrong={
            "a position sees its own chunk alone, and not the one before": around(0),
            "a position sees the chunk after its own in place of the one before": around(0, 1),
            "a position sees the chunk after its own, too": around(-1, 0, 1),
            "a position sees the chunk before alone, and not its own": around(-1),
            "a position sees itself": around(-1, 0, itself=True),
            "the first chunk sees the last one: nothing stands before it": ring,
            "`causal` compares the places in the sorted order; earlier means a smaller position": by_slot,
            "`causal` is not looked at": not_causal,
            "the keys are not normalised: k_j = x_j / |x_j|": not_normed,
            "the queries are normalised too; only the keys are": both_normed,
            "the scores are divided by sqrt(d); here they are x_i . x_j / |x_j|": scaled,
            "the result stands in the sorted order: put each row back to its position": as_sorted,
            "the output stands in the sorted order: put each row back to its position": out_as_sorted,
            "an empty slot is read as if it were a key: index -1 is the last position": empty_read,
            "the second result is the sum of exponentials, without its log": without_log,
            "the result is sorted once more in place of back: it is out[order] = rows, not out = rows[order]":
                sorted_twice,
        },
    ),
    "merge": Function(
        "merge",
        right=merge,
        arguments=parts,
        wrong={
            "it is the mean of the rounds; a round counts by its sum of exponentials, exp(lse)": mean,
            "the rounds are added, and their weights do not sum to 1": total,
            "the weights exp(lse) are not divided by their sum": not_divided,
            "the softmax runs over the positions; it runs over the rounds": over_positions,
            "the weights are the log-sum-exps themselves, without exp": by_logs,
        },
    ),
    "whole": Function(
        "lsh",
        right=lsh,
        arguments=whole,
        gradients=("x", "v"),
        draws=4,
        wrong={
            "a position that sees no key in any round gives 0; it takes its own value": gives_nothing,
            "only the first round is computed": first_round,
            "a key that is met in several rounds counts once; here it counts once for each": keys_once,
            "no gradient reaches the keys: x is detached on the way": cut("key"),
            "no gradient reaches the queries: x is detached on the way": cut("query"),
            "no gradient reaches x: it is detached on the way": cut("query and key"),
        },
    ),
    "linear": Function("one_round", right=one_round, arguments=long, draws=1, limits=Limits(30.0, 5.0)),
}  # fmt: skip
