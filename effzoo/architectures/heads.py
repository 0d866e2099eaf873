"""Task heads: from hidden states to logits, and the loss when labels are given.

The sites of a classification head have roles `head.*`: they start untrained, so every adapter trains a copy of its own.
Those of a pretrained language-model head have roles `lm.*` and stay frozen unless targeted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.architectures.config import Config
from effzoo.architectures.embeddings import check_tensors
from effzoo.architectures.output import Output
from effzoo.blocks.feedforward import ACTIVATIONS
from effzoo.checked import IGNORED, known, within
from effzoo.devices import at_hand
from effzoo.errors import IncompatibleError, InputError
from effzoo.sites import Embedding, Linear, Norm, TiedLinear

LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


class Features(nn.Module):
    """Hidden states as they are, and tanh(W x_first + b) for models that were trained with such a pooler."""

    def __init__(self, config: Config):
        super().__init__()
        self.pooler = Linear(config.width, config.dim, role="pooler") if config.pooler and not config.causal else None

    def forward(self, hidden: Tensor, valid: Tensor | None, labels: Tensor | None, embedding: Embedding) -> Output:
        if labels is not None:
            raise InputError("task 'features' has no loss, so labels mean nothing; build the model with another task")
        pooled = None if self.pooler is None else self.pooler(hidden[:, 0].clone()).tanh()
        return Output.of(last_hidden_state=hidden, pooler_output=pooled)


class Classification(nn.Module):
    """One label per sequence: out(dropout(norm(tanh(dense(pooled))))), or out(dropout(pooled)) without the dense layer.

    With `pooling="late"`, dense, activation and norm act on every token, and `out` reads their mean.

    The loss is the cross-entropy for integer labels [batch], the binary cross-entropy for float labels [batch,
    num_labels] (several labels may hold), and the squared error for one label. The head of an adapter may have another
    number of labels than the model's own `num_labels`.
    """

    def __init__(self, config: Config, num_labels: int):
        super().__init__()
        self.pooling, self.num_labels = config.pooling, num_labels
        self.dense = (
            Linear(config.width, config.dim, bias=config.transform_bias, role="head.dense")
            if config.head_dense
            else None
        )
        self.activation = _activation(config)
        self.norm = config.slots().make_norm(config.dim, "head.norm") if config.head_norm else None
        self.dropout = nn.Dropout(config.dropout)
        self.out = Linear(
            config.dim if config.head_dense else config.width, num_labels, bias=config.head_bias, role="head.out"
        )

    def reads(self, x: Tensor, valid: Tensor | None) -> Tensor | None:
        """The one position of x [batch, n, dim] that counts, [batch, 1], or None when all do."""
        if self.pooling == "first":
            return torch.zeros(len(x), 1, dtype=torch.long, device=x.device)
        if self.pooling == "last":
            return torch.full((len(x), 1), x.shape[1] - 1, device=x.device) if valid is None else _last(valid)[:, None]
        return None

    def forward(self, hidden: Tensor, valid: Tensor | None, labels: Tensor | None, embedding: Embedding) -> Output:
        output = self.of_pooled(pool(self.before_pooling(hidden), valid, self.pools), labels)
        output["last_hidden_state"] = hidden
        return output

    @property
    def pools(self) -> str:
        """How `pool` makes one vector of what `before_pooling` gives."""
        return "mean" if self.pooling == "late" else self.pooling

    def before_pooling(self, hidden: Tensor) -> Tensor:
        """What is pooled, [batch, n, dim]."""
        return self._transformed(hidden) if self.pooling == "late" else hidden

    def of_pooled(self, pooled: Tensor, labels: Tensor | None) -> Output:
        """Logits and loss of the pooled vectors [batch, dim]."""
        logits = self.out(self.dropout(pooled if self.pooling == "late" else self._transformed(pooled)))
        return Output.of(loss=None if labels is None else self.loss(logits, labels), logits=logits)

    def _transformed(self, x: Tensor) -> Tensor:
        return transformed(x, self.dense, self.activation, self.norm)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        labels = _labels(logits, labels)
        if logits.shape[-1] == 1 and (labels.shape == logits.shape or labels.shape == logits.shape[:1]):
            labels = _check_numbers(labels, -math.inf, math.inf)
            return F.mse_loss(_exact(logits).flatten(), labels.to(_exact(logits)).flatten())
        if labels.is_floating_point() and labels.shape == logits.shape:
            labels = _check_numbers(labels, 0, 1)
            return F.binary_cross_entropy_with_logits(_exact(logits), labels.to(_exact(logits)))
        if labels.is_floating_point() or labels.shape != logits.shape[:1]:
            raise InputError(
                f"labels are integers of shape {tuple(logits.shape[:1])} (or floats of shape {tuple(logits.shape)} "
                f"when several may hold), got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        return mean_cross_entropy(logits, labels)


class TokenClassification(nn.Module):
    """One label per token: out(dropout(x)), [batch, n, num_labels]; labels [batch, n], -100 where none counts.

    With `token_dense`, x goes through dense, activation and norm first, as in `Classification`.
    """

    def __init__(self, config: Config, num_labels: int):
        super().__init__()
        dense = config.token_dense
        self.dense = Linear(config.width, config.dim, bias=config.transform_bias, role="head.dense") if dense else None
        self.activation = _activation(config)
        self.norm = config.slots().make_norm(config.dim, "head.norm") if dense and config.head_norm else None
        self.dropout = nn.Dropout(config.dropout)
        self.out = Linear(config.dim if dense else config.width, num_labels, role="head.out")

    def forward(self, hidden: Tensor, valid: Tensor | None, labels: Tensor | None, embedding: Embedding) -> Output:
        logits = self.out(self.dropout(transformed(hidden, self.dense, self.activation, self.norm)))
        return Output.of(
            loss=None if labels is None else mean_cross_entropy(logits, labels), logits=logits, last_hidden_state=hidden
        )


class QuestionAnswering(TokenClassification):
    """Where the answer starts and ends: out(x), [batch, n, 2]; labels int[batch, 2], the first and the last token.

    A label of -100 does not count. The loss is the mean over the labels that count of -log softmax(logits)[label], the
    softmax over the tokens of the example. Padding is no answer: its logits are the lowest number of their dtype. With
    `token_dense`, x goes through dense, activation, norm and dropout first.

    Devlin et al. 2019, BERT, arXiv:1810.04805, section 4.2.
    """

    def __init__(self, config: Config):
        super().__init__(config, 2)
        if self.dense is None:
            self.dropout = nn.Dropout(0.0)

    def forward(self, hidden: Tensor, valid: Tensor | None, labels: Tensor | None, embedding: Embedding) -> Output:
        logits: Tensor = super().forward(hidden, valid, None, embedding).logits
        if valid is not None:
            logits = logits.masked_fill(~valid[..., None], torch.finfo(logits.dtype).min)
        loss = None if labels is None else self.loss(logits, labels)
        return Output.of(loss=loss, logits=logits, last_hidden_state=hidden)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        labels = _labels(logits, labels)
        if labels.is_floating_point() or labels.shape != (len(logits), 2):
            raise InputError(
                f"labels are integers of shape {(len(logits), 2)}, the first and the last token of each answer, got "
                f"{labels.dtype} of shape {tuple(labels.shape)}"
            )
        return mean_cross_entropy(logits.transpose(1, 2), labels, "; they are tokens of the example")


class LanguageModel(nn.Module):
    """Logits over the vocabulary, [batch, n, vocab]: W norm(act(dense(x))) + b, where the config has the transform.

    With a `logit_cap` c they become c tanh(logits / c).

    W is the token embedding (tied; the transform then ends as wide as that), or a matrix of its own. Labels [batch, n],
    -100 where none counts; a decoder compares the logits at t with the label at t + 1.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.causal, self.cap = config.causal, config.logit_cap or None
        transform = config.lm_transform and not config.causal
        inner = config.embed_dim if config.tied else config.dim
        self.dense = Linear(config.width, inner, bias=config.transform_bias, role="lm.dense") if transform else None
        self.norm = config.slots().make_norm(inner, "lm.norm") if transform else None
        self.activation = ACTIVATIONS[config.activation]
        bias = not config.causal if config.lm_bias is None else config.lm_bias
        width = inner if transform else config.width
        if config.tied and width != config.embed_dim:
            raise IncompatibleError(
                f"a tied language-model head needs hidden states as wide as the embedding, {config.embed_dim}, not "
                f"{width}; use tied=False"
            )
        self.out = (
            TiedLinear(width, config.vocab, bias, role="lm.out")
            if config.tied
            else Linear(width, config.vocab, bias, role="lm.out")
        )

    def forward(self, hidden: Tensor, valid: Tensor | None, labels: Tensor | None, embedding: Embedding) -> Output:
        x = transformed(hidden, self.dense, self.activation, self.norm)
        logits = self.out(x, embedding) if isinstance(self.out, TiedLinear) else self.out(x)
        logits = logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
        loss = None
        if labels is not None:
            labels = _labels(logits, labels)
            if labels.shape != logits.shape[:2]:
                raise InputError(
                    f"labels are integers of shape {tuple(logits.shape[:2])}, one per token, got shape "
                    f"{tuple(labels.shape)}"
                )
            shifted = (logits[:, :-1], labels[:, 1:]) if self.causal else (logits, labels)
            loss = mean_cross_entropy(*shifted)
        return Output.of(loss=loss, logits=logits, last_hidden_state=hidden)


