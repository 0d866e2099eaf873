"""What is right, entry by entry in plain Python, and the gradients from their formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effzoo.course.task import Draw, Function, Task

Pairs = list[tuple[Tensor, Tensor]]


def kept(weight: Tensor, k: int) -> Tensor:
    """Entries in a list, sorted by magnitude and then by place."""
    entries = sorted((-abs(x), place) for place, x in enumerate(weight.flatten().tolist()))
    stay = {place for _, place in entries[:k]}
    return torch.tensor([place in stay for place in range(weight.numel())]).view(weight.shape)


def largest_first(values: Tensor, k: int) -> Tensor:
    return torch.zeros(values.numel()).scatter(0, values.flatten().topk(k).indices, 1).bool().view(values.shape)


def smallest(weight: Tensor, k: int) -> Tensor:
    return largest_first(-weight.abs(), k)


def pruned(weight: Tensor, k: int) -> Tensor:
    return ~smallest(weight, k)


def of_rows(weight: Tensor, k: int) -> Tensor:
    each = weight.abs().topk(min(k, weight.shape[1]), dim=1).indices
    return torch.zeros_like(weight).scatter(1, each, 1).bool()


def at_least(weight: Tensor, k: int) -> Tensor:
    least = weight.abs().flatten().sort(descending=True).values[k - 1] if k else torch.inf
    return weight.abs() >= least


def above(weight: Tensor, k: int) -> Tensor:
    values = weight.abs().flatten().sort(descending=True).values
    return weight.abs() > values[k] if k < len(values) else torch.ones_like(weight, dtype=torch.bool)


def last_ones(weight: Tensor, k: int) -> Tensor:
    return kept(weight.flatten().flip(0), k).flip(0).view(weight.shape)


class ByFormula(torch.autograd.Function):
    """x (W * M)^T, with dL/dx = dL/dy W' and dL/dS = (dL/dy^T x) * W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scores: Tensor, threshold: float) -> Tensor:
        mask = torch.tensor([[s >= threshold for s in row] for row in scores.tolist()])
        masked = torch.where(mask, weight, torch.zeros_like(weight))
        ctx.save_for_backward(x, weight, masked)
        return torch.einsum("ni,oi->no", x, masked)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, masked = ctx.saved_tensors
        return grads[0] @ masked, None, torch.einsum("no,ni->oi", grads[0], x) * weight, None


def masked_linear(x: Tensor, weight: Tensor, scores: Tensor, threshold: float) -> Tensor:
    out: Tensor = ByFormula.apply(x, weight, scores, threshold)  # type: ignore[no-untyped-call]
    return out


