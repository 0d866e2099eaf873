"""A task: calls of what was handed in, on drawn values, and what must come out of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from effzoo.checks.apart import Limits
from effzoo.checks.runner import Failed, close
from effzoo.errors import shown

NOT_DRAWN = 1_000_003  # between the seeds of two draws
OF_A_GRADING = 2**24  # the seed of a task is that of its grading times this, and a number of its name
NOT_A_NUMBER = (
    "it holds NaN, which comes from 0 / 0, from inf / inf (exp(710) is infinite), or from a softmax whose scores are "
    "all -inf: nothing is left to weigh there, and the weights are 0"
)


class Draw:
    """Numbers from one seed: the same on every machine.

    number: which draw of its task this is, from 0; later ones may be larger.
    """

    def __init__(self, seed: int, number: int = 0):
        self.number, self.source = number, torch.Generator().manual_seed(seed + NOT_DRAWN * number)

    def whole(self, least: int, most: int) -> int:
        """A whole number, both ends included."""
        return int(torch.randint(least, most + 1, (), generator=self.source))

    def one_of(self, *values: Any) -> Any:
        return values[self.whole(0, len(values) - 1)]

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers in float64."""
        return torch.randn(shape, dtype=torch.float64, generator=self.source)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers from 0 to 1 in float64."""
        return torch.rand(shape, dtype=torch.float64, generator=self.source)

    def wholes(self, least: int, most: int, *shape: int) -> Tensor:
        """Whole numbers, both ends included."""
        return torch.randint(least, most + 1, shape, generator=self.source)

    def yes(self, share: float, *shape: int) -> Tensor:
        """bool, True with this probability."""
        return torch.rand(shape, generator=self.source) < share

    def order(self, n: int) -> Tensor:
        """A permutation of 0 to n - 1."""
        return torch.randperm(n, generator=self.source)


@dataclass
class Call:
    """One call.

    of: what is called: "function", "layer" (an attention kind), "method" (of fine-tuning) or "harness".
    where: the call in words, for the student: "causal, n = 17".
    about: what else the process needs to know, as JSON holds it.
    given: the arguments by name: tensors, numbers, texts, and lists and dicts of them.
    right: what must come out.
    wrong: what comes out of a known mistake, by the sentence that names it; often `Slips`.
    """

    of: str
    where: str
    given: dict[str, Any]
    right: Any
    about: dict[str, Any] = field(default_factory=dict)
    wrong: Mapping[str, Any] = field(default_factory=dict)


class Slips(Mapping[str, Any]):
    """What comes out of known mistakes, computed when it is asked for: a right answer asks for none."""

    def __init__(self, of: Mapping[str, Callable[[], Any]]):
        self.of, self.made = of, dict[str, Any]()

    def __getitem__(self, sentence: str) -> Any:
        if sentence not in self.made:
            self.made[sentence] = self.of[sentence]()
        return self.made[sentence]

    def __iter__(self) -> Iterator[str]:
        return iter(self.of)

    def __len__(self) -> int:
        return len(self.of)


class Task:
    """What is asked: `calls` draws, `differs` judges an answer, `cause` names the mistake.

    limits: of a process of its own for this task; None where it shares one with the others.
    """

    limits: Limits | None = None

    def calls(self, seed: int) -> list[Call]:
        raise NotImplementedError

    def differs(self, call: Call, value: Any) -> str:
        """What is wrong with an answer, in a sentence; "" for a right one."""
        return difference(value, call.right, 1e-10)

    def cause(self, calls: Sequence[Call], values: Sequence[Any]) -> str:
        """The known mistake of which every answer is the outcome, if there is one and an answer shows it."""
        for sentence in calls[0].wrong if calls else ():
            pairs = [(call, value) for call, value in zip(calls, values, strict=True) if sentence in call.wrong]
            shows = any(difference(call.wrong[sentence], call.right, 1e-9) for call, _ in pairs)
            if shows and not any(difference(finite(x), finite(call.wrong[sentence]), 1e-9) for call, x in pairs):
                return sentence
        return ""

    def board(self, calls: Sequence[Call], values: Sequence[Any]) -> dict[str, float]:
        """Figures of right answers for a leaderboard, by name."""
        return {}


@dataclass
class Function(Task):
    """A function, called on drawn arguments and compared with one that is right.

    name: of the function in the file.
    right: computes what must come out.
    arguments: draws the arguments of one call, by name.
    wrong: functions that make a known mistake, by the sentence that names it: "the scores are not divided by sqrt(d)".
    gradients: the arguments for which gradients are compared too; the output is then one tensor of floats.
    unchanged: the arguments, tensors, that a call must leave as they are.
    draws: how many calls.
    tolerance: of numbers.
    law: where several answers are right, says what is wrong with one, (value, arguments) -> "" or a sentence; it then
        takes the place of `right`, whose answer must keep it too.
    """

    name: str
    right: Callable[..., Any]
    arguments: Callable[[Draw], dict[str, Any]]
    wrong: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    gradients: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    draws: int = 6
    tolerance: float = 1e-10
    law: Callable[[Any, dict[str, Any]], str] | None = None
    limits: Limits | None = None

    def calls(self, seed: int) -> list[Call]:
        return [self._call(Draw(seed, number)) for number in range(self.draws)]

    def _call(self, draw: Draw) -> Call:
        given = self.arguments(draw)
        about: dict[str, Any] = {
            "function": self.name, "gradients": list(self.gradients), "unchanged": list(self.unchanged)
        }  # fmt: skip
        weight = None
        if self.gradients:
            with torch.no_grad():
                weight = draw.normal(*self.right(**given).shape)
        asked = self.gradients, weight, self.unchanged
        right = with_gradients(self.right, given, *asked)
        wrong = Slips({said: partial(with_gradients, slip, given, *asked) for said, slip in self.wrong.items()})
        sent = given if weight is None else {**given, "weight of the output": weight}
        return Call("function", f"{self.name}({described(given)})", sent, right, about, wrong)

    def differs(self, call: Call, value: Any) -> str:
        if self.law is not None:
            return self.law(value, {key: x for key, x in call.given.items() if key != "weight of the output"})
        return difference(value, call.right, self.tolerance)

    def cause(self, calls: Sequence[Call], values: Sequence[Any]) -> str:
        return super().cause(calls, values) or (NOT_A_NUMBER if any(map(_holds_nan, values)) else "")


def _holds_nan(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(value.isnan().any())
    if isinstance(value, (dict, list, tuple)):
        return any(map(_holds_nan, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and value != value


def with_gradients(
    function: Callable[..., Any],
    given: dict[str, Any],
    names: Iterable[str],
    weight: Any,
    unchanged: Iterable[str] = (),
) -> Any:
    """What a function gives, and with names the gradients of sum(weight * output) with respect to these arguments.

    unchanged: arguments of which what is left after the call is given too.
    """
    names, unchanged = list(names), list(unchanged)
    own = {key: x.clone() if key in {*names, *unchanged} else x for key, x in given.items()}
    out = function(**{key: x.requires_grad_() if key in names else x for key, x in own.items()})
    if not names and not unchanged:
        return out.detach() if isinstance(out, Tensor) else out
    found = {"the output": out.detach() if isinstance(out, Tensor) else out}
    if names:
        loss = (out * weight).sum() + sum(0.0 * own[name].sum() for name in names)  # also of a constant output
        grads = torch.autograd.grad(loss, [own[name] for name in names])
        found |= {f"the gradient of {name}": grad for name, grad in zip(names, grads, strict=True)}
    return found | {f"the argument {name}, after the call,": own[name].detach() for name in unchanged}


def finite(value: Any) -> Any:
    """A value with numbers in place of its NaN and infinities, so that two that have them at the same places are
    equal."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.nan_to_num(12345.0, 23456.0, -23456.0)
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def described(given: Mapping[str, Any]) -> str:
    """The arguments of a call, short enough to read."""
    return ", ".join(f"{name}={_short(value)}" for name, value in given.items())


