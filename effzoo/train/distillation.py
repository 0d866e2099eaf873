"""Distillation: what a student learns from a teacher beside its labels, as settings and as formulas.

    L = labels L_labels + logits L_logits + hidden L_hidden + attention L_attention

A full-attention teacher and a student with efficient attention speak of the same tokens, so they can be compared
position by position.
Every part is a mean over the counted labels of a batch, as the loss of the labels is: batches, accumulated or spread
over processes, average exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effzoo.annotations import NotNegative, Range, Share, Whole
from effzoo.checked import IGNORED
from effzoo.errors import IncompatibleError, OptionError, did_you_mean, listing, shown
from effzoo.train.settings import check_fields

Temperature = Annotated[float, Range(1e-6, 1e6)]  # its square, and logits divided by it, stay within float32
PARTS = ("labels", "logits", "hidden", "attention")


@dataclass(frozen=True)
class Distillation:
    """The weight of each part of the loss.

    labels: of the loss of the student's labels.
    logits: of `soft_target_loss` (Hinton et al. 2015, arXiv:1503.02531, section 2).
    hidden: of `state_loss` after each block, in the mean over the blocks.
    attention: of `state_loss` after each attention layer with its output projection, in the mean over the layers.
        TinyBERT compares n x n weights here, which efficient attention never builds.
    temperature: of `soft_target_loss`.
    layers: the teacher's block with which each block of the student is compared. None: the same block, or, where the
        teacher is k times as deep, the last of every k (TinyBERT's uniform map).
    share: of the steps, the first ones, that learn from the teacher; the others train on the labels alone.

    Raises OptionError.

    `hidden` and `attention` are after Jiao et al. 2020, TinyBERT, arXiv:1909.10351, equations 7 and 8.
    """

    labels: NotNegative = 0.5
    logits: NotNegative = 0.5
    hidden: NotNegative = 0.0
    attention: NotNegative = 0.0
    temperature: Temperature = 2.0
    layers: tuple[Whole, ...] | None = None
    share: Share = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "distillation")
        if not any(getattr(self, name) for name in PARTS[1:]):
            raise OptionError(
                "distillation: the teacher counts for nothing, as logits, hidden and attention weigh "
                "0; give one of them a weight"
            )
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))

    @classmethod
    def of(cls, given: Distillation | Mapping[str, Any] | None) -> Distillation:
        """Settings from what a user gives: themselves, a mapping of some of them, or None for all defaults."""
        if isinstance(given, Distillation):
            return given
        known = [field.name for field in fields(cls)]
        for name in given or {}:
            if name not in known:
                raise OptionError(
                    f"distillation has no option {shown(name)}{did_you_mean(name, known)} Options: {listing(known)}."
                )
        return cls(**(given or {}))

    @property
    def inside(self) -> tuple[str, ...]:
        """The parts that compare what stands between the input and the logits."""
        return tuple(name for name in ("hidden", "attention") if getattr(self, name))

    def pairs(self, student: int, teacher: int) -> tuple[int, ...]:
        """The teacher's block for each of the student's, given both depths. Raises OptionError, IncompatibleError."""
        if self.layers is not None:
            outside = [layer for layer in self.layers if not 0 <= layer < teacher]
            if len(self.layers) != student or outside:
                problem = f"there is no block {outside[0]}" if outside else f"{len(self.layers)} are given"
                raise OptionError(
                    f"distillation: layers names a block of the teacher (0 to {teacher - 1}) for each of the "
                    f"student's {student}, but {problem}"
                )
            return self.layers
        if teacher % student:
            example = tuple(round((i + 1) * teacher / student) - 1 for i in range(student))
            raise IncompatibleError(
                f"the teacher's {teacher} blocks do not divide among the student's {student}; say which is compared "
                f"with which, layers={example} for example"
            )
        return tuple((i + 1) * teacher // student - 1 for i in range(student))


def soft_target_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float = 1.0, causal: bool = False
) -> Tensor:
    """T^2 KL(p_teacher | p_student) with p = softmax(logits / T), in the mean over the labels that count.

    T^2 keeps the size of the gradient the same for every T. Where several labels may hold at once, p is Bernoulli for
    each. A single number has no temperature: the loss is (student - teacher)^2.

    student, teacher: logits [..., labels].
    labels: [...], -100 where none counts.
    temperature: T.
    causal: position t predicts label t + 1.

    Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    student, teacher = _exact(student), _exact(teacher)
    if student.shape[-1] == 1 and (labels.shape == student.shape or labels.shape == student.shape[:1]):
        return (student - teacher).square().mean()
    if labels.is_floating_point():
        ours, theirs = student / temperature, teacher / temperature
        holds = theirs.sigmoid() * (F.logsigmoid(theirs) - F.logsigmoid(ours))
        fails = (-theirs).sigmoid() * (F.logsigmoid(-theirs) - F.logsigmoid(-ours))
        return temperature**2 * (holds + fails).mean()
    if causal:
        student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    ours, theirs = ((x[counted] / temperature).log_softmax(dim=-1) for x in (student, teacher))
    return temperature**2 * (theirs.exp() * (theirs - ours)).sum() / counted.sum().clamp(min=1)


def state_loss(student: Tensor, teacher: Tensor, counts: Tensor, valid: Tensor | None = None) -> Tensor:
    """mean (student - teacher)^2 over the width, then over the tokens of an example, then over the examples.

    student, teacher: states [batch, n, dim].
    counts: the weight of each example, [batch]: how many of its labels count.
    valid: bool[batch, n], where there is a token; None for everywhere.
    """
    of_token = (_exact(student) - _exact(teacher)).square().mean(dim=-1)
    if valid is None:
        of_example = of_token.mean(dim=1)
    else:
        of_example = of_token.where(valid, 0.0).sum(dim=1) / valid.sum(dim=1).clamp(min=1)
    return (of_example * counts).sum() / counts.sum().clamp(min=1)


def labels_per_example(labels: Tensor, task: str, num_labels: int) -> Tensor:
    """How many labels of each example count, [batch]; their sum is what `counted` says of the batch."""
    flat = labels.flatten(1) if labels.ndim > 1 else labels[:, None]
    if labels.is_floating_point() or (task == "classification" and num_labels == 1):
        return torch.full((len(flat),), flat.shape[1], device=labels.device)
    return ((flat[:, 1:] if task == "causal_lm" else flat) != IGNORED).sum(dim=1)


def _exact(x: Tensor) -> Tensor:
    """In float32, or in float64 when that is given."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
