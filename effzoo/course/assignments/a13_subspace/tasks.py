"""What is right: the product of explicit matrices, and curves read by a loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effzoo.checks.apart import Limits
from effzoo.course.assignments.a13_subspace.harness import CLASSES, SIZE, WIDTH, accuracy, trained
from effzoo.course.task import Call, Draw, Function, Task, difference
from effzoo.peft.parameter import fastfood as zoo

LONG = 2**17
SIZES, SHARE, EXAMPLES = [1, 4, 16, 64], 0.9, 120


def matrix(n: int) -> Tensor:
    """H [n, n]: -1 where i and j have an odd number of common bits."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)], dtype=torch.float64)


def product(x: Tensor) -> Tensor:
    return x @ matrix(x.shape[-1])


def by_columns(x: Tensor) -> Tensor:
    """H along the first axis."""
    return torch.tensordot(matrix(x.shape[0]), x, dims=1) if x.shape[0] & (x.shape[0] - 1) == 0 else x


def by_sequency(x: Tensor) -> Tensor:
    """Rows in the order of their changes of sign."""
    h = matrix(x.shape[-1])
    changes = (h[:, 1:] != h[:, :-1]).sum(dim=1)
    return x @ h[changes.argsort()].mT


def one_round(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([x[..., :half] + x[..., half:], x[..., :half] - x[..., half:]], dim=-1) if half else x


def explicit(theta: Tensor, signs: Tensor, order: Tensor, gauss: Tensor, size: int) -> Tensor:
    """H G Pi H B / n written out, all [n, n], times the padded theta."""
    n = len(signs)
    h, permutation = matrix(n), torch.eye(n, dtype=torch.float64)[order]
    p = h @ torch.diag(gauss) @ permutation @ h @ torch.diag(signs) / n
    return p[:size, : len(theta)] @ theta


def padded_before(theta: Tensor, signs: Tensor, order: Tensor, gauss: Tensor, size: int) -> Tensor:
    padded = torch.cat([theta.new_zeros(len(signs) - len(theta)), theta])
    return explicit(padded, signs, order, gauss, size)


def slip(p: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], last: bool = False) -> Callable[..., Tensor]:
    """A product with a mistake: p(H, B, Pi, G) is P."""

    def wrong(theta: Tensor, signs: Tensor, order: Tensor, gauss: Tensor, size: int) -> Tensor:
        n = len(signs)
        full = p(matrix(n), torch.diag(signs), torch.eye(n, dtype=torch.float64)[order], torch.diag(gauss))
        return full[-size:, : len(theta)] @ theta if last else full[:size, : len(theta)] @ theta

    return wrong


def moved(start: Tensor, theta: Tensor, signs: Tensor, order: Tensor, gauss: Tensor) -> Tensor:
    flat = torch.cat([explicit(theta, signs, order, gauss, start.numel()), start.new_zeros(0)])
    return torch.stack([a + b for a, b in zip(start.flatten(), flat, strict=True)]).view(start.shape)


def step(start: Tensor, theta: Tensor, signs: Tensor, order: Tensor, gauss: Tensor) -> Tensor:
    return explicit(theta, signs, order, gauss, start.numel()).view(start.shape)


def in_place(start: Tensor, theta: Tensor, signs: Tensor, order: Tensor, gauss: Tensor) -> Tensor:
    start += step(start, theta, signs, order, gauss)
    return start


def by_column(start: Tensor, theta: Tensor, signs: Tensor, order: Tensor, gauss: Tensor) -> Tensor:
    return start + step(start, theta, signs, order, gauss).reshape(start.mT.shape).mT


def smallest(curve: dict[int, float], baseline: float, share: float) -> int | None:
    for d in sorted(curve):
        if curve[d] >= share * baseline:
            return d
    return None


def read(those: Callable[[dict[int, float], float, float], list[int]], none: int | None = None) -> Callable[..., Any]:
    """The first of some d."""
    return lambda curve, baseline, share: next(iter(those(curve, baseline, share)), none)


def stays(curve: dict[int, float], line: float) -> list[int]:
    """The d from which on no score is below the line."""
    return [d for d in sorted(curve) if all(score >= line for e, score in curve.items() if e >= d)]


def vectors(draw: Draw) -> dict[str, Any]:
    n = 4 if draw.number == 0 else 2 ** draw.whole(0, 6)
    shape = [(), (draw.whole(2, 5),), (2, 3)][draw.number % 3]
    return {"x": draw.normal(*shape, n)}


def long(draw: Draw) -> dict[str, Any]:
    return {"x": draw.normal(LONG)}


