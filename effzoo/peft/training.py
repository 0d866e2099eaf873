"""What methods do during training, for a training loop of one's own; `effzoo.finetune` makes the same calls.

    effzoo.peft.calibrate(model, batches)                            # once, before training
    for stage, steps in effzoo.peft.timetable(model, total):         # one unnamed stage for most methods
        effzoo.peft.begin(model, stage); optimizer = ...             # a fresh optimizer
        for step in range(steps):
            effzoo.peft.schedule(model, step / steps)
            effzoo.peft.loss(model, **batch).backward()
            effzoo.peft.after_backward(model)
            optimizer.step(); optimizer.zero_grad()
    effzoo.peft.finish(model)                                        # drop what only training needed

All of them concern the active adapters that are trained, and do nothing for methods without the hook in question
(`finish`: all active ones, or those named). A finished adapter takes part no more: trained again, it has one unnamed
stage, and what its methods chose stays chosen.

An adapter is in one stage of each of its methods, and files hold which: loaded, it goes on there, and `timetable` has
what is left. To be in a stage it is attached anew, `begin` is called for every stage up to it, and then the stored
tensors are filled in; so `begin` must make the shapes of its stage from an adapter with any content.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set, Sized
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from effzoo.annotations import Count, Fraction, Positive
from effzoo.checked import IGNORED
from effzoo.errors import AdapterError, IncompatibleError, TrainingError, UnknownNameError, listing
from effzoo.peft.attach import acting, attached
from effzoo.peft.method import Batches, Modules
from effzoo.peft.state import Attachment, adapters_of, transition
from effzoo.peft.training_hooks import HOOKS, Stage, TrainingHooks, uses
from effzoo.sites import PeftModule, learn, sites, unwrap

WHOLE = Stage("", 1.0)


def hooked(model: nn.Module, hook: str, *names: str) -> Iterator[tuple[TrainingHooks, Modules]]:
    """The methods that override a hook, each with what it has hung, by path.

    names: of adapters; none for those that are active and trained. Finished ones are left out.
    """
    attachments = attached(model)
    wanted = [
        (name, method, paths)
        for name in names or learning(model)
        if not attachments[name].finished
        for method, paths in attachments[name].methods
        if isinstance(method, TrainingHooks) and uses(method, hook)
    ]
    known = dict(sites(model)) if wanted else {}
    for name, method, paths in wanted:
        modules = {path: known[path].of(name)[method.name] for path in paths}
        yield method, {path: module for path, module in modules.items() if isinstance(module, PeftModule)}


def learning(model: nn.Module) -> list[str]:
    """The active adapters that are trained."""
    now = adapters_of(model).roster.now
    return [name for name in now.names if name in now.trained]


def of_training(attachment: Attachment) -> list[TrainingHooks]:
    """The methods of an adapter that may take part in training."""
    return [method for method, _ in attachment.methods if isinstance(method, TrainingHooks)]


def unfinished(model: nn.Module) -> list[TrainingHooks]:
    """The methods of the trained adapters that still take part in training."""
    attachments = [attached(model)[name] for name in learning(model)]
    return [method for attachment in attachments if not attachment.finished for method in of_training(attachment)]


def takes_part(attachment: Attachment) -> bool:
    """Whether one of an adapter's methods does something in training, so that finishing changes the adapter."""
    return any(
        method.stages or method.consistency or any(uses(method, hook) for hook in HOOKS)
        for method in of_training(attachment)
    )


def calibrate(model: nn.Module, batches: Batches) -> bool:
    """Let methods choose masks and starting values by labelled batches; whether any wanted to.

    The model's mode and gradients are left as they were.
    """
    wanted = list(hooked(model, "calibrate"))
    if not wanted:
        return False
    model = unwrap(model)
    mode, batches = model.training, batches if isinstance(batches, Sized) else list(batches)
    if isinstance(batches, Sized) and not len(batches):
        raise IncompatibleError(
            f"{wanted[0][0].name} chooses by looking at data, but there is none; give at least one labelled batch"
        )
    try:
        for method, modules in wanted:
            method.calibrate(model.eval(), modules, batches)
    finally:
        model.train(mode)
        for parameter in model.parameters():
            parameter.grad = None
    return True


