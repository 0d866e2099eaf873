"""What is right: a softmax by lists of the allowed keys, and the zoo's full attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from effzoo.course.entries import Layer
from effzoo.course.task import Draw, Function, Task


def by_lists(scores: Tensor, allowed: Tensor) -> Tensor:
    """Each row by itself: the largest allowed score is taken off, and the other keys are left out."""
    rows = []
    for row, keys in zip(scores.flatten(0, -2), allowed.expand_as(scores).flatten(0, -2), strict=True):
        at = keys.nonzero()[:, 0]
        part = (row[at] - row[at].max()).exp() if len(at) else row[at]
        rows.append((row * 0).index_put((at,), part / part.sum()))
    return torch.stack(rows).view_as(scores)


def hidden(scores: Tensor, allowed: Tensor) -> Tensor:
    return scores.masked_fill(~allowed, -math.inf)


def empty_rows_nan(scores: Tensor, allowed: Tensor) -> Tensor:
    return hidden(scores, allowed).softmax(dim=-1)


def empty_rows_uniform(scores: Tensor, allowed: Tensor) -> Tensor:
    return scores.masked_fill(~allowed, -1e9).softmax(dim=-1)


def overflow(scores: Tensor, allowed: Tensor) -> Tensor:
    return _fraction(scores.exp() * allowed, allowed)


def overflow_of_hidden(scores: Tensor, allowed: Tensor) -> Tensor:
    return _fraction(hidden(scores, allowed).exp(), allowed)


def _fraction(e: Tensor, allowed: Tensor) -> Tensor:
    has_key = allowed.any(dim=-1, keepdim=True)
    return e / torch.where(has_key, e.sum(dim=-1, keepdim=True), 1.0)


def largest_of_all(scores: Tensor, allowed: Tensor) -> Tensor:
    has_key = allowed.any(dim=-1, keepdim=True)
    scores = hidden(scores, allowed | ~has_key)
    e = (scores - scores.amax()).exp()
    return e / e.sum(dim=-1, keepdim=True) * has_key


def nan_gradient(scores: Tensor, allowed: Tensor) -> Tensor:
    has_key = allowed.any(dim=-1, keepdim=True)
    e = (scores - scores.amax(dim=-1, keepdim=True)).exp() * allowed
    return torch.where(has_key, e / e.sum(dim=-1, keepdim=True), 0.0)


def behind(scores: Tensor, allowed: Tensor) -> Tensor:
    return scores.softmax(dim=-1) * allowed


def zero_scores(scores: Tensor, allowed: Tensor) -> Tensor:
    return (scores * allowed).softmax(dim=-1) * allowed.any(dim=-1, keepdim=True)


def over_queries(scores: Tensor, allowed: Tensor) -> Tensor:
    return hidden(scores, allowed).softmax(dim=-2).nan_to_num(0.0)


def sum_over_queries(scores: Tensor, allowed: Tensor) -> Tensor:
    has_key = allowed.any(dim=-1, keepdim=True)
    scores = hidden(scores, allowed | ~has_key)
    e = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    return e / e.sum(dim=-2, keepdim=True) * has_key


def empty_rows_read(scores: Tensor, allowed: Tensor) -> Tensor:
    return hidden(scores, allowed | ~allowed.any(dim=-1, keepdim=True)).softmax(dim=-1)


def inverted(scores: Tensor, allowed: Tensor) -> Tensor:
    return by_lists(scores, ~allowed)


def inverted_nan(scores: Tensor, allowed: Tensor) -> Tensor:
    return hidden(scores, ~allowed | ~allowed.any(dim=-1, keepdim=True)).softmax(dim=-1) * allowed.any(-1, keepdim=True)


def no_quotient(scores: Tensor, allowed: Tensor) -> Tensor:
    return scores.exp() * allowed


def rows(draw: Draw) -> dict[str, Any]:
    """Plain rows, then rows with hidden keys and rows without a key, then scores whose exponential is infinite."""
    batch, n, m = draw.whole(1, 3), draw.whole(2, 6), draw.one_of(1, 5, 7) if draw.number else 5
    scores = 2 * draw.normal(batch, n, m)
    if draw.number < 2:
        return {"scores": scores, "allowed": torch.ones(batch, n, m, dtype=torch.bool)}
    allowed = draw.yes(0.6, batch, 1 if draw.number == 4 else n, m)
    allowed[0, 0] = False
    if draw.number == 5:  # every row has a key here
        scores, allowed = scores + 3000 * draw.normal(batch, n, 1), allowed | ~allowed.any(dim=-1, keepdim=True)
    return {"scores": scores, "allowed": allowed}


TASKS: dict[str, Task] = {
    "softmax": Function(
        "masked_softmax",
        right=by_lists,
        arguments=rows,
        gradients=("scores",),
        wrong={
            "a row without an allowed key is NaN (0 / 0, or -inf - -inf): its weights must be 0": empty_rows_nan,
            "a row without an allowed key has weights that sum to 1, as all its scores are alike: they must be 0": (
                empty_rows_uniform
            ),
            "exp of a large score is infinite: take the largest score of the row off first": overflow,
            "exp of a large score is infinite: take the largest allowed score of the row off first": (
                overflow_of_hidden
            ),
            "what is taken off is the largest score of all rows, so that the exponentials of a row of small ones are "
            "all 0: take the largest of each row": largest_of_all,
            "the weights are right, and the gradient of a row without keys is NaN: 0 / 0 is computed and then not used "
            "(torch.where), and its gradient is 0 times NaN; divide by something that is not 0": nan_gradient,
            "the mask comes behind the softmax, so that the weights do not sum to 1: hide the scores first": behind,
            "hidden scores are 0, whose exponential is 1: they must be -inf": zero_scores,
            "a row without an allowed key has weights that sum to 1, as it reads all keys: they must be 0": (
                empty_rows_read
            ),
            "the softmax is over the queries (dim=-2): it is over the keys, dim=-1": over_queries,
            "the sum is over the queries (dim=-2): it is over the keys, dim=-1": sum_over_queries,
            "the mask is inverted: allowed is True at the keys that may be read": inverted,
            "the mask is inverted, so that a row whose keys are all allowed has none left": inverted_nan,
            "the exponentials are not divided by their sum": no_quotient,
        },
    ),
    "attention": Layer("full"),
    "padding": Layer("full", padding="some"),
    "empty": Layer("full", padding="all", draws=3),
    "causal": Layer("full", causal=True, padding="some"),
    "gradients": Layer("full", padding="all", gradients=True, lengths=(2, 20), draws=2),
}
