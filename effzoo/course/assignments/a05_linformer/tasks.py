"""What is right: the zoo's linformer with E and F that are drawn, and sums over segments of positions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from effzoo.course.entries import Layer
from effzoo.course.task import Call, Draw, Function, Task, difference

LINFORMER = "linformer[k=4]"
HARNESS = "effzoo.course.assignments.a05_linformer.harness"
LEAST = 0.01  # by which the first output must change


def softmax(scores: Tensor) -> Tensor:
    return scores.softmax(dim=-1)


def linformer(q: Tensor, k: Tensor, v: Tensor, E: Tensor, F: Tensor) -> Tensor:
    """The definition for whole sequences, [.., n, d]."""
    keys, values = E[:, : k.shape[-2]] @ k, F[:, : v.shape[-2]] @ v
    return softmax(q @ keys.mT / math.sqrt(q.shape[-1])) @ values


def hidden(x: Tensor, valid: Tensor) -> Tensor:
    """x with 0 at padding."""
    return x * valid[:, None, :, None]


def matrices(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return state["E.weight"], state["F.weight"]


def one_matrix(q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor, state: dict[str, Tensor]) -> Tensor:
    E, _ = matrices(state)
    return linformer(q, hidden(k, valid), hidden(v, valid), E, E)


def exchanged(q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor, state: dict[str, Tensor]) -> Tensor:
    E, F = matrices(state)
    return linformer(q, hidden(k, valid), hidden(v, valid), F, E)


def no_scale(q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor, state: dict[str, Tensor]) -> Tensor:
    return linformer(q * math.sqrt(q.shape[-1]), hidden(k, valid), hidden(v, valid), *matrices(state))


def by_k(q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor, state: dict[str, Tensor]) -> Tensor:
    E, F = matrices(state)
    return linformer(q * math.sqrt(q.shape[-1] / len(E)), hidden(k, valid), hidden(v, valid), E, F)


def last_columns(q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor, state: dict[str, Tensor]) -> Tensor:
    E, F = matrices(state)
    return linformer(q, hidden(k, valid), hidden(v, valid), E[:, -k.shape[2] :], F[:, -k.shape[2] :])


def padding_seen(q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor, state: dict[str, Tensor]) -> Tensor:
    return linformer(q, k, v, *matrices(state))


def values_seen(q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor, state: dict[str, Tensor]) -> Tensor:
    return linformer(q, hidden(k, valid), v, *matrices(state))


WRONG: Any = {
    "E stands for both: the values have a matrix F of their own": one_matrix,
    "E and F are exchanged: E is that of the keys": exchanged,
    "the scores are not divided by sqrt(d)": no_scale,
    "the scores are divided by sqrt(k) in place of sqrt(d)": by_k,
    "the last n columns of E and F are taken: an input of n positions takes the first n": last_columns,
}
PADDED: Any = {
    "padding is mixed into E K and F V: set keys and values to 0 there": padding_seen,
    "padding is mixed into F V: set the values to 0 there too": values_seen,
}


# --- sizes


def sizes(n: int, d: int, k: int) -> dict[str, list[int]]:
    """Shapes of a product, by making it."""
    x, mix = torch.zeros(n, d), torch.zeros(k, n)
    keys = mix @ x
    scores = x @ keys.mT
    return {"keys": list(keys.shape), "scores": list(scores.shape), "output": list((scores @ (mix @ x)).shape)}


# --- why no decoder


def counter_inputs(draw: Draw) -> dict[str, Any]:
    n, d, k = draw.whole(3, 12), draw.one_of(4, 6), draw.whole(2, 4)
    return {"q": draw.normal(n, d), "k": draw.normal(n, d), "v": draw.normal(n, d),
            "E": draw.normal(k, n), "F": draw.normal(k, n)}  # fmt: skip


def counter(q: Tensor, k: Tensor, v: Tensor, E: Tensor, F: Tensor) -> Tensor:
    """One of many: the last value is moved far along a direction that the first output sees."""
    other = v.clone()
    other[-1] += 10.0
    return other


def shows(value: Any, given: dict[str, Tensor]) -> str:
    """Whether values that differ at the last position alone change what the first query gives."""
    v = given["v"]
    if said := difference(value if not isinstance(value, Tensor) else v.new_zeros(value.shape), torch.zeros_like(v), 1):
        return said
    changed = (value != v).any(dim=-1)
    if bool(changed[:-1].any()):
        at = int(changed.nonzero()[0])
        return f"position {at} differs too; change the last position alone, the future of all others"
    if not torch.isfinite(value).all():
        return "it holds NaN or infinite numbers; finite ones show it"
    first = linformer(**given)[0]
    moved = float((linformer(**{**given, "v": value})[0] - first).abs().max())
    if moved < LEAST:
        return f"what the first query gives moves by {moved:.2g}; change the last value more, {LEAST} is enough"
    return ""


class Refusal(Task):
    """A causal layer of the kind is refused with a reason."""

    def calls(self, seed: int) -> list[Call]:
        return [Call("harness", "a causal layer is built", {}, "", {"module": HARNESS, "program": "causal_layer"})]

    def differs(self, call: Call, value: Any) -> str:
        if not isinstance(value, str) or not value:
            return "a causal layer was built; say in `not_causal` why there can be none, and effzoo refuses it"
        return "" if len(value.split()) >= 5 else f"the reason is {value!r}; write a sentence that a user understands"


TASKS: dict[str, Task] = {
    "mixtures": Layer(LINFORMER, lengths=(1, 40), wrong=WRONG),
    "padding": Layer(LINFORMER, padding="some", wrong={**PADDED, **WRONG}),
    "gradients": Layer(LINFORMER, gradients=True, lengths=(5, 30), draws=2),
    "sizes": Function(
        "sizes",
        right=sizes,
        arguments=lambda draw: {"n": draw.whole(10, 4096), "d": draw.whole(2, 64), "k": draw.whole(1, 9)},
        wrong={
            "the scores are [n, n]: that is full attention": lambda n, d, k: {**sizes(n, d, k), "scores": [n, n]},
            "E K is [k, d]: E mixes positions, not dimensions": lambda n, d, k: {**sizes(n, d, k), "keys": [n, k]},
            "the output has a row for each query: [n, d]": lambda n, d, k: {**sizes(n, d, k), "output": [k, d]},
        },
    ),
    "counter_example": Function("counter_example", right=counter, arguments=counter_inputs, law=shows),
    "refusal": Refusal(),
}