def head(config: Config, task: str, num_labels: int) -> nn.Module:
    """The head of a task."""
    config.check_task(task)
    if task in ("classification", "token_classification") and num_labels < 1:
        raise InputError(f"num_labels is at least 1, got {num_labels}")
    if task == "classification":
        return Classification(config, num_labels)
    if task == "token_classification":
        return TokenClassification(config, num_labels)
    if task == "question_answering":
        if num_labels != 2:
            raise InputError(
                f"question_answering has two outputs for each token, the start and the end of an answer, got "
                f"num_labels={num_labels}; leave it out"
            )
        return QuestionAnswering(config)
    return Features(config) if task == "features" else LanguageModel(config)


def problem_of(labels: Tensor, num_labels: int) -> str:
    """Which loss a classification head computes of labels, in the words of transformers' `problem_type`."""
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def note_problem(model: Any, labels: Tensor) -> None:
    """Keep on a model for classification what its labels are; compiled code leaves it."""
    if model.task == "classification" and not torch.compiler.is_compiling():
        model.problem_type = problem_of(labels, model.num_labels)


def known_problem(model: Any) -> str | None:
    """What the labels of a model for classification are, where that is known of the head that acts."""
    if model.task != "classification":
        return None
    if model.num_labels == 1:
        return "regression"
    return None if model.problem_type == "regression" else cast("str | None", model.problem_type)


