"""The contract of a router: which experts see a token, and with which weight.

A router takes tokens [tokens, dim], or the number of the task of each [tokens], and gives a Routing. What a token is,
is up to who asks: a position of a text, or an example in the mean over its positions. Options are keyword-only
parameters of the constructor, as everywhere.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.devices import without_autocast
from effzoo.errors import OptionError


@dataclass(frozen=True)
class Shares:
    """What a router adds to a loss over several layers: weight N sum_i f_i P_i.

    sent [experts]: how many tokens each expert got; without gradient.
    probabilities [experts]: the sum over tokens of the probability of each.
    tokens: how many there are.
    """

    sent: Tensor
    probabilities: Tensor
    tokens: int
    weight: float


def joint_loss(shares: Sequence[Shares]) -> Tensor:
    """weight N sum_i f_i P_i over the tokens of all routers together: f_i = sum sent_i / sum tokens, P_i likewise.

    Fedus et al. 2021, arXiv:2101.03961, equation 4, with every layer's choice of a token as one of its tokens, as
    transformers has it for Mixtral.
    """
    tokens = sum(of.tokens for of in shares)
    sent = torch.stack([of.sent for of in shares]).sum(dim=0) / tokens
    probabilities = torch.stack([of.probabilities for of in shares]).sum(dim=0) / tokens
    return shares[0].weight * len(sent) * (sent.detach() * probabilities).sum()


@dataclass(frozen=True)
class Routing:
    """Where tokens go. With y_i(x) what expert i makes of a token, the token becomes sum_i weights_i y_i(x).

    weights: [tokens, experts], 0 where a token is not sent.
    sent: bool[tokens, experts].
    probabilities: [tokens, experts], of the router before it chooses; those of a token add up to 1 where they are
        probabilities.
    loss: what balances the experts, weighted; None when nothing does.
    shares: what this router adds to a loss over all layers; None without one.
    """

    weights: Tensor
    sent: Tensor
    probabilities: Tensor
    loss: Tensor | None = None
    shares: Shares | None = None

    @property
    def alone(self) -> Tensor | None:
        """The losses of this router by itself."""
        return self.loss if self.shares is None or self.loss is None else self.loss + joint_loss([self.shares])

    @property
    def dropped(self) -> Tensor:
        """The number of tokens that no expert has taken."""
        return (~self.sent.any(dim=-1)).sum()


@dataclass(frozen=True)
class TokensOverRanks:
    """Tokens of which this rank has some and others the rest.

    count: of all ranks.
    summed: the sum of a tensor over the ranks, with its gradient.
    places: bool[tokens, experts] of what this rank's tokens choose -> the how manieth of its expert each is, among the
        tokens of all ranks in the order of the whole batch.
    """

    count: int
    summed: Callable[[Tensor], Tensor]
    places: Callable[[Tensor], Tensor]


_over_ranks: ContextVar[TokensOverRanks | None] = ContextVar("_over_ranks", default=None)


@contextmanager
def over_ranks(tokens: TokensOverRanks | None) -> Iterator[None]:
    """Inside, routers balance over the tokens of all ranks; None: the tokens are all here."""
    before = _over_ranks.set(tokens)
    try:
        yield
    finally:
        _over_ranks.reset(before)


def count(x: Tensor) -> int:
    """The number of tokens of x [tokens, ...], with those of other ranks."""
    tokens = _over_ranks.get()
    return len(x) if tokens is None else tokens.count


def summed(x: Tensor) -> Tensor:
    """The sum over the tokens of x [tokens, ...], with those of other ranks."""
    tokens, total = _over_ranks.get(), x.sum(dim=0)
    return total if tokens is None else tokens.summed(total)


def order_of(chosen: Tensor) -> Tensor:
    """The how manieth of its expert each token is, int[tokens, experts], where bool[tokens, experts] chooses it."""
    tokens = _over_ranks.get()
    return chosen.long().cumsum(dim=0) if tokens is None else tokens.places(chosen)


class Router(nn.Module, abc.ABC):
    """One way to choose experts.

    reads: "tokens" or "tasks".
    dense: whether every expert sees every token.
    alone: whether the choice for a token depends, in evaluation mode, on no other token, as a causal model needs.
    straight_through: whether weights that are 0 have a gradient, so that every expert must compute every token in
        training.
    weighted: whether a loss is added in training.
    of_factors: whether `forward` is also given A and B of each expert, which are LoRA.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    reads: ClassVar[str] = "tokens"
    dense: bool = False
    alone: ClassVar[bool] = True
    of_factors: ClassVar[bool] = False
    straight_through: bool = False
    weighted: bool = False

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
        return one_hot(chosen, self.experts)


class Scores(nn.Module):
    """x W^T, a score of every expert for every token, [tokens, dim] -> [tokens, experts], in float32 or better.

    In half precision the exponentials of near scores would round to each other (Fedus et al. 2021, arXiv:2101.03961,
    section 2.4).
    """

    def __init__(self, dim: int, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            exact = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
            return F.linear(x.to(exact), self.weight.to(exact))


def one_hot(chosen: Tensor, experts: int) -> Tensor:
    """bool[tokens, experts] of integers [tokens]."""
    return chosen[:, None] == torch.arange(experts, device=chosen.device)


def places(capacity: float, tokens: int, experts: int) -> int:
    """How many tokens an expert takes at most: capacity times an equal share, rounded up.

    A billionth is taken off first: 1.1 * 50 / 5 = 11.000000000000002 is 11.
    """
    return math.ceil(capacity * tokens / experts - 1e-9)
