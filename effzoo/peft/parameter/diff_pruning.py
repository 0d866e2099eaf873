"""Diff pruning: a change of the parameters that is pruned by learned gates (Guo et al. 2021, arXiv:2012.07463)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from effzoo.annotations import NotNegative, Number, ProperShare, Share
from effzoo.peft.method import Layers, Modules, Targets
from effzoo.peft.parameter.hard_concrete import drawn_gate, open_probability, still_gate
from effzoo.peft.parameter.lt_sft import dense_changes, keep_all
from effzoo.peft.parameter.mask_scores import NETWORK, count, top
from effzoo.peft.parameter.sparse_delta import ChosenEntries, Spans, SparseDelta, SparseMethod, shared_entries
from effzoo.peft.training_hooks import Stage
from effzoo.registry import peft
from effzoo.sites import Site

LOW, HIGH, TEMPERATURE = -1.5, 1.5, 1.0


class GatedDelta(SparseDelta):
    """theta' = theta + z * w, z = z_entry z_group with hard-concrete gates; after `gates` the chosen entries alone."""

    def __init__(
        self,
        chosen: ChosenEntries,
        spans: Spans,
        owner: bool,
        base: Mapping[str, Tensor],
        alpha: float,
        structured: bool,
    ):
        super().__init__(chosen, spans, owner)
        for key, tensor in base.items():
            self.register_parameter(f"w_{key}", nn.Parameter(torch.zeros_like(tensor)))
            self.register_parameter(f"alpha_{key}", nn.Parameter(torch.full_like(tensor, alpha)))
            self.register_parameter(f"group_{key}", nn.Parameter(tensor.new_full((1,), alpha)) if structured else None)

    def alphas(self, key: str) -> list[Tensor]:
        """alpha of each entry and, where a tensor is a group, of the tensor."""
        return [alpha for alpha in (getattr(self, f"alpha_{key}"), getattr(self, f"group_{key}")) if alpha is not None]

    draws_weights = True  # in training

    def dense(self, key: str) -> Tensor | None:
        change: Tensor = getattr(self, f"w_{key}")
        for alpha in self.alphas(key):
            change = change * (
                drawn_gate(alpha, LOW, HIGH, TEMPERATURE) if self.training else still_gate(alpha, LOW, HIGH)
            )
        return change

    def expected(self) -> Tensor:
        """E ||z||_0 of the site: both gates of an entry must be open, and they are drawn independently."""
        numbers = []
        for key in self.spans:
            entry, *group = (open_probability(alpha, LOW, HIGH, TEMPERATURE) for alpha in self.alphas(key))
            numbers.append(entry.sum() * (group[0].sum() if group else 1))
        return torch.stack(numbers).sum()

    def drop(self) -> None:
        """Let go of the dense change and its gates."""
        for key in self.spans:
            for name in ("w", "alpha", "group"):
                setattr(self, f"{name}_{key}", None)


@peft.register("diff", "diff_pruning")
class DiffPruning(SparseMethod):
    """theta' = theta + z * w, with z a hard-concrete gate per entry; the loss grows by penalty * E ||z||_0.

        z = clip(s (r - l) + l, 0, 1),   s = sigma(logit u + alpha), in evaluation sigma(alpha),   (l, r) = (-1.5, 1.5)

    keep: K as a share of the targets' parameters.
    penalty: lambda, of the expected number of open gates.
    alpha: where the gates start; at 5 they are open.
    structured: a second gate for each tensor, z = z_entry z_tensor.
    gates: share of all steps in the first stage.

    w starts at 0. Stage `gates` trains w and alpha, 2 D parameters. Then the K entries with the largest |z w|, over all
    tensors together, are chosen, and stage `fixmask` trains these on from z w. The penalty is the exact expectation of
    the product of both gates. Weight decay acts on w: it pulls towards theta. Training by hand without `begin` stays in
    the first stage, and `finish` then keeps every entry whose z w is not 0.
    """

    paper = "Guo, Rush & Kim 2021, Parameter-efficient transfer learning with diff pruning, arXiv:2012.07463, section 3"
    default_targets = NETWORK
    learning_rate = 1e-3  # of the K entries
    rates = {"w_*": 0.05, "alpha_*": 100.0, "group_*": 100.0}  # 5e-5 and 0.1

    def __init__(
        self,
        *,
        keep: Share = 0.005,
        penalty: NotNegative = 1.25e-7,
        alpha: Number = 5.0,
        structured: bool = True,
        gates: ProperShare = 0.5,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(targets=targets, layers=layers)
        self.keep = keep
        self.weight, self.alpha, self.structured = penalty, alpha, structured
        self.stages = (Stage("gates", gates), Stage("fixmask", 1 - gates))

    def sparse(self, site: Site, spans: Spans, owner: bool) -> SparseDelta:
        return GatedDelta(self.entries, spans, owner, site.base(), self.alpha, self.structured)

    def penalty(self, modules: Modules) -> Tensor | None:
        if shared_entries(modules).indices is not None:
            return None
        return (
            self.weight
            * torch.stack([module.expected() for module in modules.values() if isinstance(module, GatedDelta)]).sum()
        )

    def begin(self, stage: str, modules: Modules) -> None:
        chosen = shared_entries(modules)
        if stage == "fixmask" and chosen.indices is None:
            changes = _still(modules)
            numbers = top([change.abs() for change in changes], count(self.keep, chosen.total))
            chosen.choose(numbers, torch.cat([change.flatten() for change in changes])[numbers])
            _drop(modules)

    def finish(self, modules: Modules) -> None:
        _still(modules)
        keep_all(modules)
        _drop(modules)


def _still(modules: Modules) -> list[Tensor]:
    """The changes with the gates of evaluation, which the modules use from then on."""
    for module in modules.values():
        module.eval()
    return [] if shared_entries(modules).indices is not None else [change.detach() for change in dense_changes(modules)]


def _drop(modules: Modules) -> None:
    for module in modules.values():
        assert isinstance(module, GatedDelta)
        module.drop()
