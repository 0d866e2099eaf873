"""A short fine-tuning of one adapter among others: attach a spec, train it, count what it trains and what it gets
right."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from effzoo import peft
from effzoo.lab.fit import Examples, fit
from effzoo.lab.score import score
from effzoo.peft.method import HEAD


def tune(
    model: nn.Module,
    spec: str,
    examples: Examples,
    *,
    name: str,
    steps: int,
    batch: int = 16,
    seed: int = 0,
    rate: float | None = None,
    head_rate: float | None = None,
    weight_decay: float = 0.01,
    bfloat16: bool | None = None,
) -> list[float]:
    """Attach a spec under a name, train it, and return the losses; the adapter stays attached and active.

    rate, head_rate: learning rates of the methods of the spec and of the task head, which is new and learns faster;
        None means their own. The order of the examples follows from the seed, so adapters that are compared see the
        same batches.
    """
    peft.attach(model, spec, name=name)
    for method, _ in peft.attached(model)[name].methods:
        alone = all(fnmatchcase(role, HEAD) for _, role in peft.attached(model)[name].places[method.name])
        given = head_rate if alone else rate
        if given is not None:
            method.learning_rate = given
    return fit(model, examples.stream(batch, seed), steps, weight_decay=weight_decay, bfloat16=bfloat16)


def body_parameters(model: nn.Module) -> int:
    """How many parameters the active adapters train, without task heads."""
    return sum(numbers for _, role, _, numbers in peft.account(model).by_role if not fnmatchcase(role, HEAD))


def fast_accuracy(model: nn.Module, examples: Examples) -> float:
    """`accuracy` with products in bfloat16 where that is faster here and the weights are float32, as `fit` trains."""
    return score(model, examples).accuracy
