"""What is right, token by token; and how the experts are used after a training with the loss that was handed in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effzoo.course.task import Call, Draw, Function, Task, difference

EXPERTS, FAVOURED, CLUSTERS, TOKENS, WIDTH = 8, 2, 4, 96, 6
K, WEIGHT, STEPS, DRAWS = 2, 0.1, 200, 2
LEAST = 0.25 / EXPERTS  # the share of the choices that each expert must have: a quarter of an even one
LEARNED = 0.1  # of the mean square of the targets: the largest error at the end


def chosen(row: Tensor, k: int) -> list[int]:
    values = row.tolist()
    return sorted(range(len(values)), key=lambda i: -values[i])[:k]


def top_k(scores: Tensor, k: int) -> Tensor:
    """e^(h_i - max) / sum over the chosen, one token after the other."""
    rows = []
    for row in scores:
        best = chosen(row, k)
        powers = (row[best] - row.max()).exp()
        rows.append(torch.zeros_like(row).index_put((torch.tensor(best),), powers / powers.sum()))
    return torch.stack(rows)


def picked(scores: Tensor, k: int, dim: int = -1, largest: bool = True) -> Tensor:
    """1 at the k largest, 0 elsewhere."""
    index = scores.topk(min(k, scores.shape[dim]), dim=dim, largest=largest).indices
    return torch.zeros_like(scores).scatter(dim, index, 1.0)


def softmax_of(scores: Tensor, kept: Tensor) -> Tensor:
    return scores.masked_fill(kept == 0, -math.inf).softmax(dim=-1)


def mixture(x: Tensor, router: Tensor, experts: Tensor, k: int) -> Tensor:
    """Token by token, the chosen experts alone."""
    scores = x @ router.mT
    weights = top_k(scores, k)
    rows = [
        sum((weights[t, i] * (experts[i] @ x[t]) for i in chosen(scores[t], k)), torch.zeros_like(x[t]))
        for t in range(len(x))
    ]
    return torch.stack(rows)


def summed(
    weigh: Callable[[Tensor, int], Tensor], turned: bool = False, residual: bool = False
) -> Callable[..., Tensor]:
    """A mixture of all experts with a mistake."""

    def layer(x: Tensor, router: Tensor, experts: Tensor, k: int) -> Tensor:
        each = torch.einsum("nij,tj->tni", experts.mT if turned else experts, x)
        return torch.einsum("tn,tni->ti", weigh(x @ router.mT, k), each) + (x if residual else 0.0)

    return layer


def last_expert(x: Tensor, router: Tensor, experts: Tensor, k: int) -> Tensor:
    """Of the chosen experts of a token the last one alone."""
    scores = x @ router.mT
    weights = top_k(scores, k)
    last = [max(chosen(row, k)) for row in scores]
    return torch.stack([weights[t, i] * (experts[i] @ x[t]) for t, i in enumerate(last)])


def balance(scores: Tensor, k: int) -> Tensor:
    """N / (T^2 k) sum over experts of (choices of i) (sum of the probabilities of i)."""
    tokens, n = scores.shape
    counts = [0] * n
    for row in scores:
        for i in chosen(row, k):
            counts[i] += 1
    probabilities = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
    sums = probabilities.sum(dim=0)
    return n * torch.stack([count * sums[i] for i, count in enumerate(counts)]).sum() / (tokens**2 * k)


def shares(scores: Tensor, k: int) -> Tensor:
    return picked(scores, k).mean(dim=0) / k


def product(
    f: Callable[[Tensor, int], Tensor],
    p: Callable[[Tensor, int], Tensor] = lambda h, k: h.softmax(-1).mean(0),
    factor: Callable[[Tensor, int], float] = lambda h, k: h.shape[-1],
) -> Callable[..., Tensor]:
    """factor * sum f p, with a mistake in one of the three."""

    def loss(scores: Tensor, k: int) -> Tensor:
        return factor(scores, k) * (f(scores, k) * p(scores, k)).sum()

    return loss


def detached(scores: Tensor, k: int) -> Tensor:
    return scores.detach().softmax(-1).mean(0)


def variation(scores: Tensor, k: int) -> Tensor:
    f = shares(scores, k)
    return f.var(unbiased=False) / f.mean().square() + 0 * scores.sum()


def scores(draw: Draw) -> dict[str, Any]:
    """One token and one expert too, all experts chosen too."""
    tokens, n = [(2, 2), (1, 3), (4, 1)][draw.number] if draw.number < 3 else (draw.whole(2, 9), draw.whole(3, 7))
    return {"scores": 2 * draw.normal(tokens, n), "k": 1 if n == 1 or draw.number == 0 else draw.whole(1, n)}


def layers(draw: Draw) -> dict[str, Any]:
    tokens, n, d = (1, 2, 2) if draw.number == 0 else (draw.whole(1, 9), draw.whole(2, 6), draw.whole(1, 7))
    k = 2 if draw.number == 0 else draw.whole(1, n)
    return {"x": draw.normal(tokens, d), "router": draw.normal(n, d), "experts": draw.normal(n, d, d), "k": k}


def idle(draw: Draw) -> dict[str, Any]:
    """One expert has the lowest score for every token, and holds NaN."""
    given = layers(draw)
    given["x"][:, 0] = 1.0 + given["x"][:, 0].abs()
    unused = draw.whole(0, len(given["router"]) - 1)
    given["router"][unused] = 0.0
    given["router"][unused, 0] = -100.0
    given["experts"][unused] = math.nan
    return {**given, "k": draw.whole(1, len(given["router"]) - 1)}


class Idle(Function):
    """A mixture with an expert of NaN that no token chooses."""

    def cause(self, calls: Sequence[Call], values: Sequence[Any]) -> str:
        if any(isinstance(value, Tensor) and bool(value.isnan().any()) for value in values):
            return (
                "an expert that no token chose was computed, and 0 * NaN is NaN: give each expert its own tokens alone"
            )
        return super().cause(calls, values)


@dataclass
class Training(Task):
    """A training with the function `loss`: its first value, the use of the experts at the end, and what was learned."""

    def calls(self, seed: int) -> list[Call]:
        return [self._call(Draw(seed, number)) for number in range(DRAWS)]

    def _call(self, draw: Draw) -> Call:
        """Tokens in clusters, each with a linear map of its own as the target; a constant that favours two experts."""
        d = WIDTH + 1
        cluster = draw.wholes(0, CLUSTERS - 1, TOKENS)
        x = 3 * draw.normal(CLUSTERS, WIDTH)[cluster] / WIDTH**0.5 + 0.3 * draw.normal(TOKENS, WIDTH)
        x = F.pad(x, (0, 1), value=1.0)
        target = torch.einsum("tij,tj->ti", draw.normal(CLUSTERS, d, d)[cluster] / d**0.5, x)
        router = 0.1 * draw.normal(EXPERTS, d)
        router[:, -1] = 0.0
        router[:FAVOURED, -1] = 2.0
        given: dict[str, Any] = {
            "x": x,
            "target": target,
            "router": router,
            "experts": 0.1 * draw.normal(EXPERTS, d, d),
            "k": K,
        }
        error = (mixture(x, router, given["experts"], K) - target).square()
        spread = balance(x @ router.mT, K)
        first = {
            "the balancing loss is not added": error.mean(),
            "the balancing loss is subtracted; then the router is rewarded for a collapse":
                error.mean() - WEIGHT * spread,
            "the balancing loss is added without its weight": error.mean() + spread,
            "the squared error is missing": WEIGHT * spread,
            "the squares are summed; their mean is right": error.sum() + WEIGHT * spread,
            "the squares are summed over the width; the mean over all numbers is right":
                error.sum(dim=-1).mean() + WEIGHT * spread,
        }  # fmt: skip
        about = {"module": f"{__package__}.harness", "program": "train"}
        where = f"{TOKENS} tokens, {EXPERTS} experts, k = {K}, weight = {WEIGHT}, {STEPS} steps of Adam"
        return Call(
            "harness", where, {**given, "weight": WEIGHT, "steps": STEPS}, error.mean() + WEIGHT * spread, about, first
        )

    def differs(self, call: Call, value: Any) -> str:
        if not isinstance(value, dict):
            return "its process sent no router"
        first = difference(value.get("the loss of the first step"), call.right, 1e-10, "the loss of the first step")
        said = [first] if first else []
        for name in ("router", "experts"):
            found, start = value.get(name), call.given[name]
            if not isinstance(found, Tensor) or found.shape != start.shape or not bool(found.isfinite().all()):
                return "; ".join(
                    [*said, f"{name} is no tensor {list(start.shape)} of finite numbers after {STEPS} steps"]
                )
        used, error = ended(call, value)
        if float(used.min()) < LEAST:
            said.append(
                f"after {STEPS} steps expert {int(used.argmin())} has {100 * float(used.min()):.1f} % of the choices; "
                f"an even share is {100 / EXPERTS:g} %, and at least {100 * LEAST:.1f} % are asked for"
            )
        if error > LEARNED:
            said.append(
                f"after {STEPS} steps the squared error is {error:.2f} of the square of the targets, "
                f"and at most {LEARNED} is asked for"
            )
        return "; ".join(said)

    def cause(self, calls: Sequence[Call], values: Sequence[Any]) -> str:
        firsts = [value.get("the loss of the first step") for value in values]
        if named := super().cause(calls, firsts):
            return named
        if any(difference(first, call.right, 1e-10) for call, first in zip(calls, firsts, strict=True)):
            return ""
        for name in ("router", "experts"):
            if any(bool((value[name] == call.given[name]).all()) for call, value in zip(calls, values, strict=True)):
                return f"the loss has the right value, but no gradient for `{name}`; search for .detach() and .data"
        return "the loss has the right value, but not its gradient; search for .detach() and .data"


def ended(call: Call, value: dict[str, Any]) -> tuple[Tensor, float]:
    """The share of the choices of each expert, and the squared error beside the targets' square."""
    x, target = call.given["x"], call.given["target"]
    used = shares(x @ value["router"].mT, K)
    error = (mixture(x, value["router"], value["experts"], K) - target).square().mean() / target.square().mean()
    return used, float(error)


