"""Attention heads removed in the order of their importance, in the reverse order, and at random."""

from __future__ import annotations

import torch

from effzoo import peft
from effzoo.lab.analyses.heads import head_importance, without_heads
from effzoo.lab.analyses.seeds import judged, percent
from effzoo.lab.analyses.tuning import tune
from effzoo.lab.draw import band, heat, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.texts import DATA, minilm, texts

RATE, HEAD_RATE = 2e-4, 5e-3
WITHIN = 0.02 + 1e-6  # of rounding
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)
ORDERS = ("least important first", "at random", "most important first")


@experiment(
    "head_pruning", deck=3, data=DATA,
    source="Michel et al. 2019, Are sixteen heads really better than one?, arXiv:1905.10650, section 4, figure 3",
)  # fmt: skip
def head_pruning(run: Run) -> Findings:
    """How many attention heads can go, and does the gradient of their gates say which?"""
    length, steps, tests = run.choose((24, 24, 200), (128, 300, 1000))
    data = texts(run, length=length, train=run.choose(384, 1100), test=tests)
    looked = data.train.at(slice(0, run.choose(48, 500)))
    accuracies: dict[str, dict[str, list[float]]] = {order: {} for order in ORDERS}
    scores: dict[str, torch.Tensor] = {}
    counts: list[int] = []
    for seed in run.seeds:
        model = minilm(len(data.names), seed=seed)
        spec = "full[targets=(attn.*,mlp.*)]"
        tune(model, spec, data.train, name="tuned", steps=steps, seed=seed, rate=RATE, head_rate=HEAD_RATE)
        peft.merge(model, "tuned")
        scores[str(seed)] = head_importance(model, looked)
        heads = scores[str(seed)].numel()
        counts = [round(share * heads) for share in SHARES]
        least = scores[str(seed)].flatten().argsort(stable=True)
        drawn = torch.randperm(heads, generator=torch.Generator().manual_seed(seed))
        whole: list[float] = []
        for name, order in zip(ORDERS, (least, drawn, least.flip(0)), strict=True):
            whole = whole or without_heads(model, order, counts[:1], data.test)
            accuracies[name][str(seed)] = whole + without_heads(model, order, counts[1:], data.test)
        run.say(
            f"seed {seed}: "
            + "; ".join(
                f"{name} " + " ".join(f"{100 * x:.1f}" for x in by[str(seed)]) for name, by in accuracies.items()
            )
        )
    seeds = [str(seed) for seed in run.seeds]
    mean = torch.stack(list(scores.values())).mean(dim=0)
    layers, heads = mean.shape

    table = [["heads removed", *ORDERS, "published"]]
    for i, (share, count) in enumerate(zip(SHARES, counts, strict=True)):
        expected = {0.4: "BERT: no noticeable loss (about)", 0.2: "WMT: no noticeable loss (about)"}.get(
            share, "" if not share else "no number"
        )
        table.append(
            [
                f"{count} of {layers * heads}",
                *(percent([accuracies[name][s][i] for s in seeds]) for name in ORDERS),
                expected,
            ]
        )

    figure, (left, right) = panels(2, width=5)
    for number, name in enumerate(ORDERS):
        band(
            left,
            [100 * share for share in SHARES],
            [[100 * x for x in accuracies[name][s]] for s in seeds],
            name,
            number,
        )
    left.set(xlabel=f"heads removed, % of {layers * heads}", ylabel="accuracy, %", title="without retraining")
    left.legend(frameon=False, fontsize=8, loc="lower left")
    heat(right, mean.tolist(), [f"{i}" for i in range(layers)], [f"{i}" for i in range(heads)], form="{:.2f}", vmin=0)
    right.set(xlabel="head", ylabel="layer", title="importance, by the norm of its layer")

    low, random, high = (accuracies[name] for name in ORDERS)
    settings = {
        "model": "minilm", "length": length, "steps": steps, "batch": 16, "train texts": len(data.train),
        "test texts": len(data.test), "texts for the importance": len(looked), "rate": RATE,
    }  # fmt: skip
    return Findings(
        tables={"accuracy": table},
        figure=figure,
        claims=[
            Claim(
                "40 % of the heads, the least important ones, can go for at most 2 points",
                judged(seeds, lambda s: low[s][2] >= low[s][0] - WITHIN),
            ),
            Claim(
                "from 40 % on, the most important ones first is worse at every step",
                judged(seeds, lambda s: all(high[s][i] < low[s][i] for i in range(2, len(SHARES)))),
            ),
            Claim(
                "a random order lies between the two, in the mean",
                judged(seeds, lambda s: sum(high[s]) < sum(random[s]) < sum(low[s])),
            ),
        ],
        values={"accuracy": accuracies, "importance": {s: scores[s].tolist() for s in seeds}, "removed": counts},
        settings=settings,
        notes=[
            "Published: BERT base on MNLI, and a translation model on WMT, pruned after training as here: up to 20 % "
            "of its heads and 40 % of BERT's go without a noticeable loss, then accuracy falls sharply. A seed draws "
            "the head, the order of the texts, and the random order of heads."
        ],
    )
