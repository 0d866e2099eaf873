"""Lottery ticket sparse fine-tuning, whose changes add up (Ansell et al. 2022, arXiv:2110.07560)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from effzoo.annotations import NotNegative, ProperShare, Share
from effzoo.peft.method import Layers, Modules, Targets
from effzoo.peft.parameter.mask_scores import NETWORK, count, has_values, top
from effzoo.peft.parameter.sparse_delta import ChosenEntries, Spans, SparseDelta, SparseMethod, in_order, shared_entries
from effzoo.peft.training_hooks import Stage
from effzoo.registry import peft
from effzoo.sites import Site


class LotteryTicket(SparseDelta):
    """theta' = theta + phi; phi is dense in stage `full`, and has the chosen entries alone later."""

    def __init__(self, chosen: ChosenEntries, spans: Spans, owner: bool, base: Mapping[str, Tensor]):
        super().__init__(chosen, spans, owner)
        for key, tensor in base.items():
            self.register_parameter(f"full_{key}", nn.Parameter(torch.zeros_like(tensor)))

    def dense(self, key: str) -> Tensor | None:
        change: Tensor | None = getattr(self, f"full_{key}")
        return change

    def drop(self) -> None:
        """Let go of the dense change."""
        for key in self.spans:
            setattr(self, f"full_{key}", None)


@peft.register("lt_sft", "sft", "lottery_ticket_sft")
class LTSFT(SparseMethod):
    """theta' = theta + phi with K entries: those that full fine-tuning moves most, trained once more from theta.

    keep: K as a share of the targets' parameters.
    full: share of all steps in the first stage.
    l1: lambda of the penalty lambda / N sum |phi| in both stages, N the number of trained entries.

    Stage `full` trains a dense phi. Then the K entries with the largest |phi|, over all tensors together, are chosen
    (of equal ones the first), phi goes back to 0, and stage `sparse` trains the K entries. Adapters add up:
    `activate(model, "a", "b")` is theta + phi_a + phi_b.

    The paper's loop over several choices is not here (it reports one). Weight decay acts on phi, so it pulls towards
    theta; the reference decays theta itself, and needs decay 0 to keep the frozen entries. Training by hand without
    `begin` stays in the first stage, and `finish` then keeps every entry that has changed.
    """

    paper = "Ansell et al. 2022, Composable sparse fine-tuning for cross-lingual transfer, arXiv:2110.07560, section 3"
    default_targets = NETWORK
    learning_rate = 1e-3  # of the K entries
    rates = {"full_*": 0.05}  # 5e-5, as full fine-tuning

    def __init__(
        self,
        *,
        keep: Share = 0.01,
        full: ProperShare = 0.5,
        l1: NotNegative = 0.0,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(targets=targets, layers=layers)
        self.keep = keep
        self.l1 = l1
        self.stages = (Stage("full", full), Stage("sparse", 1 - full))

    def sparse(self, site: Site, spans: Spans, owner: bool) -> SparseDelta:
        return LotteryTicket(self.entries, spans, owner, site.base())

    def begin(self, stage: str, modules: Modules) -> None:
        chosen = shared_entries(modules)
        if stage == "sparse" and chosen.indices is None:
            changes = dense_changes(modules)
            numbers = top([change.abs() for change in changes], count(self.keep, chosen.total))
            chosen.choose(numbers, changes[0].new_zeros(len(numbers)))
            _drop(modules)

    def penalty(self, modules: Modules) -> Tensor | None:
        if not self.l1:
            return None
        chosen = shared_entries(modules)
        if chosen.values is not None:
            return self.l1 * chosen.values.abs().mean()
        return self.l1 / chosen.total * torch.stack([change.abs().sum() for change in dense_changes(modules)]).sum()

    def finish(self, modules: Modules) -> None:
        keep_all(modules)
        _drop(modules)


def dense_changes(modules: Modules) -> list[Tensor]:
    """The dense changes of all sites, in the order in which their entries are numbered."""
    changes = []
    for module in in_order(modules).values():
        for key in module.spans:
            change = module.dense(key)
            assert change is not None
            changes.append(change)
    return changes


def keep_all(modules: Modules) -> None:
    """Choose every entry that has changed, where none are chosen yet: what is computed stays what it was."""
    chosen = shared_entries(modules)
    if chosen.indices is None:
        changes = dense_changes(modules)
        if not has_values(changes[0]):  # a model without memory: it may be all of them
            chosen.choose(
                torch.arange(chosen.total, device=changes[0].device),
                torch.cat([change.flatten() for change in changes]),
            )
            return
        first, numbers = 0, []
        for change in changes:
            numbers.append(change.detach().flatten().nonzero().flatten() + first)
            first += change.numel()
        values = torch.cat([change.detach().flatten()[change.detach().flatten() != 0] for change in changes])
        chosen.choose(torch.cat(numbers), values)


def _drop(modules: Modules) -> None:
    for module in modules.values():
        assert isinstance(module, LotteryTicket)
        module.drop()
