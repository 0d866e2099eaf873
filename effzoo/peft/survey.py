"""The methods of a survey, counted on a model: Lialin, Deshpande & Rumshisky 2023, Scaling down to scale up,
arXiv:2303.15647v1.

Its table gives for 22 methods the share of parameters that is trained and the share that is changed, over the papers
that it covers. Two numbers in a cell ("0.5 or 30") mean that a change of few numbers touches many entries once it is
merged; here both are counted, and the rank besides. The published shares were taken from notes on that table and not
read again in the paper; where they matter, look there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from effzoo.errors import EffzooError
from effzoo.peft.accounting import Account, Flops, account, flops
from effzoo.peft.attach import attach, attached, detach
from effzoo.sites import sites, unwrap

NAME = "survey"


@dataclass(frozen=True)
class Published:
    """A method in the survey's table.

    name: the survey's for it.
    spec: ours of it.
    trained, changed: the percentages of parameters that it gives.
    """

    name: str
    spec: str
    trained: str
    changed: str


SURVEY = (
    Published("Adapters (Houlsby)", "houlsby", "0.1-6", "0.1-6"),
    Published("AdaMix", "adamix", "0.1-0.2", "0.1-0.2"),
    Published("SparseAdapter", "sparse_adapter", "2", "2"),
    Published("BitFit", "bitfit", "0.05-0.1", "0.05-0.1"),
    Published("Diff pruning", "diff", "200", "0.5"),
    Published("FISH mask", "fish", "0.01-0.5", "0.01-0.5"),
    Published("Prompt tuning", "prompt[length=100]", "0.1", "0.1"),
    Published("Prefix tuning", "prefix", "0.1-4", "0.1-4"),
    Published("IPT", "ipt", "56", "56"),
    Published("MAM adapter", "mam", "0.5", "0.5"),
    Published("Parallel adapter", "parallel", "0.5", "0.5"),
    Published("Intrinsic SAID", "said", "0.001-0.1", "0.1 or 100"),
    Published("LoRA", "lora", "0.01-0.5", "0.5 or 30"),
    Published("UniPELT", "unipelt", "1", "1"),
    Published("Compacter", "compacter", "0.05-0.07", "0.07 or 0.1"),
    Published("PHM adapter", "phm", "0.2", "0.2 or 1"),
    Published("KronA", "krona", "0.07", "0.07 or 30"),
    Published("KronA res", "krona_res", "0.07", "0.07 or 1"),
    Published("(IA)3", "ia3", "0.02", "0.02"),
    Published("Ladder side-tuning", "ladder", "7.5", "7.5"),
    Published("FAR", "far", "6.6-26.4", "6.6-26.4"),
    Published("S4", "s4", "0.5", "more than 0.5"),
)


@dataclass(frozen=True)
class Surveyed:
    """A method of the survey on one model.

    published: what the survey says.
    account, flops: what is counted here.
    refused: why the method does not work there, in place of the counts.
    """

    published: Published
    account: Account | None = None
    flops: Flops | None = None
    refused: str = ""


def survey(model: nn.Module, length: int = 128) -> list[Surveyed]:
    """Every method of the survey at its default options, attached to the model in turn and taken off again.

    length: of the sequence for which `flops` counts.

    On a model built on the meta device nothing is allocated.
    """
    model, counted = unwrap(model), []
    for published in SURVEY:
        try:
            with torch.device(next(model.parameters()).device):
                attach(model, published.spec, name=NAME)
        except EffzooError as refusal:
            counted.append(Surveyed(published, refused=str(refusal)))
            continue
        try:
            counted.append(Surveyed(published, without_head(model, account(model)), flops(model, length)))
        finally:
            if NAME in attached(model):
                detach(model, NAME)
    return counted


def without_head(model: nn.Module, whole: Account) -> Account:
    """The account less the copy of the task head that every adapter has."""
    heads = [site for _, site in sites(model) if site.role.startswith("head.") and NAME in site.adapters]
    numbers = sum(p.numel() for site in heads for p in site.of(NAME).parameters())
    changed = None if whole.changed is None else whole.changed - numbers
    return Account(
        whole.trainable - numbers, whole.stored - numbers, whole.stored_bytes, whole.total, changed, whole.rank
    )
