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
from effzoo.sites import prompt_length
from effzoo.train.distillation import Distillation, labels_per_example, soft_target_loss, state_loss
from effzoo.train.form import accepted


class Teaching:
    """`teaching(student, batch)` is the distillation loss of a labelled batch.

    The teacher is put in evaluation mode, computes without a graph and is no part of the student: nothing of it is
    trained or saved. It reads the student's inputs, `global_attention_mask` only if its attention knows global tokens.
    Where a method of the student asks for two forward passes (AdaMix), both are compared with the teacher.

    active: while it is False, the loss is that of the labels alone.
    parts: the parts of the last loss, without their weights.

    Raises OptionError and IncompatibleError for two models that cannot be compared.
    """

    def __init__(self, student: Transformer, teacher: Transformer, settings: Distillation):
        self.teacher, self.settings = teacher.eval(), settings
        self.active, self.parts = True, dict[str, Tensor]()
        _check_comparable(student, teacher)
        self.pairs = _check_inside(student, teacher, settings) if settings.inside else ()

    def __call__(self, student: Transformer, batch: Mapping[str, Any]) -> Tensor:
        """The loss of a batch with labels."""
        if not self.active:
            self.parts = {}
            return training.supervised(student, batch)
        inside, settings = self.settings.inside, self.settings
        with forward_passes(student, inside) as passes:
            parts = {"labels": training.supervised(student, batch)}
        target = self.teach(batch)
        if settings.logits:
            parts["logits"] = torch.stack([self._logits(ours, target, student, batch) for ours in passes]).mean()
        for name in inside:
            parts[name] = torch.stack([self._states(name, ours, target, student, batch) for ours in passes]).mean()
            if torch.is_grad_enabled() and not parts[name].requires_grad:
                raise IncompatibleError(
                    f"no {name} state of the student depends on what is trained, so it cannot "
                    f"learn from them; give {name}=0"
                )
        self.parts = {name: value.detach() for name, value in parts.items()}
        return torch.stack([getattr(settings, name) * value for name, value in parts.items()]).sum()

    @torch.no_grad()
    def teach(self, batch: Mapping[str, Any]) -> ForwardPass:
        """The teacher's forward pass over the inputs of a batch. Raises InputError for one that it does not read."""
        known = accepted(self.teacher)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if not any(core.knows_globals() for core in _cores(self.teacher)):
            inputs.pop("global_attention_mask", None)
        for name in inputs:
            if name not in known:
                raise InputError(
                    f"the teacher does not read {name!r}, which the student is given; it reads {', '.join(known)}"
                )
        with forward_passes(self.teacher.eval(), self.settings.inside) as passes:
            self.teacher(**inputs)
        return passes[0]

    def steps_of(self, total: int) -> int:
        """How many of so many steps, the first ones, learn from the teacher."""
        return max(1, round(self.settings.share * total))

    def _logits(self, ours: ForwardPass, theirs: ForwardPass, student: Transformer, batch: Mapping[str, Any]) -> Tensor:
        temperature, causal = self.settings.temperature, student.task == "causal_lm"
        logits = ours.logits, theirs.logits
        if student.task == "question_answering":  # a distribution over the tokens
            logits = ours.logits.transpose(1, 2), theirs.logits.transpose(1, 2)
        return soft_target_loss(*logits, batch["labels"], temperature=temperature, causal=causal)

    def _states(
        self, name: str, ours: ForwardPass, theirs: ForwardPass, student: Transformer, batch: Mapping[str, Any]
    ) -> Tensor:
        """The mean over the blocks. Prompt tokens have no counterpart and are left out."""
        counts = labels_per_example(batch["labels"], student.task, student.num_labels)
        valid = None if batch.get("attention_mask") is None else batch["attention_mask"].bool()
        prompt, teacher_prompt = prompt_length(student), prompt_length(self.teacher)
        of_block = [
            state_loss(states[:, prompt:], getattr(theirs, name)[pair][:, teacher_prompt:], counts, valid)
            for states, pair in zip(getattr(ours, name), self.pairs, strict=True)
        ]
        return torch.stack(of_block).mean()


@dataclass
class ForwardPass:
    """The logits of one forward pass, and by block the states after it and the output of its attention.

    States are [batch, prompt + n, dim].
    """

    logits: Tensor
    hidden: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)


@contextmanager
def forward_passes(model: nn.Module, inside: Sequence[str] = ()) -> Iterator[list[ForwardPass]]:
    """A list of the forward passes of a model in the `with` block.

    inside: of "hidden" and "attention", what is kept besides the logits.
    """
    passes: list[ForwardPass] = []
    states: dict[str, list[Tensor]] = {"hidden": [], "attention": []}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _inputs, out: states[name].append(out)

    def end(_module: nn.Module, _inputs: Any, out: Any) -> None:
        passes.append(ForwardPass(out.logits, *map(list, states.values())))
        for kept in states.values():
            kept.clear()

    hooks = [model.register_forward_hook(end)]
    for block in dict.fromkeys(cast(nn.ModuleList, model.blocks)) if inside else ():
        places = {"hidden": block, "attention": block.attn}
        hooks += [cast(nn.Module, places[name]).register_forward_hook(keep(name)) for name in inside]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def fingerprint(model: nn.Module) -> str:
    """A hash of every tensor of a model, of its function, and of the names of its active adapters."""
    digest = hashlib.sha256(json.dumps([acting(model), facts(model)], sort_keys=True).encode())
    for key, value in sorted(model.state_dict().items()):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(f"{key}{value.dtype}{tuple(value.shape)}".encode() + content.tobytes())
    return digest.hexdigest()[:16]


def _check_comparable(student: Transformer, teacher: Transformer) -> None:
    """Refuse what does not answer the same question, and a teacher that would move with its student."""
    if {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
        raise OptionError(
            "the teacher has parameters of the student, so it would change with it; give a model of "
            "its own (copy.deepcopy(model))"
        )
    if student.task == "seq2seq_lm":
        raise IncompatibleError(
            "the teacher is shown batches without labels, of which an encoder-decoder makes what its decoder reads; "
            "distil it in a loop of your own"
        )
    if student.task != teacher.task:
        raise IncompatibleError(
            f"the student's task is {student.task!r}, the teacher's {teacher.task!r}; build both with the same task"
        )
    vocabularies = getattr(student.config, "vocab", None), getattr(teacher.config, "vocab", None)
    if vocabularies[0] != vocabularies[1]:
        raise IncompatibleError(
            f"the student's vocabulary has {vocabularies[0]} entries, the teacher's {vocabularies[1]}: token ids "
            "mean the same to both only if they share a tokenizer; take a teacher with the student's vocabulary"
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
                "alone, or build it with residual='plain'"
            )
    if student.config.dim != teacher.config.dim:
        raise IncompatibleError(
            f"the student is {student.config.dim} wide, the teacher {teacher.config.dim}, so {what} states cannot be "
            "compared; distil the logits alone, or take a teacher of the same width"
        )
    return settings.pairs(student.config.layers, teacher.config.layers)


def _cores(model: nn.Module) -> Iterator[Any]:
    yield from cast(Any, model).cores() if hasattr(model, "cores") else ()
