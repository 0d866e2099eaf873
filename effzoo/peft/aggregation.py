"""Adapters as one: sums of what they change (task arithmetic, TIES, DARE), across methods.

Everything is computed on the changes of weights themselves, in float64. Combining the factors of low-rank changes
instead, (w_1 A_1 + w_2 A_2) and (w_1 B_1 + w_2 B_2), would bring in the products B_1 A_2 and B_2 A_1, which no adapter
has learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from effzoo.annotations import Count, Number, Probability, Seed, Share
from effzoo.errors import AdapterError, OptionError, UnknownNameError
from effzoo.peft.attach import _known, attach
from effzoo.peft.merging import delta, merged_parameters
from effzoo.peft.method import HEAD
from effzoo.peft.parameter.selective_methods import Copy
from effzoo.peft.state import label_layers, transition
from effzoo.sites import Linear, Site, sites

How = Literal["sum", "ties", "dare"]
HOWS: tuple[str, ...] = get_args(How)
Changes = dict[str, Tensor]  # what an adapter adds to tensors of the base, by their key


@dataclass(frozen=True)
class Combined:
    """A combined adapter.

    name: its own.
    spec: its methods.
    truncation: for each tensor of limited rank, the norm of what was cut off, divided by the norm of the change.
    """

    name: str
    spec: str
    truncation: dict[str, float]

    @property
    def worst(self) -> float:
        """The largest relative truncation error of a tensor."""
        return max(self.truncation.values(), default=0.0)


def combine(
    model: nn.Module,
    weights: Mapping[str, Number],
    *,
    name: str,
    how: How = "sum",
    keep: Share = 0.2,
    drop: Probability = 0.9,
    seed: Seed = 0,
    rank: Count | None = None,
    head: str | None = None,
) -> Combined:
    """Attach a new adapter, active, whose change of the base combines those of attached adapters, which stay.

        sum    sum_a w_a d_a, with d_a what merging adapter a adds to the base
        ties   the largest entries of each w_a d_a are kept; the mean of those that have the sign of their sum counts
        dare   entries are dropped at random, the others divided by 1 - drop, and summed

    weights: {adapter: w}. Weights that sum to 1 average, a negative one forgets.
    name: of the new adapter.
    how: "sum" is task arithmetic (Ilharco et al. 2023, arXiv:2212.04089, section 2; of sparse changes LT-SFT, Ansell et
        al. 2022, arXiv:2110.07560, section 3.3); "ties" (Yadav et al. 2023, arXiv:2306.01708, section 4); "dare" (Yu et
        al. 2024, arXiv:2311.03099, section 3). A single adapter interferes with none: it is only multiplied by its
        weight.
    keep: of ties, the share of an adapter's entries, those largest in magnitude over all its tensors together.
    drop: of dare, the probability with which an entry is dropped.
    seed: of dare; each adapter draws anew.
    rank: hold the changes of matrices as a LoRA of this rank, the best one by the singular value decomposition; exact
        where it is at least the sum of the adapters' ranks. None holds whole tensors.
    head: the adapter whose task head is taken, needed where the model has one.

    Raises AdapterError (an adapter that is no change of weights, heads that are not chosen), OptionError; the model is
    then unchanged.
    """
    _check(model, weights, how, keep, drop, rank, head)
    changes = {adapter: _changing(delta(model, adapter, heads=False)) for adapter in weights}
    scaled = [{key: weight * changes[adapter][key] for key in changes[adapter]} for adapter, weight in weights.items()]
    if how == "ties" and len(scaled) > 1:
        total = ties(scaled, keep)
    else:
        if how == "dare" and len(scaled) > 1:
            scaled = [dropped(change, drop, seed + i) for i, change in enumerate(scaled)]
        total = add(scaled)
    everything = dict(sites(model))
    if any(not bool(x.isfinite().all()) for x in total.values()):
        raise AdapterError(
            f"the combination of {' and '.join(weights)} holds NaN or infinity; look for it in their "
            "tensors, or give smaller weights"
        )
    changed = {key.rpartition(".")[0]: everything[key.rpartition(".")[0]] for key in total}
    if not changed:
        raise AdapterError(f"{' and '.join(weights)} change nothing but task heads, so there is nothing to combine")
    with transition(model):
        attach(model, _spec(changed, total, rank), name=name, num_labels=None if head is None else labels(model, head))
        truncation = _write(model, name, total, rank)
        if head is not None:
            take_head(model, head, name)
    return Combined(name, _known(model, name).spec, truncation)


def add(changes: list[Changes]) -> Changes:
    """The sum of changes; a tensor that one of them leaves alone is 0 there."""
    total: Changes = {}
    for summand in changes:
        for key, change in summand.items():
            total[key] = total[key] + change if key in total else change.clone()
    return total


def ties(changes: list[Changes], keep: float) -> Changes:
    """Trim, elect signs, and average what agrees.

    keep: the share of each change that is kept, the largest in magnitude over all its tensors together.
    """
    trimmed = [_trimmed(change, keep) for change in changes]
    elected = {key: total.sign() for key, total in add(trimmed).items()}
    means: Changes = {}
    for key, sign in elected.items():
        kept = torch.stack([change[key] for change in trimmed if key in change])
        agrees = (kept.sign() == sign) & (kept != 0)
        means[key] = (kept * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)
    return means


def dropped(change: Changes, drop: float, seed: int) -> Changes:
    """Each entry is 0 with probability `drop` and divided by 1 - drop otherwise, so that the mean stays."""
    draw = torch.Generator().manual_seed(seed)
    kept = {key: (torch.rand(x.shape, generator=draw, dtype=torch.float64) >= drop).to(x) for key, x in change.items()}
    return {key: x * kept[key] / (1 - drop) for key, x in change.items()}


def _trimmed(change: Changes, keep: float) -> Changes:
    if not change:  # of an adapter that has learned nothing yet
        return {}
    magnitudes = torch.cat([x.abs().flatten() for x in change.values()])
    least = magnitudes.topk(max(1, round(keep * len(magnitudes)))).values[-1]
    return {key: x * (x.abs() >= least) for key, x in change.items()}


def _check(
    model: nn.Module,
    weights: Mapping[str, float],
    how: str,
    keep: float,
    drop: float,
    rank: int | None,
    head: str | None,
) -> None:
    if how not in HOWS:
        raise UnknownNameError("combination", how, HOWS)
    if not weights:
        raise OptionError("combine takes {adapter: weight}, with at least one adapter")
    if not 0 < keep <= 1 or not 0 <= drop < 1:
        raise OptionError(f"keep is in (0, 1] and drop in [0, 1), got keep={keep} and drop={drop}")
    if rank is not None and rank < 1:
        raise OptionError(f"rank is at least 1, or None for whole tensors, got {rank}")
    for adapter in (*weights, *([] if head is None else [head])):
        _known(model, adapter)
    if head is None and any(fnmatchcase(site.role, HEAD) and site.base() for _, site in sites(model)):
        raise AdapterError(
            f"each adapter has a task head of its own; say whose the combined one takes: head={next(iter(weights))!r}"
        )


def _changing(change: Changes) -> Changes:
    """Without tensors that do not change."""
    return {key: x for key, x in change.items() if bool(x.any())}


def _spec(changed: Mapping[str, Site], total: Changes, rank: int | None) -> dict[str, object]:
    """The adapter that holds the changes: LoRA, or copies of whole tensors."""
    layers = [site.layer for site in changed.values() if site.layer is not None]
    where: dict[str, object] = {"targets": tuple(sorted({site.role for site in changed.values()}))}
    if len(layers) == len(changed):
        where["layers"] = tuple(sorted(set(layers)))
    if rank is None:
        return {"name": "full", **where}
    misfits = [
        key for key in total if not (isinstance(changed[key.rpartition(".")[0]], Linear) and key.endswith(".weight"))
    ]
    if misfits:
        raise AdapterError(
            f"a rank holds changes of the weights of linear layers, and {misfits[0]} changes too; leave rank out"
        )
    return {"name": "lora", "rank": rank, "alpha": float(rank), **where}


@torch.no_grad()
def _write(model: nn.Module, name: str, total: Changes, rank: int | None) -> dict[str, float]:
    truncation = {}
    for path, site in sites(model):
        for module in site.hung(name) if not fnmatchcase(site.role, HEAD) else ():
            if rank is None:
                for key, base in site.base().items():
                    change = total.get(f"{path}.{key}")
                    getattr(module, f"own_{key}").copy_(base if change is None else base.double() + change)
                continue
            change = total.get(f"{path}.weight")
            A, B = cast(Tensor, module.A), cast(Tensor, module.B)
            if change is None:
                nn.init.zeros_(B)
                continue
            U, S, V = torch.linalg.svd(change, full_matrices=False)
            kept = min(rank, len(S))
            root = S[:kept].sqrt()
            nn.init.zeros_(A), nn.init.zeros_(B)
            A[:kept].copy_(root[:, None] * V[:kept])
            B[:, :kept].copy_(U[:, :kept] * root)
            truncation[f"{path}.weight"] = float(S[kept:].norm() / S.norm())
    return truncation


def labels(model: nn.Module, name: str) -> int | None:
    """For how many labels the task head of an adapter is; None for a model without labels."""
    return next((site.outputs(name) for site in label_layers(model).values()), None)


@torch.no_grad()
def take_head(model: nn.Module, source: str, name: str) -> None:
    """Fill the task head of adapter `name` with what that of `source` computes, whatever methods have made it."""
    for _, site in sites(model):
        if not (fnmatchcase(site.role, HEAD) and source in site.adapters and name in site.adapters):
            continue
        copies = [module for module in site.hung(name) if isinstance(module, Copy)]
        for key, value in merged_parameters(site, list(site.hung(source))).items() if copies else ():
            getattr(copies[0], f"own_{key}").copy_(value)