def projections(draw: Draw) -> dict[str, Any]:
    n, size, d = (4, 3, 2) if draw.number == 0 else (2 ** draw.whole(3, 6), 0, 0)
    size, d = size or draw.whole(n // 2 + 1, n), d or draw.whole(1, n)
    return {"theta": draw.normal(d), "signs": draw.wholes(0, 1, n).double() * 2 - 1, "order": draw.order(n),
            "gauss": draw.normal(n), "size": size}  # fmt: skip


def starts(draw: Draw) -> dict[str, Any]:
    given = projections(draw)
    size = given.pop("size")
    shape = (1, 3) if draw.number == 0 else (2, size // 2) if draw.number % 2 else (size // 4, 2, 2)
    return {"start": draw.normal(*shape), **given}


def curves(draw: Draw) -> dict[str, Any]:
    """Rising with noise, in any order; in the second call one score lies on the line, in the third none reaches it."""
    sizes = draw.order(40)[: draw.whole(3, 6)] + 1
    noise = 0.1 * draw.normal(len(sizes))
    curve = {int(d): float(d) / 40 + float(e) for d, e in zip(sizes, noise, strict=True)}
    baseline, share = 0.5 + float(draw.uniform()) / 2, draw.one_of(0.9, 0.9, 0.5)
    if draw.number == 0:
        return {"curve": {8: 0.95, 2: 0.5, 4: 0.9, 1: 0.1}, "baseline": 1.0, "share": 0.9}
    if draw.number == 1:
        curve[int(sizes.min())] = share * baseline
    if draw.number == 2:
        curve = {d: min(score, 0.4 * baseline) for d, score in curve.items()}
    return {"curve": curve, "baseline": baseline, "share": share}


@dataclass
class Net(Task):
    """Trainings in subspaces of several d; the accuracies are those of the thetas that come back."""

    def calls(self, seed: int) -> list[Call]:
        draw = Draw(seed)
        x, start = draw.normal(EXAMPLES, WIDTH), draw.normal(SIZE) / 3
        labels = (x @ draw.normal(WIDTH, CLASSES)).argmax(dim=-1)
        n = zoo.power_of_two(SIZE)
        given: dict[str, Any] = {"start": start, "signs": draw.wholes(0, 1, n).double() * 2 - 1, "order": draw.order(n),
                 "gauss": draw.normal(n), "x": x, "labels": labels}  # fmt: skip
        full = trained(lambda network: network, start, x, labels)
        given |= {"sizes": SIZES, "baseline": accuracy(full, x, labels), "share": SHARE}
        about = {"module": f"{__package__}.harness", "program": "measure"}
        where = f"a network of {SIZE} numbers in subspaces of d = {', '.join(map(str, SIZES))}"
        return [Call("harness", where, given, None, about)]

    def differs(self, call: Call, value: Any) -> str:
        thetas = value.get("thetas") if isinstance(value, dict) else None
        if not isinstance(thetas, dict) or list(thetas) != SIZES:
            return "its process sent no thetas"
        if any(not isinstance(x, Tensor) or x.shape != (d,) or not bool(x.isfinite().all()) for d, x in thetas.items()):
            return "theta is not finite after the training"
        curve, line = self.curve(call, thetas), SHARE * call.given["baseline"]
        shown = ", ".join(f"{d}: {score:.2f}" for d, score in curve.items())
        if curve[SIZES[-1]] < line:
            return f"with d = {SIZES[-1]} the accuracy is below {line:.2f}, 90 % of the baseline: {{{shown}}}"
        said = difference(value.get("d90"), smallest(curve, call.given["baseline"], SHARE), 0, "d90")
        return said and f"{said}, as the accuracies are {{{shown}}} and the line is {line:.2f}"

    def cause(self, calls: Sequence[Call], values: Sequence[Any]) -> str:
        thetas = values[0].get("thetas") if isinstance(values[0], dict) else None
        still = isinstance(thetas, dict) and any(isinstance(x, Tensor) and not bool(x.any()) for x in thetas.values())
        return "theta stays 0: it has no gradient; search for .detach() and .data" if still else ""

    def curve(self, call: Call, thetas: dict[int, Tensor]) -> dict[int, float]:
        given = {name: call.given[name] for name in ("signs", "order", "gauss")}
        start, x, labels = (call.given[name] for name in ("start", "x", "labels"))
        return {d: accuracy(start + explicit(theta, **given, size=SIZE), x, labels) for d, theta in thetas.items()}


TASKS: dict[str, Task] = {
    "hadamard": Function("hadamard", right=product, arguments=vectors, wrong={
        "it is divided by sqrt(n); no scale is asked for": lambda x: product(x) / x.shape[-1] ** 0.5,
        "it is divided by n; no scale is asked for": lambda x: product(x) / x.shape[-1],
        "H is applied along the first axis in place of the last": by_columns,
        "the rows are in the order of their changes of sign; asked for is Sylvester's order": by_sequency,
        "one round of sums and differences alone; the halves need theirs too": one_round,
        "the differences are b - a; the second half is a - b": lambda x: product(x) * matrix(x.shape[-1])[-1],
        "nothing is mixed: the result is x": lambda x: x.clone(),
    }),
    "long": Function(
        "hadamard", right=zoo.hadamard, arguments=long, draws=1, tolerance=1e-8, limits=Limits(20.0, 5.0)
    ),
    "fastfood": Function("fastfood", right=explicit, arguments=projections, gradients=("theta",), wrong={
        "the permutation goes the wrong way: entry i of Pi v is v[order[i]]":
            slip(lambda h, b, p, g: h @ g @ p.mT @ h @ b / len(h)),
        "the factor 1 / n is missing": slip(lambda h, b, p, g: h @ g @ p @ h @ b),
        "it is divided by sqrt(n) in place of n": slip(lambda h, b, p, g: h @ g @ p @ h @ b / len(h) ** 0.5),
        "it is divided by the number of entries that are kept in place of n":
            lambda theta, signs, order, gauss, size: explicit(theta, signs, order, gauss, size) * len(signs) / size,
        "the signs and the normal numbers have changed places": slip(lambda h, b, p, g: h @ b @ p @ h @ g / len(h)),
        "the signs come after the first H; B acts on theta itself": slip(lambda h, b, p, g: h @ g @ p @ b @ h / len(h)),
        "G comes before the permutation": slip(lambda h, b, p, g: h @ p @ g @ h @ b / len(h)),
        "the signs are missing": slip(lambda h, b, p, g: h @ g @ p @ h / len(h)),
        "the permutation is missing": slip(lambda h, b, p, g: h @ g @ h @ b / len(h)),
        "G is missing": slip(lambda h, b, p, g: h @ p @ h @ b / len(h)),
        "the last H is missing": slip(lambda h, b, p, g: g @ p @ h @ b / len(h)),
        "the first H is missing": slip(lambda h, b, p, g: h @ g @ p @ b / len(h)),
        "the factors are in the reverse order": slip(lambda h, b, p, g: b @ h @ p @ g @ h / len(h)),
        "the last entries are kept in place of the first":
            slip(lambda h, b, p, g: h @ g @ p @ h @ b / len(h), last=True),
        "the zeros stand before theta; they fill up behind it": padded_before,
        "theta has no gradient": lambda theta, **given: explicit(theta.detach(), **given),
    }),
    "subspace": Function(
        "subspace", right=moved, arguments=starts, gradients=("theta",), unchanged=("start",), wrong={
            "the start is not added": step,
            "the step is subtracted": lambda start, **given: start - step(start, **given),
            "`start` itself is changed; the next theta would move from there": in_place,
            "the step is filled in column by column": by_column,
            "theta has no gradient": lambda start, theta, **given: start + step(start, theta.detach(), **given),
        },
    ),
    "d90": Function("d90", right=smallest, arguments=curves, draws=12, wrong={
        "a score on the line counts too: at least share * baseline":
            read(lambda curve, baseline, share: [d for d in sorted(curve) if curve[d] > share * baseline]),
        "it is the first d in the order of the dict; sort them, or take the smallest":
            read(lambda curve, baseline, share: [d for d in curve if curve[d] >= share * baseline]),
        "it is the largest d; the smallest is asked for":
            read(lambda curve, baseline, share: [d for d in sorted(curve)[::-1] if curve[d] >= share * baseline]),
        "it is the d from which on all scores reach the line; the smallest d that reaches it is asked for":
            read(lambda curve, baseline, share: stays(curve, share * baseline)),
        "scores are compared with the share itself, not with share * baseline":
            read(lambda curve, baseline, share: [d for d in sorted(curve) if curve[d] >= share]),
        "scores are compared with the best of the curve in place of the baseline":
            read(lambda curve, baseline, share: [d for d in sorted(curve) if curve[d] >= share * max(curve.values())]),
        "scores are compared with the baseline itself":
            read(lambda curve, baseline, share: [d for d in sorted(curve) if curve[d] >= baseline]),
        "where no d reaches the line the answer is None, not 0":
            read(lambda curve, baseline, share: [d for d in sorted(curve) if curve[d] >= share * baseline], none=0),
    }),
    "net": Net(),
}  # fmt: skip
