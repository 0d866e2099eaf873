"""What methods do during training, for a training loop of one's own; `effzoo.finetune` makes the same calls.

    effzoo.peft.calibrate(model, batches)                            # once, before training
    for stage, steps in effzoo.peft.timetable(model, total):         # one unnamed stage for most methods
        effzoo.peft.begin(model, stage); optimizer = ...             # a fresh optimizer
        for step in range(steps):
            effzoo.peft.schedule(model, step / steps)
            effzoo.peft.loss(model, **batch).backward(); optimizer.step(); optimizer.zero_grad()
    effzoo.peft.finish(model)                                        # drop what only training needed

All of them concern the active adapters, and do nothing for methods without the hook in question. A finished adapter takes part no more:
trained again, it has one unnamed stage, and what its methods chose stays chosen.

A run that resumes attaches the adapter anew, calls `begin` for every stage that had begun, and then fills in the stored tensors; so `begin` must
make the shapes of its stage from an adapter with any content.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Sized
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from effzoo.annotations import Count, Fraction, Positive
from effzoo.errors import IncompatibleError, TrainingError
from effzoo.peft.attach import acting, attached
from effzoo.peft.method import Batches, Method, Modules, Stage
from effzoo.peft.state import Attachment, transition
from effzoo.sites import PeftModule, sites, unwrap

WHOLE = Stage("", 1.0)
HOOKS = ("calibrate", "schedule", "penalty", "begin", "finish")
IGNORED = -100  # a label that does not count, as in torch.nn.functional.cross_entropy


def overrides(method: Method, hook: str) -> bool:
    """Whether a method has this hook."""
    return getattr(type(method), hook) is not getattr(Method, hook) and hook not in method.idle


def hooked(model: nn.Module, hook: str, *names: str) -> Iterator[tuple[Method, Modules]]:
    """The methods of the named (default: active) adapters, as far as unfinished, that override a hook, each with what it has hung, by path."""
    attachments = attached(model)
    wanted = [
        (name, method, paths)
        for name in names or acting(model)
        if not attachments[name].finished
        for method, paths in attachments[name].methods
        if overrides(method, hook)
    ]
    known = dict(sites(model)) if wanted else {}
    for name, method, paths in wanted:
        modules = {path: known[path].of(name)[method.name] for path in paths}
        yield method, {path: module for path, module in modules.items() if isinstance(module, PeftModule)}


def unfinished(model: nn.Module) -> list[Method]:
    """The methods of the active adapters that still take part in training."""
    return [method for name in acting(model) if not attached(model)[name].finished for method, _ in attached(model)[name].methods]


def takes_part(attachment: Attachment) -> bool:
    """Whether one of an adapter's methods does something in training, so that the adapter is another thing when it is finished."""
    return any(method.stages or method.consistency or any(overrides(method, hook) for hook in HOOKS) for method, _ in attachment.methods)


def calibrate(model: nn.Module, batches: Batches) -> bool:
    """Let methods look at labelled batches before training; whether any wanted to. The model's mode and gradients are left as they were."""
    wanted = list(hooked(model, "calibrate"))
    if not wanted:
        return False
    model = unwrap(model)
    mode, batches = model.training, batches if isinstance(batches, Sized) else list(batches)
    if isinstance(batches, Sized) and not len(batches):
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
    found = {tuple(method.stages) for method in unfinished(model) if method.stages}
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


def timetable(model: nn.Module, total: Count) -> list[tuple[Stage, int]]:
    """The stages with their numbers of optimizer steps, which add up to total: boundaries are rounded, and no stage is empty.

    Raises TrainingError when there are fewer steps than stages.
    """
    found = stages(model)
    if total < len(found):
        raise TrainingError(f"the active methods train in {len(found)} stages ({_said(found)}), which need a step each, got {total}; train longer")
    before, share, steps = 0, 0.0, []
    for left, stage in zip(range(len(found) - 1, -1, -1), found, strict=True):
        share += stage.share
        end = min(max(round(share * total), before + 1), total - left)
        steps.append((stage, end - before))
        before = end
    return steps


def settled(model: nn.Module, total: Count) -> int:
    """The first step after which the adapter is what its options say: in the last stage, when schedules have come to their end.

    A checkpoint from before that, of a network that is not yet pruned, say, is no result of the run, however good it is.
    """
    *earlier, (_, steps) = timetable(model, total)
    share = max((method.settled for method, _ in hooked(model, "schedule")), default=0.0)
    return min(total, sum(number for _, number in earlier) + 1 + math.ceil(share * steps))


