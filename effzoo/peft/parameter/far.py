"""FAR: training few hidden units of the feed-forward, split off from the rest (Vucetic et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.annotations import ProperShare, Share
from effzoo.peft.method import Layers, Modules, Targets
from effzoo.peft.parameter.mask_scores import count, top
from effzoo.peft.training_hooks import Stage, TrainingHooks
from effzoo.registry import peft
from effzoo.sites import Counted, HookContext, Linear, Packed, PeftModule, Positionwise, Site


class LearnerUnits(Positionwise, Packed, Counted, PeftModule):
    """y' = y + W_phi x at the learner units (of W_up and the gate), or y' = y + W_phi h[learner units] (of W_down).

    The frozen part stores no input for a weight's gradient, the learners store theirs. units int32[r]; own_weight [r,
    in] with own_bias [r], or [out, r].
    """

    def __init__(self, site: Linear, columns: bool):
        super().__init__()
        self.columns, self.size, self.full = columns, site.weight.shape[1 if columns else 0], site.weight.shape
        self.units: Tensor
        self.register_buffer("units", torch.arange(self.size, dtype=torch.int32, device=site.weight.device))
        self.delta_rank = self.size
        self.own_weight = nn.Parameter(torch.zeros_like(site.weight))
        self.own_bias = nn.Parameter(torch.zeros_like(site.bias)) if site.bias is not None and not columns else None

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        if self.columns:
            return y + F.linear(x.index_select(-1, self.units), self.own_weight)
        return y.index_add(-1, self.units, F.linear(x, self.own_weight, self.own_bias).to(y))

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        change = torch.zeros_like(weight).index_copy(
            1 if self.columns else 0, self.units.long(), self.own_weight.to(weight)
        )
        return change, None if self.own_bias is None or bias is None else torch.zeros_like(bias).index_copy(
            0, self.units.long(), self.own_bias.to(bias)
        )

    def movement(self) -> Tensor:
        """The L1 norm of each unit's change, [units]."""
        change = self.own_weight.detach().abs().sum(dim=0 if self.columns else 1)
        return change if self.own_bias is None else change + self.own_bias.detach().abs()

    def keep(self, chosen: Tensor) -> None:
        """Keep these of the learner units, by their place; the others are frozen again, at theta."""
        self.units, self.delta_rank = self.units[chosen], len(chosen)
        self.own_weight = nn.Parameter(self.own_weight.detach().index_select(1 if self.columns else 0, chosen).clone())
        if self.own_bias is not None:
            self.own_bias = nn.Parameter(self.own_bias.detach()[chosen].clone())

    def changed(self, weight: Tensor | None, bias: Tensor | None) -> int:
        """How many entries of the site merging may change: those of the learner units."""
        return self.own_weight.numel() + (0 if self.own_bias is None else self.own_bias.numel())

    def packed(self) -> dict[str, Tensor]:
        tensors = {"units": self.units, "own_weight": self.own_weight}
        return tensors if self.own_bias is None else {**tensors, "own_bias": self.own_bias}

    def unpack(self, tensors: dict[str, Tensor]) -> None:
        units = tensors["units"].to(self.units)
        r = len(units)
        shape = (self.full[0], r) if self.columns else (r, self.full[1])
        if tensors["own_weight"].shape != shape or (self.own_bias is not None and tensors["own_bias"].shape != (r,)):
            raise ValueError(
                f"{r} learner units have a weight of shape {shape}, got {tuple(tensors['own_weight'].shape)}"
            )
        if r and (int(units.min()) < 0 or int(units.max()) >= self.size):
            raise ValueError(f"units are numbers below {self.size}, got {int(units.min())} to {int(units.max())}")
        if r != len(self.units):
            # of the right shape, filled below
            self.keep(torch.arange(r, device=self.units.device) % max(1, len(self.units)))
        self.units.copy_(units)
        self.own_weight.data.copy_(tensors["own_weight"])
        if self.own_bias is not None:
            self.own_bias.data.copy_(tensors["own_bias"])


@peft.register("far", "freeze_and_reconfigure")
class FAR(TrainingHooks):
    """FFN(x) = W_down[:, f] act(W_up[f] x) + W_down[:, l] act(W_up[l] x): hidden units l are trained, f are frozen.

    keep: share of the hidden units that learn, in each feed-forward.
    prime: share of all steps in the first stage.

    Stage `prime` trains all units. Then those that have moved most, by the L1 change of all their weights (of W_up and
    the gate, their bias, and W_down), are the learners l; stage `learn` trains these on, while the others return to
    where they were. That they return is our reading: the priming run is there for the choice.

    A module holds the learners' weights as a change of theta, so gradients, optimizer state and stored inputs are as
    small, and weight decay pulls towards theta. The output bias stays frozen. Training by hand without `begin` stays in
    the first stage, with all units.
    """

    paper = "Vucetic et al. 2022, Efficient fine-tuning of BERT models on the edge, arXiv:2205.03481, section 3"
    accepts = (Linear,)
    default_targets = ("mlp.up", "mlp.gate", "mlp.down", "cross.mlp.up", "cross.mlp.gate", "cross.mlp.down")
    learning_rate = 5e-4

    def __init__(self, *, keep: Share = 0.1, prime: ProperShare = 0.1, targets: Targets = None, layers: Layers = None):
        super().__init__(targets=targets, layers=layers)
        self.keep = keep
        self.stages = (Stage("prime", prime), Stage("learn", 1 - prime))

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Linear)
        return LearnerUnits(site, columns=site.role.endswith("down"))

    def begin(self, stage: str, modules: Modules) -> None:
        if stage != "learn":
            return
        for parts in _by_layer(cast("Mapping[str, LearnerUnits]", modules)).values():
            if len(parts[0].units) == parts[0].size:
                score = torch.stack([part.movement() for part in parts]).sum(dim=0)
                chosen = top([score], count(self.keep, len(score)))
                for part in parts:
                    part.keep(chosen)


def _by_layer(modules: Mapping[str, LearnerUnits]) -> dict[str, list[LearnerUnits]]:
    """The modules of each feed-forward, by its path."""
    layers: dict[str, list[LearnerUnits]] = {}
    for path, module in modules.items():
        layers.setdefault(path.rpartition(".")[0], []).append(module)
    return layers
