"""Balanced assignment: each token to one expert, the same number to each, so that the sum of their scores is largest.

Experts have prices, and every token goes where its score less the price is largest. At the best prices each expert gets
its share: the dual of this transportation problem, a minimum over as many numbers as there are experts.

Softened, it is nearly solved in a few passes over all tokens. Then tokens above an expert's share are moved to experts
that have room, along the cheapest chains of moves, so that the result is exactly the best (successive shortest paths;
Ahuja, Magnanti & Orlin 1993, Network Flows, section 9.7). Lewis et al. 2021 bid in an auction, which ends near the
best.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from effzoo.errors import InputError

_TEMPERATURES = (1e-1, 1e-2, 1e-3, 1e-4)  # of the softened dual, as shares of the spread of the scores
_STEPS = 20  # at each


@torch.no_grad()
def assign(scores: Tensor) -> Tensor:
    """The expert of each token, integers [tokens], so that the sum of the scores is the largest possible.

    scores: [tokens, experts]. Expert i takes tokens // experts of them, the first experts one more.

    The largest possible up to the rounding of float64. Computed on the CPU. Raises InputError for scores that are not
    finite.
    """
    if scores.ndim != 2 or scores.is_complex():
        raise InputError(
            f"scores are real numbers [tokens, experts], got {scores.dtype} of shape {tuple(scores.shape)}"
        )
    tokens, experts = scores.shape
    exact = scores.double().cpu()
    if not bool(exact.isfinite().all()):
        raise InputError(
            "scores that are not finite cannot be assigned in equal shares; if this is a training run, "
            "it has diverged: lower its rate"
        )
    room = torch.full((experts,), tokens // experts)
    room[: tokens % experts] += 1
    usable = int((room > 0).sum())
    if usable <= 1:
        return torch.zeros(tokens, dtype=torch.long, device=scores.device)
    exact, room = exact[:, :usable], room[:usable]
    return _evened(exact, room, _prices(exact, room)).to(scores.device)


def _prices(scores: Tensor, room: Tensor) -> Tensor:
    """Prices at which tokens that choose softly fill the room, at falling temperatures."""
    price = scores.new_zeros(len(room))
    spread = float(scores.max() - scores.min())
    wanted = room.double().log()
    for share in _TEMPERATURES if spread else ():
        temperature = share * spread
        for _ in range(_STEPS):
            chosen = ((scores - price) / temperature).log_softmax(dim=-1)
            price += temperature * (chosen.logsumexp(dim=0) - wanted)
    return price


def _evened(scores: Tensor, room: Tensor, price: Tensor) -> Tensor:
    """Each token where it is worth most at these prices, then moved until every expert has what it has room for."""
    owner = (scores - price).argmax(dim=-1)
    over = (torch.bincount(owner, minlength=len(room)) - room).tolist()
    loss = torch.stack([_losses(scores, owner, expert) for expert in range(len(room))]).tolist()
    prices = price.tolist()
    while any(number > 0 for number in over):
        start = max(range(len(over)), key=over.__getitem__)
        path = _cheapest(loss, prices, start, over)
        moves = []
        for source, target in pairwise(path):
            there = (owner == source).nonzero()[:, 0]
            lost = scores[there, source] - scores[there, target]
            moves.append((there[lost == lost.min()], target))  # equal tokens go together
        number = min(over[start], -over[path[-1]], *(len(able) for able, _ in moves))
        for able, target in moves:
            owner[able[:number]] = target
        over[start] -= number
        over[path[-1]] += number
        for expert in path:
            loss[expert] = _losses(scores, owner, expert).tolist()
    return owner


def _losses(scores: Tensor, owner: Tensor, expert: int) -> Tensor:
    """The smallest loss in moving a token of this expert to each other one; infinite where it has no token."""
    own = scores[owner == expert]
    return (
        (own[:, expert : expert + 1] - own).amin(dim=0) if len(own) else scores.new_full((scores.shape[1],), math.inf)
    )


def _cheapest(loss: list[list[float]], price: list[float], start: int, over: list[int]) -> list[int]:
    """The experts along the cheapest chain of moves from `start` to one with room (Dijkstra).

    loss: [i][j], at least price[i] - price[j], also afterwards.
    price: of each expert; they become those at which the moves of the chain cost nothing.
    over: tokens of each expert above its share; below 0 it has room.
    """
    far, before, done = [math.inf] * len(price), [-1] * len(price), [False] * len(price)
    far[start] = 0.0
    while True:
        at = min((i for i in range(len(price)) if not done[i]), key=far.__getitem__)
        done[at] = True
        if over[at] < 0:
            break
        for j, lost in enumerate(loss[at]):
            reached = far[at] + max(0.0, lost - price[at] + price[j])  # rounding alone makes it negative
            if not done[j] and reached < far[j]:
                far[j], before[j] = reached, at
    for i, distance in enumerate(far):
        price[i] -= min(distance, far[at])
    path = [at]
    while path[-1] != start:
        path.append(before[path[-1]])
    return path[::-1]
