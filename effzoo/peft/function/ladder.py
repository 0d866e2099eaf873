"""Ladder side-tuning: a narrow network beside a frozen one, which no gradient enters (Sung et al. 2022, arXiv:2206.06522)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effzoo.errors import OptionError
from effzoo.peft.method import Method
from effzoo.registry import peft
from effzoo.sites import PeftModule, Side, Site

TEMPERATURE = 0.1


class Ladder(PeftModule):
    """h <- mu_i h + (1 - mu_i) D_i s_i, h <- block_i(h) for every block of the side network, s_i the backbone's state, mu_i = sigmoid(alpha_i / T).

    The output is s_L + U norm(h), or U norm(h) alone.
    """

    def __init__(self, site: Side, reduction: int, every: int, skip: bool):
        super().__init__()
        blocks, dim = site.narrow(reduction)
        self.places = list(range(every - 1, site.depth, every))
        self.blocks = nn.ModuleList(blocks[place] for place in self.places)
        self.first = nn.Linear(site.width, dim)
        self.downs = nn.ModuleList(nn.Linear(site.width, dim) for _ in self.places)
        self.alpha = nn.Parameter(torch.zeros(len(self.places)))
        self.norm, self.up, self.skip = nn.LayerNorm(dim), nn.Linear(dim, site.width), skip
        for linear in (self.first, *self.downs):
            nn.init.normal_(linear.weight, std=site.width**-0.5)
            nn.init.zeros_(linear.bias)
        if skip:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def beside(self, states: Sequence[Tensor], mask: Any) -> Tensor:
        mask = dataclasses.replace(mask, decisions=None)  # discrete choices are remembered by layer, and these are other layers
        h: Tensor = self.first(states[0])
        gates = torch.sigmoid(self.alpha / TEMPERATURE)
        for place, gate, down, block in zip(self.places, gates, self.downs, self.blocks, strict=True):
            h = block(gate * h + (1 - gate) * down(states[place + 1]), mask)
        out: Tensor = self.up(self.norm(h))
        return states[-1] + out if self.skip else out


@peft.register("ladder", "lst", "ladder_side_tuning")
class LadderSideTuning(Method):
    """A side network of narrow blocks with the model's own attention reads the states of the frozen one, which runs without gradients.

    reduction: how many times narrower. every: a side block beside each so many blocks (the paper drops a quarter of them). skip: add the result to
    the backbone's last state, from 0 on, so that attaching changes nothing and little data is enough; `false` is the paper's form, in which
    the side network alone makes the output and starts from a pruned copy of the backbone, here from random weights.

    Nothing of the backbone is stored for the backward pass: memory is that of the narrow blocks and one state per block.
    """

    paper = "Sung et al. 2022, LST: Ladder side-tuning for parameter and memory efficient transfer learning, arXiv:2206.06522, section 3"
    accepts = (Side,)
    default_targets = ("side",)
    zero_gradient = {"*.attn.k*.bias": "softmax does not change when one number is added to all scores of a query, so key biases have none"}
    learning_rate = 1e-3

    def __init__(self, *, reduction: int = 8, every: int = 1, skip: bool = True):
        super().__init__()
        if reduction < 1 or every < 1:
            raise OptionError(f"ladder: reduction and every are at least 1, got reduction={reduction}, every={every}")
        self.reduction, self.every, self.skip, self.identity_at_init = reduction, every, skip, skip

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Side)
        if self.every > site.depth:
            raise OptionError(f"ladder: every={self.every} leaves no side block beside {site.depth} blocks; give at most {site.depth}")
        return Ladder(site, self.reduction, self.every, self.skip)
