"""Heads taken out one at a time: the distribution of what is lost."""

from __future__ import annotations

import torch

from effzoo import peft
from effzoo.lab.analyses.heads import agreement, gain_of_chosen, without_heads
from effzoo.lab.analyses.tuning import tune
from effzoo.lab.draw import LINES, heat, panels
from effzoo.lab.experiment import Claim, Findings, Run, Table, experiment
from effzoo.lab.texts import DATA, minilm, texts
from effzoo.lab.word_order import word_order

LENGTH = 16
LEAST = (0.0, 0.5, 1.0, 2.0)  # points


@experiment("single_heads", deck=3, source="Michel et al. 2019, Are sixteen heads really better than one?, "
            "arXiv:1905.10650, section 3.2 and figure 1", data=DATA)  # fmt: skip
def single_heads(run: Run) -> Findings:
    """What is lost when one attention head is taken out of a fine-tuned model, for every head in turn?"""
    depth, steps, train, test = run.choose((2, 30, 384, 120), (2, 60, 1000, 800))
    halves_lost: list[torch.Tensor] = []  # points on each half of the texts, [2, layers, heads] for each seed
    whole: list[float] = []
    for seed in run.seeds:
        data = texts(run, length=LENGTH, train=train, test=test, seed=seed)
        training, testing = (word_order(part, seed=seed) for part in (data.train, data.test))
        model = minilm(2, seed=seed, layers=depth)
        spec = "full[targets=(attn.*,mlp.*)]"
        tune(model, spec, training, name="tuned", steps=steps, seed=seed, rate=2e-4, head_rate=5e-3)
        peft.merge(model, "tuned")
        layers, heads = len(model.blocks), model.config.heads
        numbers = torch.arange(layers * heads)
        places = torch.randperm(test, generator=torch.Generator().manual_seed(seed))
        found = []
        for half in (testing.at(places[: test // 2]), testing.at(places[test // 2 :])):
            (base,) = without_heads(model, numbers, [0], half)
            alone = [without_heads(model, numbers.roll(-head), [1], half)[0] for head in numbers.tolist()]
            found.append([base, *alone])
        correct = torch.tensor(found)
        halves_lost.append(100 * (correct[:, :1] - correct[:, 1:]).view(2, layers, heads))
        whole.append(float(correct[:, 0].mean()))
        of = halves_lost[-1].mean(dim=0)
        run.say(f"seed {seed}: {whole[-1]:.3f}; at most {float(of.max()):.1f} points, mean {float(of.mean()):.2f}")
    lost = [halves.mean(dim=0) for halves in halves_lost]
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
            "some heads are better gone: the head that is so most on one half of the texts, on the other half (points)",
            [gain_of_chosen(halves) for halves in halves_lost],
        ),
        Claim.of_differences(
            "the same heads matter on other texts: the correlation of what heads are worth on two halves",
            [agreement(halves) for halves in halves_lost],
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
        values={"points lost on each half": [of.tolist() for of in halves_lost], "accuracy": whole},
        settings={
            "model": f"the lower {layers} layers of MiniLM, {heads} heads each", "texts": data.about,
            "task": "do the words of a text stand in their order?", "length": LENGTH, "steps": steps, "batch": 16,
            "train texts": train, "test texts": test,
        },
        notes=[
            f"Seeds draw the texts that are trained and counted on; a text is {100 / test:.2f} points. Half of the "
            "texts are shuffled, which the task head alone cannot tell. That a head is better gone is judged on other "
            "texts than it is chosen on: of many heads that do nothing half would seem so by chance. The two lower "
            "layers have 24 heads, so each does more than one of the 96 there; all six layers would tell whether "
            "nine of ten are worth little, and whether some are better gone. Published: for a "
            "translation model 8 of 96 heads change the result significantly, half of them for the better; for BERT, "
            "what heads are worth on matched and mismatched MNLI goes together.",
        ],
    )  # fmt: skip
