"""Mixture of experts: several feed-forwards, among which a router chooses for each token.

    y(x) = sum_i w_i(x) E_i(x),   over the experts that the router sends x to

Shazeer et al. 2017, arXiv:1701.06538, section 2; in transformers: Lepikhin et al. 2020, GShard, arXiv:2006.16668,
section 2.2, and Fedus et al. 2021, Switch transformers, arXiv:2101.03961, section 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from effzoo.attention.core import Mask
from effzoo.blocks.feedforward import FeedForward
from effzoo.errors import IncompatibleError
from effzoo.recompute import made_again
from effzoo.routing import Router, Routing, create, over_ranks
from effzoo.routing.router import Shares, joint_loss

_collected: ContextVar[list[Tensor | Shares] | None] = ContextVar("_collected", default=None)


class Experts(nn.Module):
    """sum_i w_i(x) E_i(x), [batch, n, dim] -> [batch, n, dim]; 0 for tokens that the router drops, and for padding.

    experts: feed-forwards with the same roles, so that adapters hang on all of them.
    router: a spec of `effzoo.routing`; its parameters belong to the base.
    causal: refuse routers that look at later tokens.

    Tokens are sorted by expert, and each expert computes its own at once. It computes all tokens while a
    straight-through router learns, as its gradient depends on every expert. An expert without tokens is called while
    gradients are recorded, so that its gradients are 0 in every process.

    Raises IncompatibleError for routers by task, and for those that a causal model cannot have.
    """

    def __init__(self, experts: Sequence[FeedForward], dim: int, router: str, *, causal: bool):
        super().__init__()
        self.router: Router = create(router, dim, len(experts))
        if self.router.reads != "tokens":
            raise IncompatibleError(
                f"router {self.router.name!r} reads the number of a task, and the experts of a feed-forward are "
                "chosen for tokens; use 'switch' or "
                f"'top_k', or route adapters by task (peft=\"routed[router='{self.router.name}', ...]\")"
            )
        if self.router.of_factors:
            raise IncompatibleError(
                f"router {self.router.name!r} reads A and B of LoRA experts, and these are feed-forwards; use 'switch' "
                f"or 'top_k', or route adapters (peft=\"routed[router='{self.router.name}']\")"
            )
        if causal and not self.router.alone:
            raise IncompatibleError(
                f"router {self.router.name!r} chooses among all tokens, later ones as well, so a causal model would "
                "see what it is to predict; use "
                "'switch', 'top_k' or 'base'"
            )
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor, valid: Tensor | None = None, mask: Mask | None = None) -> Tensor:
        """x [batch, n, dim] -> [batch, n, dim].

        valid bool[batch, n]: True at tokens; None without padding.
        mask: stores the routing for when the block is computed again.
        """
        flat = rearrange(x, "b n d -> (b n) d")
        here = None if valid is None else valid.reshape(-1).nonzero()[:, 0]
        with over_ranks(None if mask is None else mask.tokens):
            routing = self._as_before(self.router(flat if here is None else flat[here]), mask)
        expert, token, counts = self._sent(routing)
        at = token if here is None else here[token]
        with made_again():
            parts = torch.split(flat.index_select(0, at), counts)
        outs = [
            module(part[None])[0]
            for module, part in zip(self.experts, parts, strict=True)
            if len(part) or torch.is_grad_enabled()
        ]
        if routing.loss is not None and (losses := _collected.get()) is not None:
            losses.append(routing.loss)
            if routing.shares is not None:
                losses.append(routing.shares)
        if not outs:
            return torch.zeros_like(x)
        y = torch.cat(outs)
        y = y * routing.weights[token, expert].to(y.dtype)[:, None]
        return y.new_zeros(flat.shape).index_add(0, at, y).view(x.shape)

    def dense(self, x: Tensor) -> Tensor:
        """The definition, for x [batch, n, dim] without padding: every expert computes every token."""
        weights = rearrange(self.router(rearrange(x, "b n d -> (b n) d")).weights, "(b n) e -> e b n 1", b=len(x))
        return torch.stack([weight * expert(x) for weight, expert in zip(weights, self.experts, strict=True)]).sum(
            dim=0
        )

    @property
    def positionwise(self) -> bool:
        """Whether the output at a position, and the loss, depend on that position alone."""
        # in training, tokens compete for room, and losses are means
        independent = not self.training or (self.router.dense and not self.router.weighted)
        return self.router.alone and independent

    def _sent(self, routing: Routing) -> tuple[Tensor, Tensor, list[int]]:
        """Expert and token of every routed pair, sorted by expert, and the number of tokens of each expert."""
        tokens, experts = routing.sent.shape
        if self.router.dense or (self.router.straight_through and routing.weights.requires_grad):
            every = torch.arange(experts, device=routing.sent.device), torch.arange(tokens, device=routing.sent.device)
            return every[0].repeat_interleave(tokens), every[1].repeat(experts), [tokens] * experts
        if _without_values(routing.sent):
            raise IncompatibleError(
                f"how many tokens each expert gets depends on the values that router {self.router.name!r} scores, "
                "and here a model runs on shapes "
                "alone; run it for real, or use a router for which every expert sees every token ('soft', 'uniform')"
            )
        expert, token = routing.sent.t().nonzero(as_tuple=True)
        return expert, token, cast("list[int]", routing.sent.sum(dim=0).tolist())

    def _as_before(self, routing: Routing, mask: Mask | None) -> Routing:
        """The routing, with the choices of the first time where the batch is computed again (reversible, checkpoints).

        A reconstructed input is rounded, so the second choice could differ. Such a token has the weights of the first
        time, without gradient to its scores.
        """
        if mask is None or mask.decisions is None:
            return routing
        sent, weights = mask.decide(self, lambda: (routing.sent, routing.weights.detach()))
        same = (sent == routing.sent).all(dim=-1, keepdim=True)
        return dataclasses.replace(routing, sent=sent, weights=torch.where(same, routing.weights, weights))


def total(losses: Sequence[Tensor | Shares]) -> list[Tensor]:
    """The losses that `balancing` has collected: those of single routers, and the one of all layers."""
    shares = [loss for loss in losses if isinstance(loss, Shares)]
    return [loss for loss in losses if isinstance(loss, Tensor)] + ([joint_loss(shares)] if shares else [])


@contextmanager
def balancing(losses: list[Tensor | Shares]) -> Iterator[None]:
    """Inside, the losses of routers are appended to a list, and what they add to one of all layers; outside, when a
    backward pass recomputes, they are not."""
    token = _collected.set(losses)
    try:
        yield
    finally:
        _collected.reset(token)


def _without_values(x: Tensor) -> bool:
    return x.is_meta or isinstance(x, torch._subclasses.FakeTensor)
