"""What is right: sums of exponentials, shifted by the largest score and written out; the zoo's prefix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effzoo.course.entries import Method
from effzoo.course.task import Draw, Function, Task
from effzoo.sites import Memory

PREFIX = "prefix[length=3, init=normal]"


def joint(q: Tensor, k: Tensor, v: Tensor, p_k: Tensor, p_v: Tensor) -> Tensor:
    """Query by query: a weight for each row of the prefix and for each key, divided by the sum of all."""
    rows = []
    for query in q:
        scores = [query @ key / math.sqrt(len(query)) for key in [*p_k, *k]]
        largest = max(float(score.detach()) for score in scores)
        weights = [(score - largest).exp() for score in scores]
        rows.append(sum(w * value for w, value in zip(weights, [*p_v, *v], strict=True)) / sum(weights))
    return torch.stack(rows)


def gate(q: Tensor, k: Tensor, p_k: Tensor) -> Tensor:
    """The joint form of values that are 1 at the prefix and 0 at the tokens."""
    return joint(q, k, k.new_zeros(len(k), 1), p_k, k.new_ones(len(p_k), 1))[:, 0]


def gated(q: Tensor, k: Tensor, v: Tensor, p_k: Tensor, p_v: Tensor) -> dict[str, Tensor]:
    own, prefix = joint(q, k, v, p_k[:0], p_v[:0]), joint(q, p_k, p_v, p_k[:0], p_v[:0])
    return {"lambda": gate(q, k, p_k), "own": own, "prefix": prefix, "out": joint(q, k, v, p_k, p_v)}


# --- known mistakes


def softmax_of(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    return (q @ k.mT * (q.shape[1] ** -0.5 if scale is None else scale)).softmax(dim=-1) @ v


def added(q: Tensor, k: Tensor, v: Tensor, p_k: Tensor, p_v: Tensor) -> Tensor:
    return softmax_of(q, k, v) + softmax_of(q, p_k, p_v)


def over_queries(q: Tensor, k: Tensor, v: Tensor, p_k: Tensor, p_v: Tensor) -> Tensor:
    scores = q @ torch.cat([p_k, k]).mT / q.shape[1] ** 0.5
    return scores.softmax(dim=0) @ torch.cat([p_v, v])


def unscaled(q: Tensor, k: Tensor, v: Tensor, p_k: Tensor, p_v: Tensor) -> Tensor:
    return softmax_of(q, torch.cat([p_k, k]), torch.cat([p_v, v]), 1.0)


def crossed(q: Tensor, k: Tensor, v: Tensor, p_k: Tensor, p_v: Tensor) -> Tensor:
    return softmax_of(q, torch.cat([p_k, k]), torch.cat([v, p_v]))


def no_prefix(q: Tensor, k: Tensor, v: Tensor, p_k: Tensor, p_v: Tensor) -> Tensor:
    return softmax_of(q, k, v)


def other_share(q: Tensor, k: Tensor, p_k: Tensor) -> Tensor:
    return 1 - gate(q, k, p_k)


def of_raw(q: Tensor, k: Tensor, p_k: Tensor) -> Tensor:
    return gate(q * q.shape[1] ** 0.5, k, p_k)


def over_tokens(q: Tensor, k: Tensor, p_k: Tensor) -> Tensor:
    prefix, own = ((q @ x.mT / q.shape[1] ** 0.5).logsumexp(dim=-1) for x in (p_k, k))
    return (prefix - own).exp()


def of_logs(q: Tensor, k: Tensor, p_k: Tensor) -> Tensor:
    prefix, own = ((q @ x.mT / q.shape[1] ** 0.5).logsumexp(dim=-1) for x in (p_k, k))
    return prefix / (prefix + own)


def of_means(q: Tensor, k: Tensor, p_k: Tensor) -> Tensor:
    prefix, own = ((q @ x.mT / q.shape[1] ** 0.5).exp().mean(dim=-1) for x in (p_k, k))
    return prefix / (prefix + own)


def of_sums(q: Tensor, k: Tensor, p_k: Tensor) -> Tensor:
    prefix, own = ((q @ x.mT / q.shape[1] ** 0.5).sum(dim=-1) for x in (p_k, k))
    return torch.sigmoid(prefix - own)


def overflowing(q: Tensor, k: Tensor, p_k: Tensor) -> Tensor:
    prefix, own = ((q @ x.mT / q.shape[1] ** 0.5).exp().sum(dim=-1) for x in (p_k, k))
    return prefix / (prefix + own)


def with_out(of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., dict[str, Tensor]]:
    """The pieces as they are, and the sum that a function makes of lambda, own and prefix."""

    def gated_wrong(q: Tensor, k: Tensor, v: Tensor, p_k: Tensor, p_v: Tensor) -> dict[str, Tensor]:
        pieces = gated(q, k, v, p_k, p_v)
        return {**pieces, "out": of(pieces["lambda"][:, None], pieces["own"], pieces["prefix"])}

    return gated_wrong


def tokens_with_prefix(q: Tensor, k: Tensor, v: Tensor, p_k: Tensor, p_v: Tensor) -> dict[str, Tensor]:
    pieces = gated(q, k, v, p_k, p_v)
    share = pieces["lambda"][:, None]
    return {**pieces, "own": pieces["out"], "out": (1 - share) * pieces["out"] + share * pieces["prefix"]}


def a_layer(draw: Draw) -> dict[str, Any]:
    n, m, length = (1 if draw.number == 1 else draw.whole(2, 7) for _ in range(3))
    d, width = draw.one_of(2, 4, 5), draw.whole(1, 4)
    return {"q": draw.normal(n, d), "k": draw.normal(m, d), "v": draw.normal(m, width),
            "p_k": draw.normal(length, d), "p_v": draw.normal(length, width)}  # fmt: skip


def scores(draw: Draw) -> dict[str, Any]:
    given = a_layer(draw)
    large = 40.0 if draw.number == 4 else 1.0  # exp(score) is infinite
    return {"q": large * given["q"], "k": large * given["k"], "p_k": large * given["p_k"]}


TASKS: dict[str, Task] = {
    "joint": Function(
        "joint",
        right=joint,
        arguments=a_layer,
        gradients=("q", "k", "v", "p_k", "p_v"),
        draws=4,
        wrong={
            "prefix and tokens have a softmax each, and are added; there is one softmax over both": added,
            "the scores are not divided by sqrt(d)": unscaled,
            "keys begin with the prefix and values end with it: both stand in one order": crossed,
            "the softmax runs over the queries; it runs over prefix and keys": over_queries,
            "the prefix is not read": no_prefix,
        },
    ),
    "gate": Function(
        "gate",
        right=gate,
        arguments=scores,
        wrong={
            "it is 1 - lambda, the share of the tokens": other_share,
            "the scores are not divided by sqrt(d), as those of the attention are": of_raw,
            "the sum over the prefix is divided by that over the tokens; lambda divides by that over both": over_tokens,
            "it is a share of log-sum-exps; lambda is a share of sums of exponentials": of_logs,
            "means stand where sums belong": of_means,
            "the scores are added without exp": of_sums,
            "exp overflows where scores are large: compute with log-sum-exps": overflowing,
        },
    ),
    "gated": Function(
        "gated",
        right=gated,
        arguments=a_layer,
        wrong={
            "lambda stands at the tokens and 1 - lambda at the prefix": with_out(lambda g, o, p: g * o + (1 - g) * p),
            "lambda times the prefix is added to all of Attn(x C); (1 - lambda) of it is left": with_out(
                lambda g, o, p: o + g * p
            ),
            "(1 - lambda) is missing at Attn(x C), and lambda at the prefix": with_out(lambda g, o, p: o + p),
            "lambda is missing at Attn(prefix)": with_out(lambda g, o, p: (1 - g) * o + p),
            "Attn(x C) reads the tokens alone; here it reads the prefix, too": tokens_with_prefix,
        },
    ),
    "trained": Method(PREFIX, way="trained"),
    "method": Method(
        PREFIX,
        hook="memory",
        wrong={
            "keys and values are exchanged: it is Memory(keys, values)": lambda m: Memory(m.values, m.keys),
            "the values are the keys once more": lambda m: Memory(m.keys, m.keys),
            "the prefix is not read: memory returns none": lambda m: None,
        },
    ),
    "gradients": Method(PREFIX, way="gradients"),
    "saved": Method(PREFIX, way="saved"),
}
