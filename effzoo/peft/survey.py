"""The methods of a survey, counted on a model: Lialin, Deshpande & Rumshisky 2023, Scaling down to scale up,
arXiv:2303.15647v1.

Its table gives for 22 methods the share of parameters that is trained and the share that is changed, over the papers
that it covers. Two numbers in a cell ("0.5 or 30") mean that a change of few numbers touches many entries once it is
merged; here both are counted, and the rank besides. The published shares and sizes were taken from notes on that table
and not read again in the paper; where they matter, look there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from effzoo.errors import EffzooError
from effzoo.peft.accounting import Account, Flops, account, flops
from effzoo.peft.attach import attach, attached, detach
from effzoo.peft.training import begin, finish, stages
from effzoo.sites import sites, unwrap

NAME = "survey"


@dataclass(frozen=True)
class Published:
    """A method in the survey's table.

    name: the survey's for it.
    spec: ours of it.
    trained, changed: the percentages of parameters that it gives.
    sizes: on which models it was tried, "<1B", "<20B", ">20B".
    """

    name: str
    spec: str
    trained: str
    changed: str
    sizes: tuple[str, ...]


SMALL, MIDDLE, LARGE = "<1B", "<20B", ">20B"
ALL = (SMALL, MIDDLE, LARGE)
SURVEY = (
    Published("Adapters (Houlsby)", "houlsby", "0.1-6", "0.1-6", ALL),
    Published("AdaMix", "adamix", "0.1-0.2", "0.1-0.2", (SMALL,)),
    Published("SparseAdapter", "sparse_adapter", "2", "2", (SMALL,)),
    Published("BitFit", "bitfit", "0.05-0.1", "0.05-0.1", ALL),
    Published("Diff pruning", "diff", "200", "0.5", (SMALL,)),
    Published("FISH mask", "fish", "0.01-0.5", "0.01-0.5", (SMALL, MIDDLE)),
    Published("Prompt tuning", "prompt[length=100]", "0.1", "0.1", ALL),
    Published("Prefix tuning", "prefix", "0.1-4", "0.1-4", ALL),
    Published("IPT", "ipt", "56", "56", (SMALL,)),
    Published("MAM adapter", "mam", "0.5", "0.5", (SMALL,)),
    Published("Parallel adapter", "parallel", "0.5", "0.5", (SMALL,)),
    Published("Intrinsic SAID", "said", "0.001-0.1", "0.1 or 100", (SMALL, MIDDLE)),
    Published("LoRA", "lora", "0.01-0.5", "0.5 or 30", ALL),
    Published("UniPELT", "unipelt", "1", "1", (SMALL,)),
    Published("Compacter", "compacter", "0.05-0.07", "0.07 or 0.1", (SMALL, MIDDLE)),
    Published("PHM adapter", "phm", "0.2", "0.2 or 1", (SMALL,)),
    Published("KronA", "krona", "0.07", "0.07 or 30", (SMALL,)),
    Published("KronA res", "krona_res", "0.07", "0.07 or 1", (SMALL,)),
    Published("(IA)3", "ia3", "0.02", "0.02", (MIDDLE,)),
    Published("Ladder side-tuning", "ladder", "7.5", "7.5", (SMALL, MIDDLE)),
    Published("FAR", "far", "6.6-26.4", "6.6-26.4", (SMALL,)),
    Published("S4", "s4", "0.5", "above 0.5", (SMALL, MIDDLE)),
)
REMARKS = {  # why our counts are far from the survey's
    "adamix": "at the end the mean of its four experts is left, and the survey counts that",
    "diff": "while it trains every weight has a value and a gate, and no gate is shut for good (199 trained, 99.5 "
    "changed on BERT base); at the end values are left where the gates stayed open, one in 200",
    "ipt": "the survey's 56 has the decoder of prompts for many tasks; ours is smaller, and at the end the prompt is "
    "left",
    "mam": "a network of 800 units makes the prefix while it trains; at the end keys, values and an adapter of 512 "
    "units "
    "are left, as in the paper's summarisation (6.7 % of BART large); the survey's 0.5 is its classification, with "
    "narrow adapters",
    "said": 'merged, every entry of every matrix but the embeddings changes: the 100 of "0.1 or 100"',
    "lora": 'merged, every entry of q and v changes; how much of a model they are makes the 30 of "0.5 or 30"',
    "krona": "merged, every entry of q and v changes, as with LoRA",
    "ia3": "merged, all entries of k, v and the feed-forward that a vector scales change; the survey counts the "
    "vectors",
    "far": "every feed-forward is trained in the first stage, which chooses; at the end a tenth of the hidden units is "
    "left, and the survey's range is over several such shares",
}


@dataclass(frozen=True)
class Surveyed:
    """A method of the survey on one model.

    published: what the survey says.
    account, flops: what is counted here, while the method trains.
    finished: the share in percent of what is still trainable at the end, through all stages and `finish`.
    refused: why the method does not work there, in place of the counts.
    """

    published: Published
    account: Account | None = None
    flops: Flops | None = None
    finished: float | None = None
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
            training, extra = without_head(model, account(model)), flops(model, length)
            counted.append(Surveyed(published, training, extra, _finished(model)))
        finally:
            if NAME in attached(model):
                detach(model, NAME)
    return counted


def _finished(model: nn.Module) -> float:
    """What is trainable, in percent, when all stages are over and what only training needed is dropped."""
    with torch.device(next(model.parameters()).device):
        for stage in stages(model):
            begin(model, stage)
        finish(model, NAME)
    return without_head(model, account(model)).percent


def without_head(model: nn.Module, whole: Account) -> Account:
    """The account less the copy of the task head that every adapter has."""
    heads = [site for _, site in sites(model) if site.role.startswith("head.") and NAME in site.adapters]
    numbers = sum(p.numel() for site in heads for p in site.of(NAME).parameters())
    changed = None if whole.changed is None else whole.changed - numbers
    return Account(
        whole.trainable - numbers, whole.stored - numbers, whole.stored_bytes, whole.total, changed, whole.rank
    )