BALANCE: dict[str, Callable[..., Tensor]] = {
    "the factor N, the number of experts, is missing": product(shares, factor=lambda h, k: 1.0),
    "f is not divided by k, so it adds up to k": product(lambda h, k: picked(h, k).mean(0)),
    "f counts the first choices alone; all k choices count": product(lambda h, k: picked(h, 1).mean(0)),
    "f is the mean probability too; it is the share of the choices": product(lambda h, k: h.softmax(-1).mean(0)),
    "P is the mean of the weights of the chosen; it is that of softmax over all scores":
        product(shares, lambda h, k: top_k(h, k).mean(0)),
    "f is the mean of the weights of the chosen; it is their count":
        product(lambda h, k: top_k(h, k).mean(0)),
    "P is the sum over the tokens; it is their mean": product(shares, lambda h, k: h.softmax(-1).sum(0)),
    "f is the number of the choices; it is their share": product(lambda h, k: picked(h, k).sum(0)),
    "P has the softmax over the tokens; it is over the experts": product(shares, lambda h, k: h.softmax(0).mean(0)),
    "this is the squared coefficient of variation of f, as in Shazeer et al.; asked for is N sum f P":
        variation,
    "f is in float32; .to(scores) makes it of the type of the scores":
        product(lambda h, k: (shares(h, k).float())),
    }  # fmt: skip
