"""What is right: sums over pairs for the functions, the zoo's perceiver with latents that are drawn for the kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effzoo.checks.apart import Limits
from effzoo.course.entries import Layer
from effzoo.course.task import Draw, Function, Task

PERCEIVER = "perceiver[latents=4]"
Triple = list[Tensor]


# --- one reading


def read(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, scale: float | None = None) -> Tensor:
    """Query by query, over a list of the keys that are there."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    there = [j for j, yes in enumerate(valid.tolist()) if yes]
    rows = []
    for query in q:
        weights = [(query @ k[j] * scale).exp() for j in there]
        total = sum(weights, torch.zeros_like(q[0, 0]))
        rows.append(sum((w / total * v[j] for w, j in zip(weights, there, strict=True)), torch.zeros_like(v[0])))
    return torch.stack(rows)


def everywhere(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return read(q, k, v, torch.ones_like(valid))


def padding_zeroed(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return read(q, k * valid[:, None], v * valid[:, None], torch.ones_like(valid))


def score_zero(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return read(q, k * valid[:, None], v, torch.ones_like(valid))


def inverted(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return read(q, k, v, ~valid)


def over_queries(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~valid, -math.inf)
    return scores.softmax(dim=0).nan_to_num(0.0) @ v


def no_scale(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return read(q, k, v, valid, scale=1.0)


def by_values(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return read(q, k, v, valid, scale=v.shape[-1] ** -0.5)


def mean_of_all(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return read(q, k, v, valid if valid.any() else torch.ones_like(valid))


def one_reading(draw: Draw) -> dict[str, Any]:
    m, n, d = draw.whole(2, 4), 1 if draw.number == 1 else draw.whole(4, 9), draw.one_of(3, 4, 6)
    valid = draw.yes(0.0 if draw.number == 2 else 0.7, n)
    valid[0] = draw.number != 2
    return {"q": draw.normal(m, d), "k": draw.normal(n, d), "v": draw.normal(n, d + 1), "valid": valid}


# --- the encoder


def encode(
    z: Tensor, x: Tensor, valid: Tensor, cross: Triple, blocks: list[Triple], lost: tuple[int, ...] = ()
) -> Tensor:
    """z <- z + read(z, input), then z <- z + read(z, z) for every block."""
    everyone = torch.ones(len(z), dtype=torch.bool)
    for number, (w_q, w_k, w_v) in enumerate([cross, *blocks]):
        source, there = (x, valid) if number == 0 else (z, everyone)
        z = read(z @ w_q, source @ w_k, source @ w_v, there) + (0.0 if number in lost else z)
    return z


def without(*lost: int) -> Callable[..., Tensor]:
    def encode_without(z: Tensor, x: Tensor, valid: Tensor, cross: Triple, blocks: list[Triple]) -> Tensor:
        return encode(z, x, valid, cross, blocks, lost)

    return encode_without


def cross_alone(z: Tensor, x: Tensor, valid: Tensor, cross: Triple, blocks: list[Triple]) -> Tensor:
    return encode(z, x, valid, cross, [])


def first_block(z: Tensor, x: Tensor, valid: Tensor, cross: Triple, blocks: list[Triple]) -> Tensor:
    return encode(z, x, valid, cross, [blocks[0]] * len(blocks))


def starts_stay(z: Tensor, x: Tensor, valid: Tensor, cross: Triple, blocks: list[Triple]) -> Tensor:
    first = z
    for number, (w_q, w_k, w_v) in enumerate([cross, *blocks]):
        source, there = (x, valid) if number == 0 else (z, torch.ones(len(z), dtype=torch.bool))
        z = first + read(z @ w_q, source @ w_k, source @ w_v, there)
    return z


def keys_swapped(z: Tensor, x: Tensor, valid: Tensor, cross: Triple, blocks: list[Triple]) -> Tensor:
    return encode(z, x, valid, [cross[0], cross[2], cross[1]], [[q, v, k] for q, k, v in blocks])


def padding_read(z: Tensor, x: Tensor, valid: Tensor, cross: Triple, blocks: list[Triple]) -> Tensor:
    return encode(z, x, torch.ones_like(valid), cross, blocks)


def an_encoder(draw: Draw) -> dict[str, Any]:
    m, n, c, d = draw.whole(2, 3), draw.whole(3, 8), draw.one_of(2, 5), draw.one_of(3, 4)
    valid = draw.yes(0.7, n)
    valid[0], valid[1] = True, False
    return {
        "z": draw.normal(m, d), "x": draw.normal(n, c), "valid": valid,
        "cross": [draw.normal(d, d), draw.normal(c, d), draw.normal(c, d)],
        "blocks": [[draw.normal(d, d) for _ in range(3)] for _ in range(2)],
    }  # fmt: skip


# --- the kind, with the table of latents as it is drawn


def slip(
    q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor, state: dict[str, Tensor], first: float = 0.5,
    second: float = 0.5, weighed: bool = True, columns: bool = True,
) -> Tensor:  # fmt: skip
    """Both readings with a mistake: scores by d^-first and d^-second, no second softmax, columns in another order."""
    d, heads = q.shape[-1], q.shape[1]
    (table,) = state.values()
    z = table.view(-1, heads, d).transpose(0, 1) if columns else table.view(-1, d, heads).permute(2, 0, 1)
    scores = (z @ k.mT / d**first).masked_fill(~valid[:, None, None], -math.inf)
    weights = scores.softmax(dim=-1).nan_to_num(0.0)
    again = q @ (weights @ k).mT / d**second
    return (again.softmax(dim=-1) if weighed else again) @ (weights @ v)


def with_slip(**how: Any) -> Callable[..., Tensor]:
    def dense(q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor, state: dict[str, Tensor]) -> Tensor:
        return slip(q, k, v, valid=valid, state=state, **how)

    return dense


def padding_in_summary(q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor, state: dict[str, Tensor]) -> Tensor:
    return slip(q, k, v, valid=torch.ones_like(valid), state=state)


def latents_are_keys(q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor, state: dict[str, Tensor]) -> Tensor:
    (table,) = state.values()
    z = table.view(-1, q.shape[1], q.shape[-1]).transpose(0, 1)
    weights = (z @ k.mT / q.shape[-1] ** 0.5).masked_fill(~valid[:, None, None], -math.inf).softmax(dim=-1)
    return (q @ z.mT / q.shape[-1] ** 0.5).softmax(dim=-1) @ (weights.nan_to_num(0.0) @ v)


SLIPS: dict[str, Callable[..., Tensor]] = {
    "the scores of the latents are not divided by sqrt(d)": with_slip(first=0.0),
    "the scores of the queries, the second ones, are not divided by sqrt(d)": with_slip(second=0.0),
    "neither the first nor the second scores are divided by sqrt(d)": with_slip(first=0.0, second=0.0),
    "the second softmax is missing": with_slip(weighed=False),
    "the columns of the table belong to other heads: the first d columns are those of head 0": with_slip(columns=False),
    "the latents stand where the summary of the keys belongs: queries read S k, not z": latents_are_keys,
    "padding is read by the latents": padding_in_summary,
}
TASKS: dict[str, Task] = {
    "read": Function(
        "read",
        right=read,
        arguments=one_reading,
        wrong={
            "padding is read: `valid` is not looked at": everywhere,
            "padding has a score of 0 and takes exp(0) of the softmax; it has the score -inf": padding_zeroed,
            "padding has a score of 0, and its values are read; it has the score -inf": score_zero,
            "`valid` is True at what is read; it is used the other way round": inverted,
            "the softmax runs over the queries; it runs over the keys": over_queries,
            "the scores are not divided by sqrt(d)": no_scale,
            "the scores are divided by the root of the width of v; it is that of q": by_values,
            "where nothing is valid everything is read; the result is 0 there": mean_of_all,
        },
    ),
    "kind": Layer(PERCEIVER, lengths=(2, 40), wrong=SLIPS),
    "padding": Layer(PERCEIVER, padding="some", lengths=(1, 12), wrong=SLIPS),
    "gradients": Layer(PERCEIVER, gradients=True, lengths=(3, 20), draws=2),
    "encode": Function(
        "encode",
        right=encode,
        arguments=an_encoder,
        gradients=("z", "x"),
        draws=3,
        wrong={
            "z is not added to what is read: z <- z + read(..), of the input and in every block": without(0, 1, 2),
            "z is not added in the blocks: z <- z + read(z, z)": without(1, 2),
            "z is not added to what is read of the input: z <- z + read(z, x)": without(0),
            "the latents read the input, and then not each other": cross_alone,
            "every block computes with the weights of the first": first_block,
            "every block adds to the z of the beginning; it adds to what the block before gave": starts_stay,
            "W_k and W_v are exchanged": keys_swapped,
            "padding is read: `valid` is not passed on": padding_read,
        },
    ),
    "linear": Layer(PERCEIVER, lengths=(40_000, 40_000), draws=1, dtype="float32", limits=Limits(40.0, 5.0)),
}