def stages(model: nn.Module) -> Sequence[Stage]:
    """The stages of the training, their shares adding up to 1; one without a name for methods that have none.

    Of a training that has begun, those that are left, with the one that runs.
    """
    attachments = [attachment for name in learning(model) if not (attachment := attached(model)[name]).finished]
    sequences = {
        tuple(method.stages[max(0, _number(method, attachment.begun.get(method.name, ""))) :])
        for attachment in attachments
        for method in of_training(attachment)
        if method.stages
    }
    if len(sequences) > 1:
        given_by = "; ".join(sorted(map(_said, sequences)))
        raise IncompatibleError(
            f"the trained methods have different stages before them ({given_by}); train one after the other"
        )
    if not sequences:
        return (WHOLE,)
    given = sequences.pop()
    total = sum(stage.share for stage in given)
    return tuple(Stage(stage.name, stage.share / total) for stage in given)


def _said(given: Sequence[Stage]) -> str:
    return ", ".join(stage.name for stage in given)


def timetable(model: nn.Module, total: Count) -> list[tuple[Stage, int]]:
    """The stages with their numbers of optimizer steps, which add up to `total`.

    Boundaries are rounded, and no stage is empty. Raises TrainingError when there are fewer steps than stages.
    """
    planned = stages(model)
    if total < len(planned):
        raise TrainingError(
            f"the active methods train in {len(planned)} stages ({_said(planned)}), which need a step "
            f"each, got {total}; train longer"
        )
    before, share, steps = 0, 0.0, []
    for left, stage in zip(range(len(planned) - 1, -1, -1), planned, strict=True):
        share += stage.share
        end = min(max(round(share * total), before + 1), total - left)
        steps.append((stage, end - before))
        before = end
    return steps


def first_final_step(model: nn.Module, total: Count) -> int:
    """The first step after which the adapter is what its options say: in the last stage, where schedules have ended.

    A checkpoint from before that, of a network that is not yet pruned, say, is no result of the run, however good it
    is.
    """
    *earlier, (_, steps) = timetable(model, total)
    share = max((method.schedule_ends for method, _ in hooked(model, "schedule")), default=0.0)
    return min(total, sum(number for _, number in earlier) + 1 + math.ceil(share * steps))


def begin(model: nn.Module, stage: Stage | str) -> None:
    """Begin a stage: all trained adapters that have it are in it then; one that is in it already stays as it is.

    stage: of `timetable` or `stages`, or its name.

    Raises UnknownNameError for the name of a stage that no trained adapter has, and TrainingError for an adapter that
    is in a later stage, and has dropped what this one trains; the model is then unchanged.
    """
    if isinstance(stage, str):
        stage = _named(model, stage)
    wanted: dict[str, set[str]] = {}  # {adapter: its methods that are not in this stage}
    for name in learning(model):
        attachment = attached(model)[name]
        for method in () if attachment.finished else of_training(attachment):
            now, number = attachment.begun.get(method.name, ""), _number(method, stage.name)
            if 0 <= number < _number(method, now):
                raise TrainingError(
                    f"the adapter {name!r} is in stage {now!r} of {method.name}, and {stage.name!r} comes before it; "
                    "attach it anew to begin there, or go on with what `effzoo.peft.timetable(model, steps)` gives"
                )
            if number >= 0 and now != stage.name:
                wanted.setdefault(name, set()).add(method.name)
    if wanted:
        with transition(model, *wanted):
            for name, methods in wanted.items():
                _begin(model, name, methods, stage.name)