TASKS: dict[str, Task] = {
    "choice": Function(
        "top_k",
        right=top_k,
        arguments=scores,
        gradients=("scores",),
        wrong={
            "the softmax is over all scores before the choice, so the weights of a token do not add up to 1":
                lambda scores, k: scores.softmax(-1) * picked(scores, k),
            "scores that are left out are 0 in the softmax; they must be -inf, as exp(0) is 1":
                lambda scores, k: (scores * picked(scores, k)).softmax(-1),
            "scores that are left out are 0 in the softmax, and their weights are set to 0 after it":
                lambda scores, k: (scores * picked(scores, k)).softmax(-1) * picked(scores, k),
            "the softmax is over the tokens; it is over the experts of one token":
                lambda scores, k: scores.masked_fill(picked(scores, k) == 0, -math.inf).softmax(0).nan_to_num(),
            "each expert chooses k tokens; each token chooses k experts":
                lambda scores, k: softmax_of(scores, picked(scores, k, dim=0)).nan_to_num(),
            "the k smallest scores are kept": lambda scores, k: softmax_of(scores, picked(scores, k, largest=False)),
            "one expert is kept whatever k is": lambda scores, k: softmax_of(scores, picked(scores, 1)),
            "all experts are kept whatever k is": lambda scores, k: scores.softmax(-1),
            "the chosen have equal weights; softmax weighs them": lambda scores, k: picked(scores, k) / k + 0 * scores,
            "each score has a sigmoid of its own; the chosen share a softmax":
                lambda scores, k: scores.sigmoid() * picked(scores, k),
            "the weights have no gradient": lambda scores, k: top_k(scores.detach(), k),
        },
    ),
    "layer": Function(
        "layer",
        right=mixture,
        arguments=layers,
        gradients=("x", "router", "experts"),
        wrong={
            "the experts are transposed: y = W x is x @ W.T for rows x": summed(top_k, turned=True),
            "the chosen experts are added without their weights": summed(lambda h, k: picked(h, k)),
            "the chosen experts are averaged without their weights": summed(lambda h, k: picked(h, k) / k),
            "the best expert alone computes": summed(lambda h, k: picked(h, 1)),
            "an expert overwrites what another gave the same token; what they give is added": last_expert,
            "the experts are detached, so they have no gradient":
                lambda x, router, experts, k: mixture(x, router, experts.detach(), k),
            "x is added to the mixture": summed(top_k, residual=True),
            "the weights are detached, so the router has no gradient": summed(lambda h, k: top_k(h.detach(), k)),
        },
    ),
    "idle": Idle("layer", right=mixture, arguments=idle),
    "balance": Function("balance_loss", right=balance, arguments=scores, wrong=BALANCE),
    "gradient": Function(
        "balance_loss",
        right=balance,
        arguments=scores,
        gradients=("scores",),
        wrong=BALANCE | {"P is detached: L has the right value and no gradient": product(shares, detached)},
    ),
    "collapse": Training(),
}  # fmt: skip
