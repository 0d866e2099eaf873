"""Heads taken out one at a time: the distribution of what is lost."""

from __future__ import annotations

from statistics import mean

import torch

from effzoo import peft
from effzoo.lab.analyses.heads import without_heads
from effzoo.lab.analyses.tuning import tune
from effzoo.lab.draw import LINES, heat, panels
from effzoo.lab.experiment import Claim, Findings, Run, Table, experiment
from effzoo.lab.fit import Examples
from effzoo.lab.texts import DATA, minilm, texts

LEAST = (0.0, 0.5, 1.0, 2.0)  # points


@experiment("single_heads", deck=3, source="Michel et al. 2019, Are sixteen heads really better than one?, "
            "arXiv:1905.10650, section 3.2 and figure 1", data=DATA)  # fmt: skip
def single_heads(run: Run) -> Findings:
    """What is lost when one attention head is taken out of a fine-tuned model, for every head in turn?"""
    length, steps, train, test = run.choose((24, 40, 384, 200), (128, 300, 1000, 1000))
    data = texts(run, length=length, train=train, test=test)
    every = Examples(
        {name: torch.cat([part.inputs[name] for part in (data.train, data.test)]) for name in data.train.inputs},
        torch.cat([data.train.labels, data.test.labels]),
    )
    lost: list[torch.Tensor] = []  # points, [layers, heads] for each seed
    whole: list[float] = []
    for seed in run.seeds:
        places = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
        model = minilm(len(data.names), seed=seed)
        spec = "full[targets=(attn.*,mlp.*)]"
        tune(model, spec, every.at(places[test:]), name="tuned", steps=steps, seed=seed, rate=1e-4, head_rate=5e-3)
        peft.merge(model, "tuned")
        layers, heads = len(model.blocks), model.config.heads
        testing, numbers = every.at(places[:test]), torch.arange(layers * heads)
        (base,) = without_heads(model, numbers, [0], testing)
        alone = [without_heads(model, numbers.roll(-head), [1], testing)[0] for head in range(layers * heads)]
        lost.append(100 * (base - torch.tensor(alone)).view(layers, heads))
        whole.append(base)
        run.say(
            f"seed {seed}: {base:.3f}; at most {float(lost[-1].max()):.1f} points, mean {float(lost[-1].mean()):.2f}"
        )
    together, table = torch.stack(lost), [["lost without one head", *(f"seed {seed}" for seed in run.seeds)]]
    table += [[f"at most {x:g} points", *(f"{int((of <= x).sum())} of {of.numel()}" for of in lost)] for x in LEAST]
    table += [["most of all heads", *(f"{float(of.max()):.1f} points" for of in lost)]]
    table += [["accuracy with all", *(f"{100 * x:.1f} %" for x in whole)]]
    claims = [
        Claim.of_differences(
            "at least nine heads of ten are worth at most a point each: the share above 0.9",
            [float((of <= 1).float().mean()) - 0.9 for of in lost],
        ),
        Claim.of_differences(
            "some heads are better gone: their share above a tenth",
            [float((of < 0).float().mean()) - 0.1 for of in lost],
        ),
        Claim.of_differences(
            "the same heads matter with other data: the rank correlation of two seeds",
            [_correlation(one, other) for one, other in zip(lost, [*lost[1:], lost[0]], strict=True)],
        ),
    ]
    figure, (left, right) = panels(2, width=5)
    left.hist(together.flatten().tolist(), bins=30, color=LINES[0], edgecolor="white", linewidth=0.4)
    left.axvline(0, color="#888888", linewidth=0.9)
    left.set(xlabel="points lost without one head", ylabel="heads, all seeds", title="one taken out at a time")
    names = [[f"{i}" for i in range(size)] for size in together.shape[1:]]
    heat(right, together.mean(dim=0).tolist(), *names, form="{:.1f}")
    right.set(xlabel="head", ylabel="layer", title="points lost, mean over seeds")
    made: Table = table
    return Findings(
        tables={"Heads by what is lost without them": made},
        figure=figure,
        claims=claims,
        values={"points lost": [of.tolist() for of in lost], "accuracy": whole, "mean": mean(whole)},
        settings={"steps": steps, "length": length, "test": test, "model": "MiniLM, 6 layers of 12 heads"},
        notes=[
            f"Seeds draw the split of the texts, so that the {test} that are counted are others each time; a text is "
            f"{100 / test:.2f} points. The paper finds for a translation model that 8 of 96 heads change the result "
            "significantly, half of them for the better.",
        ],
    )  # fmt: skip


def _correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Spearman's rank correlation of what the heads lose, ties in the order of the heads."""
    ranks = torch.stack([of.flatten().argsort(stable=True).argsort().double() for of in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])
