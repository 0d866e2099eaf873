"""What is right: the zoo's blockwise attention, and counts of pairs one by one."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effzoo.checks.apart import Limits
from effzoo.course.entries import Layer
from effzoo.course.task import Draw, Function, Task
from effzoo.tasks import ListOps

BLOCKS, BLOCK = 4, 16
SHORT, LONG = f"blockwise[blocks={BLOCKS}, block={BLOCK}]", "blockwise[blocks=64, block=512]"
Pairs = Tensor


def dense(
    shift: Callable[[int], int], *, triangle: bool = True, within: bool = False, scaled: bool = True
) -> Callable[..., Tensor]:
    """Blockwise attention with another block, (head) -> how far it is, or another triangle."""

    def wrong(q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor, causal: bool) -> Tensor:
        heads, n, d = q.shape[1:]
        i = torch.arange(n)[:, None]
        j = torch.arange(n)
        shifts = torch.tensor([shift(head) for head in range(heads)])[:, None, None]
        allowed = ((i // BLOCK + shifts) % BLOCKS == j // BLOCK) & valid[:, None, None, :]
        if causal and within:
            allowed = allowed & (j % BLOCK <= i % BLOCK)
        elif causal and triangle:
            allowed = allowed & (j <= i)
        scores = (q @ k.mT / (d**0.5 if scaled else 1.0)).masked_fill(~allowed, -torch.inf)
        return scores.softmax(dim=-1).nan_to_num(0.0) @ v

    return wrong


PATTERNS = {
    "the scores are those without 1 / sqrt(d)": dense(lambda head: head, scaled=False),
    "the permutation is taken backwards: block i reads block p(i), and here block p(i) reads block i": dense(
        lambda head: -head
    ),
    "every head reads its own block: the permutation of the head is not used": dense(lambda head: 0),
    "all heads have the permutation of the last head": lambda q, k, v, *, valid, causal: dense(
        lambda head: q.shape[1] - 1
    )(q, k, v, valid=valid, causal=causal),
    "the causal triangle is off": dense(lambda head: head, triangle=False),
    "the causal triangle compares places within the blocks: it must compare positions in the sequence": dense(
        lambda head: head, within=True
    ),
}


def reach(permutations: Sequence[Sequence[int]], layers: int) -> float:
    """By sets: what a block knows is what it knew and what those knew that it reads."""
    blocks = len(permutations[0])
    knows = [{i} for i in range(blocks)]
    for _ in range(layers):
        knows = [knows[i].union(*(knows[p[i]] for p in permutations)) for i in range(blocks)]
    return sum(map(len, knows)) / blocks**2


def without_residual(permutations: Sequence[Sequence[int]], layers: int) -> float:
    blocks = len(permutations[0])
    knows = [{i} for i in range(blocks)]
    for _ in range(layers):
        knows = [set().union(*(knows[p[i]] for p in permutations)) for i in range(blocks)]
    return sum(map(len, knows)) / blocks**2


def caught(pairs: Pairs, permutation: Sequence[int], block: int) -> float:
    return sum(permutation[i // block] == j // block for i, j in pairs.tolist()) / len(pairs)


def compare(
    pairs: Pairs, permutations: Sequence[Sequence[int]], block: int, configurations: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Head by head, pair by pair."""
    shares = []
    for groups in configurations:
        heads = [p for p, size in zip(permutations, groups, strict=True) for _ in range(size)]
        shares.append(sum(caught(pairs, p, block) for p in heads) / len(heads))
    return {"shares": shares, "best": max(range(len(shares)), key=lambda at: (round(shares[at], 9), -at))}


def least(**given: Any) -> dict[str, Any]:
    right = compare(**given)
    return right | {"best": right["shares"].index(min(right["shares"]))}


def not_divided(pairs: Pairs, configurations: Sequence[Sequence[int]], **given: Any) -> dict[str, Any]:
    right = compare(pairs=pairs, configurations=configurations, **given)
    sums = [share * sum(groups) for share, groups in zip(right["shares"], configurations, strict=True)]
    return {"shares": sums, "best": sums.index(max(sums))}


def any_head(pairs: Pairs, permutations: Sequence[Sequence[int]], block: int, **given: Any) -> dict[str, Any]:
    share = sum(caught(pairs, p, block) for p in permutations)
    return {"shares": [share] * len(given["configurations"]), "best": 0}


def equal_heads(pairs: Pairs, permutations: Sequence[Sequence[int]], block: int, **given: Any) -> dict[str, Any]:
    share = sum(caught(pairs, p, block) for p in permutations) / len(permutations)
    return {"shares": [share] * len(given["configurations"]), "best": 0}