def slip(masked: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[..., Tensor]:
    """A layer whose masked weight has a mistake."""

    def layer(x: Tensor, weight: Tensor, scores: Tensor, threshold: float) -> Tensor:
        return x @ masked(weight, scores, threshold).mT

    return layer


def with_gradient(hard: Tensor, soft: Tensor) -> Tensor:
    return hard + soft - soft.detach()


def difference(before: Tensor, after: Tensor, k: int) -> tuple[Tensor, Tensor]:
    change = [b - a for a, b in zip(before.flatten().tolist(), after.flatten().tolist(), strict=True)]
    index = sorted(sorted(range(len(change)), key=lambda i: -abs(change[i]))[:k])
    return torch.tensor(index, dtype=torch.int64), before.new_tensor([change[i] for i in index])


def picked(by: Callable[[Tensor, Tensor], Tensor], what: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """A difference whose entries are chosen by one tensor and read from another."""

    def pairs(before: Tensor, after: Tensor, k: int) -> tuple[Tensor, Tensor]:
        index = kept(by(before, after), k).flatten().nonzero().flatten()
        return index, what(before, after).flatten()[index]

    return pairs


def descending(before: Tensor, after: Tensor, k: int) -> tuple[Tensor, Tensor]:
    change = (after - before).flatten()
    index = change.abs().topk(k).indices
    return index, change[index]


def total(before: Tensor, differences: Pairs) -> Tensor:
    flat = before.flatten().tolist()
    for index, value in differences:
        for place, change in zip(index.tolist(), value.tolist(), strict=True):
            flat[place] += change
    return before.new_tensor(flat).view(before.shape)


def last_counts(before: Tensor, differences: Pairs) -> Tensor:
    out = before.flatten().clone()
    for index, value in differences:
        out[index] = before.flatten()[index] + value
    return out.view_as(before)


def replaced(before: Tensor, differences: Pairs) -> Tensor:
    out = before.flatten().clone()
    for index, value in differences:
        out[index] = value
    return out.view_as(before)


def mean(before: Tensor, differences: Pairs) -> Tensor:
    return before + (total(before, differences) - before) / max(1, len(differences))


def in_place(before: Tensor, differences: Pairs) -> Tensor:
    return before.copy_(total(before, differences))


def some(draw: Draw, largest: int) -> int:
    """k: 1, none, all, and then any."""
    return {0: 1, 1: 0, 2: largest}.get(draw.number, draw.whole(0, largest))


def weights(draw: Draw) -> dict[str, Any]:
    out, width = (1, 3) if draw.number == 0 else (draw.whole(1, 6), draw.whole(1, 7))
    return {"weight": draw.normal(out, width), "k": some(draw, out * width)}


def equal_weights(draw: Draw) -> dict[str, Any]:
    """Small whole numbers, so that many magnitudes are equal."""
    if draw.number == 0:
        return {"weight": torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64), "k": 2}
    out, width = draw.whole(2, 8), draw.whole(2, 9)
    return {"weight": draw.wholes(-3, 3, out, width).double(), "k": draw.whole(1, out * width - 1)}


def layers(draw: Draw) -> dict[str, Any]:
    """Scores on a grid, so that some equal the threshold."""
    n, out, width = (1, 1, 3) if draw.number == 0 else (draw.whole(1, 5), draw.whole(1, 6), draw.whole(1, 7))
    scores = draw.wholes(-4, 4, out, width).double() / 4
    threshold = float(scores.flatten()[0]) if draw.number < 3 else draw.one_of(-0.5, 0.0, 0.25)
    return {"x": draw.normal(n, width), "weight": draw.normal(out, width), "scores": scores, "threshold": threshold}


def two_weights(draw: Draw) -> dict[str, Any]:
    out, width = (1, 3) if draw.number == 0 else (draw.whole(1, 6), draw.whole(1, 7))
    before = 2 * draw.normal(out, width)
    return {"before": before, "after": before + draw.normal(out, width), "k": some(draw, out * width)}


def sums(draw: Draw) -> dict[str, Any]:
    """Differences that change some of the same entries; the second call has none, the third a single one."""
    out, width = (1, 3) if draw.number == 0 else (draw.whole(2, 5), draw.whole(2, 6))
    differences = []
    for _ in range({0: 2, 1: 0, 2: 1}.get(draw.number, draw.whole(2, 4))):
        index = draw.order(out * width)[: max(2, out * width // 2)].sort().values
        differences.append((index, draw.normal(len(index))))
    return {"before": draw.normal(out, width), "differences": differences}


HARD: dict[str, Callable[..., Tensor]] = {
    "entries whose score equals the threshold are left out; the mask is 1[S >= threshold]":
        slip(lambda w, s, t: w * (s > t)),
    "the mask is inverted: entries with a score of at least the threshold stay": slip(lambda w, s, t: w * (s < t)),
    "the scores themselves multiply W; a mask is 0 or 1": slip(lambda w, s, t: w * s * (s >= t)),
    "the mask is made of W in place of the scores": slip(lambda w, s, t: w * (w >= t)),
    "the mask is made of the magnitudes of W in place of the scores": slip(lambda w, s, t: w * (w.abs() >= t)),
    "the mask is made of |S|; a low score leaves an entry out, however large it is":
        slip(lambda w, s, t: w * (s.abs() >= t)),
    "1 is added to the mask: entries are left out by 0": slip(lambda w, s, t: w * (1.0 + (s >= t).double())),
}  # fmt: skip
SOFT: dict[str, Callable[..., Tensor]] = {
    "the scores have no gradient: a comparison cuts it, and nothing leads it around the mask":
        slip(lambda w, s, t: w * (s >= t)),
    "the gradient of the scores lacks the factor W: dL/dS = dL/dW' * W":
        slip(lambda w, s, t: with_gradient(w * (s >= t), s)),
    "only the entries that are kept have a gradient; straight through, those that are left out have one too":
        slip(lambda w, s, t: w * with_gradient((s >= t).double(), s * (s >= t))),
    "the gradient is that of a sigmoid; straight through, the derivative of the mask counts as 1":
        slip(lambda w, s, t: w * with_gradient((s >= t).double(), s.sigmoid())),
    "the gradient is that of sigmoid(S - threshold); straight through, the derivative of the mask counts as 1":
        slip(lambda w, s, t: w * with_gradient((s >= t).double(), (s - t).sigmoid())),
    "the gradient of the scores has the wrong sign": slip(lambda w, s, t: w * with_gradient((s >= t).double(), -s)),
    "the gradient of the scores has the factor W twice: dL/dS = dL/dW' * W":
        slip(lambda w, s, t: w * with_gradient((s >= t).double(), s * w)),
    "the gradient of the scores has the factor |W| in place of W":
        slip(lambda w, s, t: with_gradient(w * (s >= t), s * w.abs())),
}  # fmt: skip
TASKS: dict[str, Task] = {
    "magnitude": Function(
        "magnitude_mask",
        right=kept,
        arguments=weights,
        wrong={
            "the largest values are kept in place of the largest magnitudes: -3 is larger than 2 in magnitude":
                lambda weight, k: largest_first(weight, k),
            "the smallest magnitudes are kept in place of the largest": smallest,
            "k entries are left out; k is how many are kept": pruned,
            "k entries of each row are kept; k counts those of the whole matrix": of_rows,
            "one entry more than k is kept": lambda weight, k: kept(weight, k + 1),
            "one entry less than k is kept": lambda weight, k: kept(weight, max(0, k - 1)),
        },
    ),
    "ties": Function(
        "magnitude_mask",
        right=kept,
        arguments=equal_weights,
        wrong={
            "every entry that equals the k-th largest is kept, so more than k: count the equal ones": at_least,
            "no entry that equals the one after the k-th is kept, so fewer than k: count the equal ones": above,
            "of equal magnitudes the last are kept in place of the first": last_ones,
            "of equal magnitudes torch.topk takes any; argsort(descending=True, stable=True) keeps their order":
                lambda weight, k: largest_first(weight.abs(), k),
        },
    ),
    "supermask": Function("masked_linear", right=masked_linear, arguments=layers, wrong=HARD),
    "straight_through": Function(
        "masked_linear", right=masked_linear, arguments=layers, gradients=("x", "scores"), wrong={**HARD, **SOFT}
    ),
    "difference": Function(
        "sparse_difference",
        right=difference,
        arguments=two_weights,
        wrong={
            "the entries are those with the largest |after|; chosen are those that moved most, |after - before|":
                picked(lambda a, b: b, lambda a, b: b - a),
            "the entries are those with the largest |before|; chosen are those that moved most, |after - before|":
                picked(lambda a, b: a, lambda a, b: b - a),
            "the values are those of `after`; a difference holds after - before":
                picked(lambda a, b: b - a, lambda a, b: b),
            "the values are before - after, the wrong way round": picked(lambda a, b: b - a, lambda a, b: a - b),
            "the values have lost their sign": picked(lambda a, b: b - a, lambda a, b: (b - a).abs()),
            "the entries are in the order of their magnitudes; index is ascending": descending,
        },
    ),
    "sums": Function(
        "add",
        right=total,
        arguments=sums,
        unchanged=("before",),
        wrong={
            "where two differences change one entry, the last alone counts; both are added": last_counts,
            "entries are replaced by the difference; it is added to what stands there": replaced,
            "the differences are averaged; they are added": mean,
            "`before` itself is changed, and the next sum would start from it: work on a copy": in_place,
        },
    ),
}  # fmt: skip
