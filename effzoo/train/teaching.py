"""A teacher at work: the loss of a student's batch with what it is to learn from the teacher."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from effzoo.architectures import Transformer
from effzoo.errors import IncompatibleError, InputError, OptionError
from effzoo.peft import training
from effzoo.peft.attach import acting
from effzoo.peft.fingerprint import facts
from effzoo.sites import prompt_rows
from effzoo.train.distillation import Distillation, apart, labels_of_each, softened
from effzoo.train.examples import accepted


class Teaching:
    """`teaching(student, batch)` is the distillation loss of a labelled batch.

    The teacher is put in evaluation mode, computes without a graph and is nowhere a part of the student, so nothing of
    it is trained or saved. It sees the student's inputs; `global_attention_mask` only if its attention knows global
    tokens. Where a method of the student asks for two forward passes (AdaMix), both are compared with the teacher.
    parts: the parts of the last loss, without their weights.
    acts: while it is False, the loss is that of the labels alone.

    Raises OptionError and IncompatibleError for two models that cannot be compared.
    """

    def __init__(self, student: Transformer, teacher: Transformer, settings: Distillation):
        self.teacher, self.settings = teacher.eval(), settings
        self.acts, self.parts = True, dict[str, Tensor]()
        _check_alike(student, teacher)
        self.pairs = _check_inside(student, teacher, settings) if settings.inside else ()

    def __call__(self, student: Transformer, batch: Mapping[str, Any]) -> Tensor:
        """The loss of a batch with labels."""
        if not self.acts:
            self.parts = {}
            return training.supervised(student, batch)
        inside, settings = self.settings.inside, self.settings
        with observed(student, inside) as passes:
            parts = {"labels": training.supervised(student, batch)}
        taught = self.teach(batch)
        if settings.logits:
            parts["logits"] = torch.stack(
                [self._logits(seen, taught, student, batch["labels"]) for seen in passes]
            ).mean()
        for name in inside:
            parts[name] = torch.stack([self._states(name, seen, taught, student, batch) for seen in passes]).mean()
            if torch.is_grad_enabled() and not parts[name].requires_grad:
                raise IncompatibleError(
                    f"no {name} state of the student depends on what is trained, so it cannot "
                    f"learn from them; give {name}=0"
                )
        self.parts = {name: value.detach() for name, value in parts.items()}
        return torch.stack([getattr(settings, name) * value for name, value in parts.items()]).sum()

    @torch.no_grad()
    def teach(self, batch: Mapping[str, Any]) -> Seen:
        """What the teacher makes of the inputs of a batch."""
        known = accepted(self.teacher)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if not any(core.knows_globals() for core in _cores(self.teacher)):
            inputs.pop("global_attention_mask", None)
        for name in inputs:
            if name not in known:
                raise InputError(
                    f"the teacher does not read {name!r}, which the student is given; it reads {', '.join(known)}"
                )
        with observed(self.teacher.eval(), self.settings.inside) as passes:
            self.teacher(**inputs)
        return passes[0]

    def _logits(self, seen: Seen, taught: Seen, student: Transformer, labels: Tensor) -> Tensor:
        return softened(
            seen.logits,
            taught.logits,
            labels,
            temperature=self.settings.temperature,
            causal=student.task == "causal_lm",
        )

    def _states(self, name: str, seen: Seen, taught: Seen, student: Transformer, batch: Mapping[str, Any]) -> Tensor:
        """The mean over the blocks. Rows that adapters put in front of the input have no counterpart and are left
        out."""
        ours, theirs = getattr(seen, name), getattr(taught, name)
        numbers = labels_of_each(batch["labels"], student.task, student.num_labels)
        valid = None if batch.get("attention_mask") is None else batch["attention_mask"].bool()
        rows, before = prompt_rows(student), prompt_rows(self.teacher)
        each = [
            apart(x[:, rows:], theirs[pair][:, before:], numbers, valid)
            for x, pair in zip(ours, self.pairs, strict=True)
        ]
        return torch.stack(each).mean()

    def until(self, steps: int) -> int:
        """The number of the first step, of so many, that trains on the labels alone."""
        return max(1, round(self.settings.share * steps))


@dataclass
class Seen:
    """What one forward pass has shown: logits, and by block the states after it and what its attention gave, [batch,
    rows + n, dim]."""

    logits: Tensor
    hidden: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)


@contextmanager
def observed(model: nn.Module, inside: Sequence[str] = ()) -> Iterator[list[Seen]]:
    """What the forward passes of a model in the `with` block show. inside: of "hidden" and "attention", what is looked
    at besides the logits."""
    passes: list[Seen] = []
    found: dict[str, list[Tensor]] = {"hidden": [], "attention": []}

    def after(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _inputs, out: found[name].append(out)

    def whole(_module: nn.Module, _inputs: Any, out: Any) -> None:
        passes.append(Seen(out.logits, *(list(states) for states in found.values())))
        for states in found.values():
            states.clear()

    hooks = [model.register_forward_hook(whole)]
    for block in dict.fromkeys(cast(nn.ModuleList, model.blocks)) if inside else ():
        places = {"hidden": block, "attention": block.attn}
        hooks += [cast(nn.Module, places[name]).register_forward_hook(after(name)) for name in inside]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def fingerprint(model: nn.Module) -> str:
    """A hash of every tensor of a model, of its function, and of the names of its active adapters."""
    found = hashlib.sha256(json.dumps([acting(model), facts(model)], sort_keys=True).encode())
    for key, value in sorted(model.state_dict().items()):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found.update(f"{key}{value.dtype}{tuple(value.shape)}".encode() + content.tobytes())
    return found.hexdigest()[:16]


def _check_alike(student: Transformer, teacher: Transformer) -> None:
    """Refuse what does not answer the same question, and a teacher that would move with its student."""
    if {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
        raise OptionError(
            "the teacher has parameters of the student, so it would change with it; give a model of "
            "its own (copy.deepcopy(model))"
        )
    if student.task != teacher.task:
        raise IncompatibleError(
            f"the student's task is {student.task!r}, the teacher's {teacher.task!r}; build both with the same task"
        )
    vocabularies = getattr(student.config, "vocab", None), getattr(teacher.config, "vocab", None)
    if vocabularies[0] != vocabularies[1]:
        raise IncompatibleError(
            f"the student's vocabulary has {vocabularies[0]} entries, the teacher's {vocabularies[1]}: token ids "
            "mean the same to "
            "both only if they share a tokenizer; take a teacher with the student's vocabulary"
        )
    if not student.task.endswith("_lm") and student.num_labels != teacher.num_labels:
        raise IncompatibleError(
            f"the student has {student.num_labels} labels, the teacher {teacher.num_labels}; "
            "build both with the same num_labels"
        )


def _check_inside(student: Transformer, teacher: Transformer, settings: Distillation) -> tuple[int, ...]:
    """Refuse models whose insides cannot be compared; the pairs of blocks."""
    what = " and ".join(settings.inside)
    for whose, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, Transformer):
            raise IncompatibleError(
                f"{what} states are compared by position, which those of the {whose}, a {type(model).__name__}, are "
                "not; logits alone"
            )
        if model.config.residual == "reversible":
            raise IncompatibleError(
                f"the {whose} is reversible, so its {what} states are not kept to be compared; distil the logits "
                "alone, or build it with "
                "residual='plain'"
            )
    if student.config.dim != teacher.config.dim:
        raise IncompatibleError(
            f"the student is {student.config.dim} wide, the teacher {teacher.config.dim}, so {what} states cannot be "
            "compared; "
            "distil the logits alone, or take a teacher of the same width"
        )
    return settings.pairs(student.config.layers, teacher.config.layers)


def _cores(model: nn.Module) -> Iterator[Any]:
    yield from cast(Any, model).cores() if hasattr(model, "cores") else ()
