"""Balance by rule instead of by loss: experts choose tokens, or tokens are assigned in equal shares."""

from __future__ import annotations

import torch
from torch import Tensor

from effzoo.annotations import Positive
from effzoo.registry import router
from effzoo.routing.assignment import assign
from effzoo.routing.router import Router, Routing, Scores, places


@router.register("expert_choice")
class ExpertChoice(Router):
    """Each expert takes the ceil(capacity tokens / experts) tokens with the largest p = softmax(x W^T) for it, with
    weight p.

    capacity: how many experts a token has in the mean; it may have several, or none.

    What an expert takes depends on all tokens, later ones as well, so a causal model refuses it.
    """

    paper = "Zhou et al. 2022, Mixture-of-experts with expert choice routing, arXiv:2202.09368, section 3.2"
    alone = False

    def __init__(self, dim: int, experts: int, *, capacity: Positive = 2.0):
        super().__init__(dim, experts)
        self.capacity, self.scores = capacity, Scores(dim, experts)

    def forward(self, x: Tensor) -> Routing:
        p = self.scores(x).softmax(dim=-1)
        count = min(len(x), places(self.capacity, len(x), self.experts))
        taken = p.topk(count, dim=0).indices
        sent = torch.zeros_like(p, dtype=torch.bool).scatter(0, taken, True)
        return Routing(p * sent, sent, p)


@router.register("base")
class Base(Router):
    """One expert per token, as many tokens per expert, so that the sum of w_i^T x is largest; weight sigmoid(w_i^T x).

    In evaluation mode every token goes to its best expert: nothing else has to be learned for balance (section 3.1).
    Where the tokens do not divide by the experts, the first experts take one more.
    """

    paper = "Lewis et al. 2021, BASE layers, arXiv:2103.16716, section 3"

    def __init__(self, dim: int, experts: int):
        super().__init__(dim, experts)
        self.scores = Scores(dim, experts)

    def forward(self, x: Tensor) -> Routing:
        scores = self.scores(x)
        chosen = assign(scores.detach()) if self.training and len(x) else scores.argmax(dim=-1)
        sent = self.one_hot(chosen)
        return Routing(scores.sigmoid() * sent, sent, scores.softmax(dim=-1))