def labels_of(head: nn.Module, otherwise: int) -> int:
    """How many labels the acting head has, the model's own or an adapter's; `otherwise` for a head without labels."""
    return head.out.outputs_now() if isinstance(head, Classification | TokenClassification) else otherwise


def transformed(x: Tensor, dense: Linear | None, activation: Callable[[Tensor], Tensor], norm: Norm | None) -> Tensor:
    """norm(activation(dense(x))), without the parts that are None."""
    x = x if dense is None else activation(dense(x))
    return x if norm is None else cast(Tensor, norm(x))


def pool(hidden: Tensor, valid: Tensor | None, how: str) -> Tensor:
    """[batch, n, dim] -> [batch, dim]: the first position, the mean over tokens, or the last token; never padding."""
    if how == "first":
        return hidden[:, 0].clone()  # a view would keep all positions for the backward pass
    if valid is None:
        return hidden.mean(dim=1) if how == "mean" else hidden[:, -1]
    if how == "mean":
        # a sum over thousands of positions overflows in float16
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = (hidden * valid.unsqueeze(-1)).sum(dim=1, dtype=exact)
        return (total / valid.sum(dim=1, keepdim=True).clamp(min=1)).to(hidden.dtype)
    return hidden[torch.arange(len(hidden), device=hidden.device), _last(valid)]


def _last(valid: Tensor) -> Tensor:
    """The last token of each example, [batch]."""
    return (valid * torch.arange(valid.shape[1], device=valid.device)).argmax(dim=1)


def _activation(config: Config) -> Callable[[Tensor], Tensor]:
    return torch.tanh if config.head_activation == "tanh" else ACTIVATIONS[config.head_activation]


def mean_cross_entropy(logits: Tensor, labels: Tensor, hint: str = "; check num_labels") -> Tensor:
    """Mean over the labels that count; 0 when none does. hint: of the error for a label out of range."""
    labels = _labels(logits, labels)
    if labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        raise InputError(
            f"labels are integers of shape {tuple(logits.shape[:-1])}, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    classes = logits.shape[-1]
    accepted = f"[0, {classes}) or {IGNORED}"
    labels = within(labels, classes - 1, "labels", accepted, hint, ignored=IGNORED)
    total = F.cross_entropy(_exact(logits).flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def _labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Labels as int64 or floats: compared in their own dtype, 156 in uint8 would be -100."""
    check_tensors(labels=labels)
    if labels.device != logits.device or not (labels.is_floating_point() or labels.dtype in LABEL_DTYPES):
        raise InputError(
            f"labels are integers (of at most 64 bits, with a sign or uint8) or floats on {logits.device}, where the "
            f"model is, got {labels.dtype} on {labels.device}"
        )
    return labels if labels.is_floating_point() else labels.long()


def _check_numbers(labels: Tensor, low: float, high: float) -> Tensor:
    """Refuse labels that are NaN, infinite or beyond what the loss is defined for."""
    if not labels.is_floating_point():
        return labels
    wanted = "finite numbers" if high == math.inf else f"in [{low}, {high}], the share to which each of several holds"
    fine = labels.isfinite() & (labels >= low) & (labels <= high)
    if at_hand(labels) and len(wrong := labels[~fine]):
        raise InputError(f"labels are {wanted}, got {wrong[0].item()} ({len(wrong)} of {labels.numel()} do not fit)")
    return known(labels, fine.all(), f"labels are {wanted}, and some are not")


def _exact(x: Tensor) -> Tensor:
    """Losses are computed in float32, or in float64 when that is given."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
