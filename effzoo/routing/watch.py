"""How experts are used, as a time series: shares, entropy, dropped tokens, and whether the router has collapsed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from effzoo.routing.router import Router, Routing
from effzoo.wrappers import unwrap

_UNUSED = 0.1  # of an equal share


@dataclass(frozen=True)
class Usage:
    """What one router did with the tokens of one pass.

    router: its path in the model.
    tokens: how many.
    share: of the weight, that each expert carries; adds up to 1.
    entropy: of the share, divided by log(experts): 1 where all carry the same, 0 where one carries all.
    certainty: 1 less the mean entropy of a token's probabilities, likewise divided.
    dropped: share of tokens that no expert took.
    """

    router: str
    tokens: int
    share: tuple[float, ...]
    entropy: float
    certainty: float
    dropped: float

    @property
    def unused(self) -> int:
        """Experts with less than a tenth of an equal share."""
        return sum(value < _UNUSED / len(self.share) for value in self.share)

    @property
    def collapsed(self) -> bool:
        """Whether at least half of the experts are as good as unused."""
        return 2 * self.unused >= len(self.share) > 1


@dataclass
class Watch:
    """Every pass of every router, in order."""

    passes: list[Usage] = field(default_factory=list)

    def of(self, router: str) -> list[Usage]:
        """The time series of one router."""
        return [usage for usage in self.passes if usage.router == router]

    @property
    def routers(self) -> list[str]:
        """The paths of the routers seen."""
        return list(dict.fromkeys(usage.router for usage in self.passes))


def usage(routing: Routing, router: str = "") -> Usage:
    """What a routing says of its experts."""
    weights, experts = routing.weights.detach().double(), routing.weights.shape[-1]
    carried = weights.sum(dim=0)
    share = carried / carried.sum() if float(carried.sum()) > 0 else torch.zeros_like(carried)
    p = routing.probabilities.detach().double()
    scale = math.log(experts) if experts > 1 else 1.0
    tokens = len(weights)
    return Usage(
        router, tokens, tuple(share.tolist()), entropy=float(_entropy(share)) / scale,
        certainty=1 - float(_entropy(p).mean()) / scale, dropped=float(routing.dropped) / max(1, tokens),
    )  # fmt: skip


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(dim=-1)


@contextmanager
def watch(model: nn.Module) -> Iterator[Watch]:
    """Record the usage of every router of a model while the `with` block lasts.

    Left out are passes without tokens, and those in which the backward pass computes something again (gradient
    checkpointing).
    """
    recorded = Watch()
    hooks = []
    for path, module in unwrap(model).named_modules():
        if isinstance(module, Router):

            def record(_: nn.Module, __: tuple[Tensor, ...], routing: Routing, path: str = path) -> None:
                if len(routing.weights) and torch._C._current_graph_task_id() < 0:
                    recorded.passes.append(usage(routing, path))

            hooks.append(module.register_forward_hook(record))
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()