def _short(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() > 4:
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Tensor):
        return f"tensor({(value.round(decimals=4) if value.is_floating_point() else value).tolist()})"
    if isinstance(value, float):
        return f"{value:.4g}"
    return shown(value, 40)


def difference(found: Any, right: Any, tolerance: float, what: str = "the result") -> str:
    """What is wrong with a value beside the right one, in a sentence; "" where they are equal."""
    if isinstance(right, Tensor):
        return _tensors(found, right, tolerance, what)
    if isinstance(right, dict):
        if not isinstance(found, dict) or set(found) != set(right):
            kind = f"keys {list(found)}" if isinstance(found, dict) else f"{type(found).__name__} {_short(found)}"
            return f"{what} is {kind}, and must have the keys {list(right)}"
        names = {key: key if str(key).startswith("the ") else f"{what} at {key!r}" for key in right}
        return next((said for key in right if (said := difference(found[key], right[key], tolerance, names[key]))), "")
    if isinstance(right, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(found) != len(right):
            return f"{what} is {_short(found)}, and must be {_short(list(right))}"
        each = (
            difference(a, b, tolerance, f"entry {i} of {what}")
            for i, (a, b) in enumerate(zip(found, right, strict=True))
        )
        return next((said for said in each if said), "")
    number = found.item() if isinstance(found, Tensor) and found.numel() == 1 else found
    if isinstance(right, (int, float)) and not isinstance(right, bool):
        plain = isinstance(number, (int, float)) and not isinstance(number, bool)
        same = plain and abs(number - right) <= tolerance * max(1.0, abs(right))
    else:
        same = type(number) is type(right) and number == right
    return "" if same else f"{what} is {_short(found)}, and {_short(right)} is right"


def _tensors(found: Any, right: Tensor, tolerance: float, what: str) -> str:
    if not isinstance(found, Tensor):
        return f"{what} is {_short(found)} of type {type(found).__name__}, and must be a tensor {list(right.shape)}"
    if found.dtype != right.dtype:
        return f"{what} is of {found.dtype}, and must be of {right.dtype}"
    if not right.dtype.is_floating_point:
        if found.shape != right.shape:
            return f"{what} has shape {list(found.shape)}, and must have {list(right.shape)}"
        wrong = (found != right).nonzero()
        if not len(wrong):
            return ""
        at = tuple(wrong[0].tolist())
        return f"{what} is {found[at].item()} at index {at}, and {right[at].item()} is right"
    if found.shape == right.shape:
        same = right.isinf() & (found == right)  # infinite, and rightly so
        found, right = found.masked_fill(same, 0.0), right.masked_fill(same, 0.0)
    try:
        close(what, found, right, tolerance, "")
    except Failed as failure:
        return str(failure).removesuffix("; ")
    return ""
