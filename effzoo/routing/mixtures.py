"""Every expert sees every token (`uniform`, `soft`), or those that a learned hard choice turns on (`gumbel`)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from effzoo.annotations import Positive
from effzoo.registry import router
from effzoo.routing.router import Router, Routing, Scores, one_hot


@router.register("uniform")
class Uniform(Router):
    """weights 1 / experts: the mean of all experts, nothing to learn."""

    dense = True

    def forward(self, x: Tensor) -> Routing:
        weights = x.new_full(
            (len(x), self.experts), 1 / self.experts, dtype=torch.promote_types(x.dtype, torch.float32)
        )
        return Routing(weights, torch.ones_like(weights, dtype=torch.bool), weights)


@router.register("soft")
class Soft(Router):
    """weights softmax(x W^T / temperature): a mixture of all experts.

    temperature: below 1 sharpens.
    """

    paper = "Jacobs et al. 1991, Adaptive mixtures of local experts, equation 1"
    dense = True

    def __init__(self, dim: int, experts: int, *, temperature: Positive = 1.0):
        super().__init__(dim, experts)
        self.temperature, self.scores = temperature, Scores(dim, experts)

    def forward(self, x: Tensor) -> Routing:
        weights = (self.scores(x) / self.temperature).softmax(dim=-1)
        return Routing(weights, torch.ones_like(weights, dtype=torch.bool), weights)


@router.register("gumbel")
class Gumbel(Router):
    """weights choice + p - stop(p): a hard choice in the forward pass, the gradient that of its relaxation p.

    form: "softmax", one expert, p = softmax((s + g) / temperature) with Gumbel noise g, the largest p is taken (Jang et
        al. 2017, arXiv:1611.01144, sections 2.1 and 2.2); "sigmoid", each expert on or off by itself, p_i =
        sigmoid((s_i + l) / temperature) with logistic noise l (Maddison et al. 2017, arXiv:1611.00712, appendix B), on
        above 1/2. Those that are on share the token equally; where none is, the likeliest is.
    temperature: of the relaxation.

    There is no noise in evaluation mode.
    """

    paper = "Jang et al. 2017, Categorical reparameterization with Gumbel-softmax, arXiv:1611.01144, section 2.2"
    straight_through = True

    def __init__(
        self, dim: int, experts: int, *, form: Literal["softmax", "sigmoid"] = "softmax", temperature: Positive = 1.0
    ):
        super().__init__(dim, experts)
        self.form, self.temperature, self.scores = form, temperature, Scores(dim, experts)

    def forward(self, x: Tensor) -> Routing:
        return hard(self.scores(x), self.form, self.temperature, self.training)


def hard(scores: Tensor, form: str, temperature: float, noisy: bool) -> Routing:
    """The hard choice of scores [tokens, experts] with the gradient of its relaxation, as `Gumbel` describes it."""
    tiny = torch.finfo(scores.dtype).tiny
    if form == "softmax":
        noise = -torch.empty_like(scores).exponential_().clamp(min=tiny).log() if noisy else 0.0
        p = ((scores + noise) / temperature).softmax(dim=-1)
        sent = one_hot(p.argmax(dim=-1), p.shape[-1])
    else:
        drawn = torch.rand_like(scores).clamp(tiny, 1 - torch.finfo(scores.dtype).eps) if noisy else None
        noise = 0.0 if drawn is None else drawn.log() - (-drawn).log1p()
        p = ((scores + noise) / temperature).sigmoid()
        sent = (p > 0.5) | one_hot(p.argmax(dim=-1), p.shape[-1])
    share = sent.to(p) / sent.sum(dim=-1, keepdim=True)
    relaxed = p / p.sum(dim=-1, keepdim=True)
    # in this order the forward pass has the choice to the bit
    return Routing(share + (relaxed - relaxed.detach()), sent, relaxed)