def of_expressions(draw: Draw) -> tuple[Pairs, int]:
    """Dependencies of one ListOps expression, token -> its operator, and how many tokens it has."""
    task = ListOps(depth=4, arguments=4, shortest=16, longest=60)
    tokens = task.expression(random.Random(draw.whole(0, 10**9)))
    pairs: list[list[int]] = []
    opened: list[int] = []
    for at, token in enumerate(tokens):
        if opened:
            pairs.append([at, opened[-1]])
        if token.startswith("["):
            opened.append(at)
        elif token == "]":
            opened.pop()
    return torch.tensor(pairs), len(tokens)


def of_copying(draw: Draw) -> tuple[Pairs, int]:
    """A token of the second half depends on the one half a sequence before."""
    half = draw.whole(8, 30)
    return torch.stack([torch.arange(half, 2 * half), torch.arange(half)], dim=1), 2 * half


def dependencies(draw: Draw) -> tuple[Pairs, int, int]:
    """Pairs, the number of blocks and the length of a block: of expressions and of copying in turns."""
    pairs, n = (of_copying if draw.number % 2 else of_expressions)(draw)
    blocks = draw.one_of(2, 4) if draw.number % 2 else draw.whole(2, 5)
    return pairs, blocks, -(-n // blocks)


def shifts(blocks: int, count: int) -> list[list[int]]:
    return [[(i + shift) % blocks for i in range(blocks)] for shift in range(count)]


def one_head(draw: Draw) -> dict[str, Any]:
    """Of a shift half a sequence back, so that copying is read; of random permutations too."""
    pairs, blocks, block = dependencies(draw)
    permutation = shifts(blocks, blocks)[blocks // 2] if draw.number == 1 else draw.order(blocks).tolist()
    return {"pairs": pairs, "permutation": permutation, "block": block}


def configurations(draw: Draw) -> dict[str, Any]:
    """The paper's configurations with two and with three permutations, and some with fewer heads."""
    pairs, blocks, block = dependencies(draw)
    if draw.number % 3 == 2 and blocks > 2:
        some = [[2, 2, 8], [8, 2, 2], [2, 8, 2], [1, 1, 1]]
    else:
        some = [[6, 6], [2, 10], [10, 2], [1, 3]]
    permutations = shifts(blocks, len(some[0]))
    if draw.number % 2:
        permutations[1] = shifts(blocks, blocks)[blocks // 2]
    return {"pairs": pairs, "permutations": permutations, "block": block, "configurations": some}


TASKS: dict[str, Task] = {
    "blocks": Layer(SHORT, lengths=(18, 64), draws=6, wrong=PATTERNS),
    "masked": Layer(SHORT, lengths=(1, 64), draws=6, causal=True, padding="some", wrong=PATTERNS),
    "memory": Layer(LONG, lengths=(32_768, 32_768), draws=1, dtype="float32", limits=Limits(40.0, 5.0)),
    "reach": Function(
        "reach",
        right=reach,
        arguments=lambda draw: {
            "permutations": [draw.order(blocks).tolist() for _ in range(draw.whole(1, 2))]
            if (blocks := draw.whole(3, 9)) and draw.number
            else shifts(blocks, 2),
            "layers": draw.whole(1, 4),
        },
        wrong={
            "the residual is missing: a block keeps what it knew, whether a head reads the block itself or not": (
                without_residual
            ),
            "this is of one layer": lambda permutations, layers: reach(permutations, 1),
            "this is of one layer more": lambda permutations, layers: reach(permutations, layers + 1),
            "this is a number of pairs: divide it by all blocks^2 pairs": (
                lambda permutations, layers: reach(permutations, layers) * len(permutations[0]) ** 2
            ),
            "this is the number of blocks that a block knows: divide it by the blocks": (
                lambda permutations, layers: reach(permutations, layers) * len(permutations[0])
            ),
            "only the first permutation is used: every layer has a head of each": (
                lambda permutations, layers: reach(permutations[:1], layers)
            ),
        },
    ),
    "caught": Function(
        "caught",
        right=caught,
        arguments=one_head,
        wrong={
            "query and key are exchanged: the query's block goes through the permutation": (
                lambda pairs, permutation, block: caught(pairs.flip(1), permutation, block)
            ),
            "the permutation is not used: this is what a head with the identity reads": (
                lambda pairs, permutation, block: caught(pairs, range(len(permutation)), block)
            ),
            "this is a number of pairs, not their share": (
                lambda pairs, permutation, block: caught(pairs, permutation, block) * len(pairs)
            ),
        },
    ),
    "compare": Function(
        "compare",
        right=compare,
        arguments=configurations,
        wrong={
            "the best is that with the least share: take the largest": least,
            "the sum over heads is not divided by their number, so that more heads are always better": not_divided,
            "the permutations count alike, whatever heads they have: weigh each by its heads": equal_heads,
            "the shares of the permutations are added: weigh each by its heads, and divide by all": any_head,
        },
    ),
}
