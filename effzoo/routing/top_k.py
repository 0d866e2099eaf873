"""Sparse routing by scores: the best k experts of each token, or the best one with a capacity."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from effzoo.annotations import Count, NotNegative, Positive
from effzoo.errors import OptionError
from effzoo.registry import router
from effzoo.routing.losses import importance_loss, load_loss, switch_loss, z_loss
from effzoo.routing.router import Router, Routing, Scores, Shares, count, order_of, places, summed


@router.register("top_k")
class TopK(Router):
    """weights softmax over the k largest of h = x W^T + N(0, 1) softplus(x W_n^T), 0 elsewhere; noise in training
    alone.

    Without noise it is the router of Mixtral (Jiang et al. 2024, arXiv:2401.04088, section 2.1), and of Qwen3.

    k: experts of a token. With k=1 its weight is 1 whatever the scores are, so that neither the task's loss nor the
        importance reaches them: they learn from the load loss alone. `switch` weighs its one expert by p, and learns
        from the task.
    noise: whether there is W_n.
    importance, load: weights of the losses that balance the experts, in training; the load of an expert is only smooth
        with noise.
    normalise: False: the weights are those of the softmax over all experts, and add up to less than 1.
    balance: weight of N sum_i f_i P_i, where f_i, the tokens sent to i per token, and P_i, the mean probability of i,
        are over all layers of experts together, as transformers has it; over each router apart in `routed` adapters.

    Both matrices start at 0 in the paper; here W is drawn, so that experts differ from the first step.
    """

    paper = "Shazeer et al. 2017, Outrageously large neural networks, arXiv:1701.06538, equations 3 to 5"

    def __init__(
        self,
        dim: int,
        experts: int,
        *,
        k: Count = 2,
        noise: bool = True,
        importance: NotNegative = 0.1,
        load: NotNegative = 0.1,
        normalise: bool = True,
        balance: NotNegative = 0.0,
    ):
        super().__init__(dim, experts)
        if not 1 <= k <= experts:
            raise OptionError(f"{self.name}: k is between 1 and the number of experts, {experts}, got {k}")
        if k == 1 < experts and normalise and not (balance > 0 or (load > 0 and noise)):
            raise OptionError(
                f"{self.name}: with k=1 the weight of the chosen expert is always 1, so only the load loss teaches the "
                "scores; give load above 0 with noise, balance above 0, or router='switch', whose weight is the "
                "expert's probability"
            )
        self.k, self.importance, self.load = k, importance, load
        self.apart, self.balance = None if normalise else True, balance or None
        self.scores, self.noise = Scores(dim, experts), Scores(dim, experts) if noise else None
        if self.noise is not None:
            torch.nn.init.zeros_(self.noise.weight)
        self.weighted = experts > 1 and (importance > 0 or balance > 0 or (load > 0 and noise and k < experts))

    def forward(self, x: Tensor) -> Routing:
        clean = self.scores(x)
        deviation = F.softplus(self.noise(x)) if self.noise is not None and self.training else None
        h = clean if deviation is None else clean + torch.randn_like(clean) * deviation
        best = h.topk(self.k, dim=-1).indices
        sent = torch.zeros_like(h, dtype=torch.bool).scatter(-1, best, True)
        weights = h.softmax(dim=-1) * sent if self.apart else h.masked_fill(~sent, float("-inf")).softmax(dim=-1)
        loss, p, shares = None, clean.softmax(dim=-1), None
        if self.training and self.weighted and count(x):
            loss = self.importance * importance_loss(weights)
            if self.balance:
                shares = Shares(summed(sent.to(p)), summed(p), count(x), self.balance)
            if deviation is not None and self.load and self.k < self.experts:
                loss = loss + self.load * load_loss(clean, h, deviation, self.k)
        return Routing(weights, sent, p, loss, shares)


@router.register("switch")
class Switch(Router):
    """The expert with the largest p = softmax(x W^T), with weight p; it takes the first ceil(capacity tokens /
    experts).

    capacity: the factor above an equal share, in training; a token that finds its expert full is dropped: no expert
        sees it, its weights are 0. In evaluation mode nothing is dropped, so that a token's result depends on no other
        token.
    balance: weight of N sum_i f_i P_i; 0 lets the router collapse.
    z: weight of the z-loss.
    """

    paper = "Fedus et al. 2021, Switch transformers, arXiv:2101.03961, section 2"

    def __init__(
        self, dim: int, experts: int, *, capacity: Positive = 1.25, balance: NotNegative = 1e-2, z: NotNegative = 0.0
    ):
        super().__init__(dim, experts)
        self.capacity, self.balance, self.z, self.scores = capacity, balance, z, Scores(dim, experts)
        self.weighted = balance > 0 or z > 0

    def forward(self, x: Tensor) -> Routing:
        scores = self.scores(x)
        p = scores.softmax(dim=-1)
        chosen = self.one_hot(p.argmax(dim=-1))
        sent = chosen
        if self.training:
            sent = chosen & (order_of(chosen) <= places(self.capacity, count(x), self.experts))
        loss = None
        if self.training and self.weighted and count(x):
            loss = self.balance * switch_loss(p, chosen) + (self.z * z_loss(scores) if self.z else 0.0)
        return Routing(p * sent, sent, p, loss)
