"""Ladder side-tuning: a narrow network reads the states of a frozen one, without gradients in it (Sung et al. 2022)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from effzoo.annotations import Count
from effzoo.errors import OptionError
from effzoo.peft.function.ladder_start import slice_blocks
from effzoo.peft.method import Method
from effzoo.registry import peft
from effzoo.sites import Branch, PeftModule, Side, SideNetwork, Site, sites

TEMPERATURE = 0.1


class Ladder(SideNetwork):
    """h <- block_i(mu_i h + (1 - mu_i) D_i s_i) for every block of the side network; the output is s_L + U norm(h).

    s_i are the backbone's states, mu_i = sigmoid(alpha_i / T) with T = 0.1. Without `skip` the output is U norm(h)
    alone.
    """

    def __init__(self, site: Side, reduction: int, every: int, skip: bool, backbone: Sequence[nn.Module] | None):
        super().__init__()
        self.places = list(range(every - 1, site.depth, every))
        self.blocks, dim = site.narrow(reduction, self.places)
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
        if backbone is not None:
            self.prune(backbone)

    @torch.no_grad()
    def prune(self, backbone: Sequence[nn.Module]) -> None:
        """Start as a slice of the backbone: its most important channels, which the projections of the states pick."""
        kept = slice_blocks(list(self.blocks), backbone, self.places).to(self.first.weight.device)
        width = next(site.dim for _, site in sites(backbone[0]) if isinstance(site, Branch))
        streams = self.first.in_features // width  # two in a reversible backbone: their mean
        channels = torch.arange(len(kept), device=kept.device)
        for linear in (self.first, *self.downs):
            weight = cast(nn.Linear, linear).weight.zero_()
            for stream in range(streams):
                weight[channels, stream * width + kept] = 1 / streams

    def forward(self, states: Sequence[Tensor], mask: Any) -> Tensor:
        # discrete choices are kept by layer, and these are other layers
        mask = dataclasses.replace(mask, decisions=None)
        h: Tensor = self.first(states[0])
        gates = torch.sigmoid(self.alpha / TEMPERATURE)
        for place, gate, down, block in zip(self.places, gates, self.downs, self.blocks, strict=True):
            h = block(gate * h + (1 - gate) * down(states[place + 1]), mask)
        out: Tensor = self.up(self.norm(h))
        return states[-1] + out if self.skip else out


@peft.register("ladder", "lst", "ladder_side_tuning")
class LadderSideTuning(Method):
    """h <- block_i(mu_i h + (1 - mu_i) D_i s_i): narrow blocks read the states s_i of the frozen model; output s_L + U
    h.

    reduction: how many times narrower the side network is.
    every: a side block for each so many blocks (the paper drops a quarter of them).
    skip: add the result to the backbone's last state, from 0 on, so that attaching changes nothing and little data is
        enough; `false` is the paper's form, in which the side network alone makes the output.
    init: "random"; "pruned", the side blocks start as slices of the backbone's blocks, of the channels whose weights
        have the largest squares (section 3.3; the paper ranks them by Fisher information, too), and the projections of
        the states start by picking just these channels (the paper: at random).

    Nothing of the backbone is stored for the backward pass: memory is that of the narrow blocks and one state per
    block. In a union with a method inside the backbone (`ladder|lora`) both are trained, and the backbone is stored as
    for that method. There is no cache for decoding. Models without a `side` site refuse it (the Perceiver, whose blocks
    are not one sequence).
    """

    paper = (
        "Sung et al. 2022, LST: Ladder side-tuning for parameter and memory efficient transfer learning, "
        "arXiv:2206.06522, section 3"
    )
    accepts = (Side,)
    default_targets = ("side",)
    learning_rate = 1e-3

    def __init__(
        self, *, reduction: Count = 8, every: Count = 1, skip: bool = True, init: Literal["random", "pruned"] = "pruned"
    ):
        super().__init__()
        self.reduction, self.every, self.skip, self.init, self.identity_at_init = reduction, every, skip, init, skip

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        self.backbone = list(cast(nn.ModuleList, model.get_submodule("blocks"))) if self.init == "pruned" else None

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Side)
        if self.every > site.depth:
            raise OptionError(
                f"ladder: every={self.every} leaves no side block for {site.depth} blocks; give at most {site.depth}"
            )
        backbone, self.backbone = self.backbone, None  # read once, and not kept
        return Ladder(site, self.reduction, self.every, self.skip, backbone)