def _named(model: nn.Module, name: str) -> Stage:
    """The stage of this name, of those that the trained adapters have."""
    known = {
        stage.name: stage for one in learning(model) for method in of_training(attached(model)[one])
        for stage in method.stages
    } or {WHOLE.name: WHOLE}  # fmt: skip
    if name not in known:
        raise UnknownNameError("stage", name, known)
    return known[name]


def restart(model: nn.Module, first: str) -> None:
    """Bring the trained adapters to the stage with which a run began that is to be resumed.

    One in a later stage has the tensors of that, which those of a checkpoint replace, and is taken to have just begun.
    """
    for name in learning(model):
        attachment = attached(model)[name]
        for method in of_training(attachment):
            if 0 <= _number(method, first) < _number(method, attachment.begun.get(method.name, "")):
                attachment.begun[method.name] = first
            if _number(method, first) > 0:
                begin(model, Stage(first, 1.0))


def later(attachment: Attachment, begun: Mapping[str, str]) -> dict[str, str]:
    """The stages of an adapter that come after those of `begun`, {method: stage}."""
    methods = {method.name: method for method in of_training(attachment)}
    return {
        key: stage
        for key, stage in attachment.begun.items()
        if key in begun and _number(methods[key], stage) > _number(methods[key], begun[key])
    }


def enter(model: nn.Module, name: str, begun: Mapping[str, str]) -> None:
    """Bring a freshly attached adapter to the stage of each method, through those before it.

    Raises AdapterError for a stage that there is not.
    """
    attachment = adapters_of(model).known(name)
    methods = {method.name: method for method in of_training(attachment) if method.stages}
    for key, stage in begun.items():
        if key not in methods or _number(methods[key], stage) < 0:
            known = {f"{stage.name!r} of {method.name}" for method in methods.values() for stage in method.stages}
            raise AdapterError(
                f"the file says that an adapter {attachment.spec} is in stage {stage!r:.80} of {key!r:.80}, and its "
                f"stages are {listing(sorted(known)) or 'none'}; save it again"
            )
        for earlier in methods[key].stages[: _number(methods[key], stage) + 1]:
            _begin(model, name, {key}, earlier.name)


def _begin(model: nn.Module, name: str, methods: Set[str], stage: str) -> None:
    """Begin a stage of some methods of an adapter, inside a transition."""
    for method, modules in hooked(model, "begin", name):
        if method.name in methods:
            method.begin(stage, modules)
    adapters_of(model).known(name).begun |= dict.fromkeys(methods, stage)
    for _, site in sites(model):
        for module in site.hung(name):
            module.train(site.training)


def _number(method: TrainingHooks, stage: str) -> int:
    """Which of its stages this is; -1 for none."""
    names = [own.name for own in method.stages]
    return names.index(stage) if stage in names else -1


def said(begun: Mapping[str, str]) -> str:
    """Stages that were begun, in words."""
    return " and ".join(f"stage {stage!r} of {method}" for method, stage in begun.items()) or "no stage"


def schedule(model: nn.Module, progress: Fraction) -> None:
    """Tell methods how much of the stage is done, in [0, 1), before an optimizer step."""
    for method, modules in hooked(model, "schedule"):
        method.schedule(modules, progress)


def after_backward(model: nn.Module) -> None:
    """Show methods the gradients of an optimizer step, before the optimizer uses them."""
    for method, modules in hooked(model, "after_backward"):
        method.after_backward(modules)


def penalty(model: nn.Module) -> Tensor | None:
    """The sum of what methods add to the loss of one optimizer step; None when nothing does."""
    values = [value for method, modules in hooked(model, "penalty") if (value := method.penalty(modules)) is not None]
    return None if not values else torch.stack(values).sum()