def begin(model: nn.Module, stage: Stage) -> None:
    """Begin a stage."""
    for method, modules in hooked(model, "begin"):
        if stage.name in [own.name for own in method.stages]:
            method.begin(stage.name, modules)


def schedule(model: nn.Module, progress: Fraction) -> None:
    """Tell methods how much of the stage is done, in [0, 1), before an optimizer step."""
    for method, modules in hooked(model, "schedule"):
        method.schedule(modules, progress)


def penalty(model: nn.Module) -> Tensor | None:
    """The sum of what methods add to the loss of one optimizer step; None when nothing does."""
    found = [value for method, modules in hooked(model, "penalty") if (value := method.penalty(modules)) is not None]
    return None if not found else torch.stack(found).sum()


def finish(model: nn.Module, *names: str) -> None:
    """Drop what only training needed (a reparametrisation, all but the mean of several experts), once; the outputs in evaluation mode stay.

    Adapters of methods that do nothing in training have nothing to finish, and stay as they are.
    """
    names = names or acting(model)
    with transition(model, *(name for name in names if name in attached(model))) as state:
        for name in names:
            attachment = state.known(name)
            if not attachment.finished and takes_part(attachment):
                for method, modules in hooked(model, "finish", name):
                    method.finish(modules)
                attachment.finished = True
                for _, site in sites(model):
                    for module in site.hung(name):  # which may hold new parameters
                        module.learn(name in state.roster.now.trained)


def learning_rates(model: nn.Module, given: Positive | None = None) -> dict[str, float]:
    """The learning rate of each trainable parameter of the active adapters, by name: the given one, or its method's own, times `rates`."""
    found: dict[str, float] = {}
    owners = {(name, method.name): method for name in acting(model) for method, _ in attached(model)[name].methods}
    for key, parameter in unwrap(model).named_parameters():
        if not parameter.requires_grad or ".adapters." not in f".{key}":
            continue
        adapter, method_name, *rest = f".{key}".split(".adapters.", 1)[1].split(".")
        method = owners[adapter, method_name]
        factors = [factor for pattern, factor in method.rates.items() if fnmatchcase(".".join(rest), pattern)]
        found[key] = (method.learning_rate if given is None else given) * math.prod(factors[:1])
    return found


def consistency(model: nn.Module) -> float:
    """The weight of the divergence between two forward passes of one batch; 0 when no active method asks for it."""
    return max((method.consistency for method in unfinished(model)), default=0.0)


def loss(model: nn.Module, **batch: Any) -> Tensor:
    """The loss of a labelled batch with everything that the active methods add to it."""
    value = supervised(model, batch)
    added = penalty(model)
    return value if added is None else value + added


def supervised(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss of a labelled batch without penalties; with two forward passes and their divergence where a method asks for it.

    1/2 (L_1 + L_2) + weight / 2 (KL(p_1 | p_2) + KL(p_2 | p_1)), both terms means over the same labels, so that batches average exactly.
    """
    weight = consistency(model)
    first = model(**batch)
    if not weight:
        value: Tensor = first.loss
        return value
    second = model(**batch)
    apart = divergence(first.logits, second.logits, batch["labels"], causal=getattr(unwrap(model), "task", "") == "causal_lm")
    total: Tensor = (first.loss + second.loss) / 2 + weight / 2 * apart
    return total


def divergence(one: Tensor, other: Tensor, labels: Tensor, *, causal: bool = False) -> Tensor:
    """KL(p | q) + KL(q | p) of what two passes predict, in the mean over the labels that the loss is a mean over.

    For several labels at once p and q are Bernoulli for each, for a single number they are normal with variance 1: (one - other)^2.
    causal: position t predicts label t + 1.
    """
    one, other = (logits.to(torch.promote_types(logits.dtype, torch.float32)) for logits in (one, other))
    if one.shape[-1] == 1 and labels.shape in (one.shape, one.shape[:1]):
        return (one - other).square().mean()
    if labels.is_floating_point():
        return ((one.sigmoid() - other.sigmoid()) * (one - other)).mean()
    if causal:
        one, other, labels = one[:, :-1], other[:, :-1], labels[:, 1:]
    one, other = one.log_softmax(dim=-1), other.log_softmax(dim=-1)
    each = ((one.exp() - other.exp()) * (one - other)).sum(dim=-1)
    counted = labels != IGNORED
    return each.where(counted, 0.0).sum() / counted.sum().clamp(min=1)
