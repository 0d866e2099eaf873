"""The numbers and names that make a transformer; what `models/*.toml` hold and `build` overrides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from effzoo.blocks.feedforward import ACTIVATIONS
from effzoo.errors import IncompatibleError, OptionError

TASKS = ("features", "classification", "token_classification", "masked_lm", "causal_lm")


@dataclass(frozen=True)
class Config:
    """Sizes and slots of one transformer.

    mlp: inner width of the feed-forward. max_length: positions, prompts included. position_offset: first position id
    (RoBERTa counts from pad_token + 1; padding then keeps the id pad_token). types: rows of the token-type table, 0 for none.
    attention: a spec, or one per layer. pooling, head_dense: how a classification head reads the sequence (the first token, the mean, or
    the last token; through a dense tanh layer or directly). pooler: a features model ends in a dense tanh layer
    on the first token. lm_transform: dense, activation and norm before the tied language-model head.
    """

    name: str
    architecture: Literal["encoder", "decoder"]
    layout: str
    vocab: int
    dim: int
    layers: int
    heads: int
    mlp: int
    max_length: int
    attention: str | dict[str, Any] | tuple[Any, ...] = "full"
    norm: Literal["pre", "post"] = "post"
    eps: float = 1e-12
    activation: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    types: int = 0
    position_offset: int = 0
    pad_token: int | None = None
    pooling: Literal["first", "mean", "last"] = "first"
    head_dense: bool = True
    head_bias: bool = True
    pooler: bool = True
    lm_transform: bool = True
    backend: str = "auto"
    paper: str = ""
    hub: str = ""
    package: str = ""

    def __post_init__(self) -> None:
        for size in ("vocab", "dim", "layers", "heads", "mlp", "max_length"):
            if getattr(self, size) < 1:
                raise OptionError(f"{size} is at least 1, got {getattr(self, size)}")
        if self.dim % self.heads:
            raise OptionError(f"dim {self.dim} does not divide into {self.heads} heads; try heads={_nearest_divisor(self.dim, self.heads)}")
        for probability in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, probability) < 1:
                raise OptionError(f"{probability} is in [0, 1), got {getattr(self, probability)}")
        choices = {
            "architecture": ("encoder", "decoder"),
            "norm": ("pre", "post"),
            "pooling": ("first", "mean", "last"),
            "activation": tuple(ACTIVATIONS),
        }
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise OptionError(f"{key} is one of {', '.join(known)}, got {getattr(self, key)!r}")

    @property
    def causal(self) -> bool:
        return self.architecture == "decoder"

    def check_task(self, task: str) -> None:
        """Refuse a task that this architecture has no head for."""
        if task not in TASKS:
            raise OptionError(f"task is one of {', '.join(TASKS)}, got {task!r}")
        if task == ("masked_lm" if self.causal else "causal_lm"):
            other = "causal_lm" if self.causal else "masked_lm"
            raise IncompatibleError(
                f"{self.name} is a{'n' * (not self.causal)} {self.architecture}, so task={task!r} makes no sense; try task={other!r}"
            )


def _nearest_divisor(dim: int, heads: int) -> int:
    return min((h for h in range(1, dim + 1) if dim % h == 0), key=lambda h: abs(h - heads))