def finish(model: nn.Module, *names: str) -> None:
    """Drop what only training needed (a reparametrisation, all experts but their mean); evaluation gives the same
    outputs.

    names: of adapters; none for all active ones. Adapters of methods that do nothing in training stay as they are.
    """
    names = names or acting(model)
    known = [name for name in names if name in attached(model)]
    reads_base = any(takes_part(attached(model)[name]) for name in known)
    with transition(model, *known, reads_base=reads_base) as state:
        for name in names:
            attachment = state.known(name)
            if not attachment.finished and takes_part(attachment):
                for method, modules in hooked(model, "finish", name):
                    method.finish(modules)
                attachment.finished, attachment.begun = True, {}
                for _, site in sites(model):
                    for module in site.hung(name):  # which may hold new parameters
                        learn(module, name in state.roster.now.trained)


def learning_rates(model: nn.Module, given: Positive | None = None) -> dict[str, float]:
    """The learning rate of each trainable parameter of the active adapters, by name.

    given: for all; None for that of each method. Both are multiplied by the method's `rates`.
    """
    by_name: dict[str, float] = {}
    owners = {(name, method.name): method for name in acting(model) for method, _ in attached(model)[name].methods}
    for key, parameter in unwrap(model).named_parameters():
        if not parameter.requires_grad or ".adapters." not in f".{key}":
            continue
        adapter, method_name, *rest = f".{key}".split(".adapters.", 1)[1].split(".")
        method = owners[adapter, method_name]
        rates = method.rates if isinstance(method, TrainingHooks) else {}
        factors = [factor for pattern, factor in rates.items() if fnmatchcase(".".join(rest), pattern)]
        by_name[key] = (method.learning_rate if given is None else given) * math.prod(factors[:1])
    return by_name


def consistency(model: nn.Module) -> float:
    """The weight of the divergence between two forward passes of one batch; 0 where no method asks for it."""
    return max((method.consistency for method in unfinished(model)), default=0.0)


def loss(model: nn.Module, **batch: Any) -> Tensor:
    """The loss of a labelled batch with everything that the active methods add to it."""
    value = supervised(model, batch)
    added = penalty(model)
    return value if added is None else value + added


def supervised(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss of a labelled batch without penalties.

        1/2 (L_1 + L_2) + weight / 2 (KL(p_1 | p_2) + KL(p_2 | p_1))

    That is where a method asks for two forward passes and their divergence (`consistency`), else L_1. Both terms are
    means over the same labels, so that batches average exactly.
    """
    weight = consistency(model)
    first = model(**batch)
    if not weight:
        value: Tensor = first.loss
        return value
    second = model(**batch)
    causal = getattr(unwrap(model), "task", "") == "causal_lm"
    both_ways = divergence(first.logits, second.logits, batch["labels"], causal=causal)
    total: Tensor = (first.loss + second.loss) / 2 + weight / 2 * both_ways
    return total


def divergence(one: Tensor, other: Tensor, labels: Tensor, *, causal: bool = False) -> Tensor:
    """KL(p | q) + KL(q | p) of what two passes predict, in the mean over the labels that the loss is a mean over.

    one, other: logits of p and q.
    labels: as of the loss. For several labels at once p and q are Bernoulli for each, for a single number they are
        normal with variance 1: (one - other)^2.
    causal: position t predicts label t + 1.
    """
    one, other = (logits.to(torch.promote_types(logits.dtype, torch.float32)) for logits in (one, other))
    if one.shape[-1] == 1 and (labels.shape == one.shape or labels.shape == one.shape[:1]):
        return (one - other).square().mean()
    if labels.is_floating_point():
        return ((one.sigmoid() - other.sigmoid()) * (one - other)).mean()
    if causal:
        one, other, labels = one[:, :-1], other[:, :-1], labels[:, 1:]
    one, other = one.log_softmax(dim=-1), other.log_softmax(dim=-1)
    divergences = ((one.exp() - other.exp()) * (one - other)).sum(dim=-1)
    counted = labels != IGNORED
    return divergences.where(counted, 0.0).sum() / counted.sum().clamp(min=1)
