"""What methods do during training, for a training loop of one's own; `effzoo.finetune` makes the same calls.

    effzoo.peft.calibrate(model, batches)                      # once, before training
    for stage in effzoo.peft.stages(model):                    # one unnamed stage for most methods
        effzoo.peft.begin(model, stage); optimizer = ...       # a fresh optimizer
        for step in range(steps := round(stage.share * total)):
            effzoo.peft.schedule(model, step / steps)
            effzoo.peft.loss(model, **batch).backward(); optimizer.step(); optimizer.zero_grad()
    effzoo.peft.finish(model)                                  # drop what only training needed

All of them concern the active adapters, and do nothing for methods without the hook in question.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from effzoo.errors import IncompatibleError
from effzoo.peft.attach import active, attached
from effzoo.peft.method import Batches, Method, Modules, Stage
from effzoo.sites import PeftModule, sites

WHOLE = Stage("", 1.0)


def hooked(model: nn.Module, hook: str, *names: str) -> Iterator[tuple[Method, Modules]]:
    """The methods of the named (default: active) adapters that override a hook, each with what it has hung, by path."""
    known = dict(sites(model))
    for name in names or active(model):
        for method, paths in attached(model)[name].methods:
            if getattr(type(method), hook) is not getattr(Method, hook):
                modules = {path: known[path].of(name)[method.name] for path in paths}
                yield method, {path: module for path, module in modules.items() if isinstance(module, PeftModule)}


def calibrate(model: nn.Module, batches: Batches) -> bool:
    """Let methods look at labelled batches before training; whether any wanted to. The model's mode and gradients are left as they were."""
    wanted = list(hooked(model, "calibrate"))
    if not wanted:
        return False
    mode, batches = model.training, list(batches)
    if not batches:
        raise IncompatibleError(f"{wanted[0][0].name} chooses by looking at data, but there is none; give at least one labelled batch")
    try:
        for method, modules in wanted:
            method.calibrate(model.eval(), modules, batches)
    finally:
        model.train(mode)
        for parameter in model.parameters():
            parameter.grad = None
    return True


def stages(model: nn.Module) -> Sequence[Stage]:
    """The stages of the training, their shares adding up to 1; one without a name for methods that have none."""
    found = {tuple(method.stages) for name in active(model) for method, _ in attached(model)[name].methods if method.stages}
    if len(found) > 1:
        given_by = "; ".join(sorted(map(_said, found)))
        raise IncompatibleError(f"the active methods train in different stages ({given_by}); train them apart")
    if not found:
        return (WHOLE,)
    given = found.pop()
    total = sum(stage.share for stage in given)
    return tuple(Stage(stage.name, stage.share / total) for stage in given)


def _said(given: Sequence[Stage]) -> str:
    return ", ".join(stage.name for stage in given)


def begin(model: nn.Module, stage: Stage) -> None:
    """Begin a stage."""
    for method, modules in hooked(model, "begin"):
        if stage.name in [own.name for own in method.stages]:
            method.begin(stage.name, modules)


def schedule(model: nn.Module, progress: float) -> None:
    """Tell methods how much of the stage is done, in [0, 1), before an optimizer step."""
    for method, modules in hooked(model, "schedule"):
        method.schedule(modules, progress)


def penalty(model: nn.Module) -> Tensor | None:
    """The sum of what methods add to the loss of one optimizer step; None when nothing does."""
    found = [value for method, modules in hooked(model, "penalty") if (value := method.penalty(modules)) is not None]
    return None if not found else torch.stack(found).sum()


def finish(model: nn.Module, *names: str) -> None:
    """Drop what only training needed (a reparametrisation, all but the mean of several experts), once; the outputs in evaluation mode stay."""
    for name in names or active(model):
        attachment = attached(model)[name]
        if not attachment.finished:
            for method, modules in hooked(model, "finish", name):
                method.finish(modules)
            attachment.finished = True


def learning_rates(model: nn.Module, given: float | None = None) -> dict[str, float]:
    """The learning rate of each trainable parameter of the active adapters, by name: the given one, or its method's own, times `rates`."""
    found: dict[str, float] = {}
    owners = {(name, method.name): method for name in active(model) for method, _ in attached(model)[name].methods}
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad or ".adapters." not in f".{key}":
            continue
        adapter, method_name, *rest = f".{key}".split(".adapters.", 1)[1].split(".")
        method = owners[adapter, method_name]
        factors = [factor for pattern, factor in method.rates.items() if fnmatchcase(".".join(rest), pattern)]
        found[key] = (method.learning_rate if given is None else given) * math.prod(factors[:1])
    return found


def consistency(model: nn.Module) -> float:
    """The weight of the divergence between two forward passes of one batch; 0 when no active method asks for it."""
    return max((method.consistency for name in active(model) for method, _ in attached(model)[name].methods), default=0.0)


def loss(model: nn.Module, **batch: Any) -> Tensor:
    """The loss of a labelled batch with everything that the active methods add to it."""
    value = supervised(model, batch)
    added = penalty(model)
    return value if added is None else value + added


def supervised(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss of a labelled batch without penalties; with two forward passes and their divergence where a method asks for it."""
    weight = consistency(model)
    first = model(**batch)
    if not weight:
        value: Tensor = first.loss
        return value
    second = model(**batch)
    divergence: Tensor = first.loss.new_zeros(())
    one, other = first.logits.log_softmax(dim=-1), second.logits.log_softmax(dim=-1)
    divergence = ((one.exp() - other.exp()) * (one - other)).sum(dim=-1)  # KL(p|q) + KL(q|p)
    labels = batch["labels"]
    if labels.shape == divergence.shape and not labels.is_floating_point():
        divergence = divergence[labels != -100]
    total: Tensor = (first.loss + second.loss) / 2 + weight * divergence.mean() / 2
    return total
