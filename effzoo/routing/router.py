"""The contract of a router: which experts see a token, and how much each counts.

A router takes tokens [tokens, dim], or the number of the task of each [tokens], and gives a Routing. What a token is, is up to who asks: a position of
a text, or an example in the mean over its positions. Options are keyword-only parameters of the constructor, as everywhere.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.errors import OptionError


@dataclass(frozen=True)
class Routing:
    """Where tokens go. With y_i(x) what expert i makes of a token, the token becomes sum_i weights_i y_i(x).

    weights [tokens, experts]: 0 where a token is not sent. sent bool[tokens, experts]. probabilities [tokens, experts]: what the router thinks
    before it chooses, rows that add up to 1 where they are probabilities. loss: what balances the experts, weighted; None when nothing does.
    """

    weights: Tensor
    sent: Tensor
    probabilities: Tensor
    loss: Tensor | None = None

    @property
    def dropped(self) -> Tensor:
        """The number of tokens that no expert has taken."""
        return (~self.sent.any(dim=-1)).sum()


class Router(nn.Module, abc.ABC):
    """One way to choose experts.

    reads: "tokens" or "tasks". dense: whether every expert sees every token. alone: whether the choice for a token depends, in evaluation mode, on no
    other token, as a causal model needs. balanced: whether there is a loss, or a rule, that spreads tokens over experts.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    reads: ClassVar[str] = "tokens"
    dense: bool = False
    alone: ClassVar[bool] = True
    weighted: bool = False  # whether a loss is added in training

    def __init__(self, dim: int, experts: int):
        super().__init__()
        if experts < 1:
            raise OptionError(f"{self.name}: a router chooses among at least one expert, got {experts}")
        self.dim, self.experts = dim, experts

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Routing:
        """Tokens [tokens, dim] (or tasks, integers [tokens]) -> where they go."""

    def one_hot(self, chosen: Tensor) -> Tensor:
        """bool[tokens, experts] of the experts chosen [tokens]."""
        return F.one_hot(chosen, self.experts).bool()


class Scores(nn.Module):
    """x W^T, a score of every expert for every token, [tokens, dim] -> [tokens, experts], in float32 or better.

    In half precision the exponentials of near scores would round to each other (Fedus et al. 2021, arXiv:2101.03961, section 2.4).
    """

    def __init__(self, dim: int, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            exact = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
            return F.linear(x.to(exact), self.weight.to(exact))


def positive(name: str, **values: float) -> None:
    """OptionError for options that are not above 0."""
    for option, value in values.items():
        if value <= 0:
            raise OptionError(f"{name}: {option} is above 0, got {value}")


def not_negative(name: str, **values: float) -> None:
    """OptionError for options below 0."""
    for option, value in values.items():
        if value < 0:
            raise OptionError(f"{name}: {option} is 0 or more, got {value}")
