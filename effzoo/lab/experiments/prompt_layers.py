"""Prompts in some of the layers: which layers should have them?"""

from __future__ import annotations

from statistics import mean

import torch

from effzoo import peft
from effzoo.lab.analyses.tuning import body_parameters, fast_accuracy, tune
from effzoo.lab.draw import LINES, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.texts import DATA, minilm, texts
from effzoo.lab.word_order import word_order

LOWER = 4  # layers
PROMPTS = {
    "no prompts, head alone": None, "layer 0": (0,), "layer 3": (3,), "lower half, 0 and 1": (0, 1),
    "upper half, 2 and 3": (2, 3), "all layers": (0, 1, 2, 3),
}  # fmt: skip
PUBLISHED = {
    "lower half, 0 and 1": "worse than the same number of upper layers",
    "upper half, 2 and 3": "on RTE the upper third comes close to all layers",
}
LENGTH, RATE, HEAD_RATE = 8, 3e-2, 3e-3
WITHIN = 0.02


@experiment(
    "prompt_layers", deck=0, data=DATA,
    source="Liu et al. 2021, P-tuning v2, arXiv:2110.07602, section 4 (prompt depth) and its figure",
)  # fmt: skip
def prompt_layers(run: Run) -> Findings:
    """Prompts in which layers matter most?"""
    length, steps = 10, run.choose(12, 100)
    accuracies: dict[str, list[float]] = {name: [] for name in PROMPTS}
    counts: dict[str, int] = {}
    for seed in run.seeds:
        data = texts(run, length=length, train=run.choose(300, 1280), test=run.choose(200, 800), seed=seed)
        train, test = word_order(data.train, seed=2 * seed), word_order(data.test, seed=2 * seed + 1)
        model = minilm(2, seed=seed, layers=LOWER)
        for name, layers in PROMPTS.items():
            torch.manual_seed(seed)
            spec = "head" if layers is None else f"deep_prompt[length={LENGTH}, layers={list(layers)}]"
            tune(model, spec, train, name="tried", steps=steps, seed=seed, rate=RATE, head_rate=HEAD_RATE)
            counts[name] = body_parameters(model)
            accuracies[name].append(fast_accuracy(model, test))
            peft.detach(model, "tried")
        run.say(f"seed {seed}: " + ", ".join(f"{name} {100 * of[-1]:.1f}" for name, of in accuracies.items()))

    head, lowest, highest, lower, upper, every = accuracies.values()
    table = [["prompts in", "numbers", "accuracy, %", "lowest to highest", "above the head alone", "published"]]
    for name, of_seeds in accuracies.items():
        percents = [100 * x for x in of_seeds]
        gain = mean(percents) - 100 * mean(head)
        table.append(
            [name, f"{counts[name]:,}", f"{mean(percents):.1f}", f"{min(percents):.1f} to {max(percents):.1f}",
             f"{gain:+.1f}", PUBLISHED.get(name, "")]
        )  # fmt: skip
    figure, (axes,) = panels(1, width=6.0, height=3.2)
    for row, (name, of_seeds) in enumerate(accuracies.items()):
        values, number = [100 * x for x in of_seeds], len(PROMPTS[name] or ())
        colour = LINES[(0, 1, 2, 3, 3)[number]]
        axes.plot(values, [row] * len(values), marker="o", markersize=4, linestyle="", color=colour, alpha=0.45)
        axes.plot([mean(values)], [row], marker="|", markersize=13, markeredgewidth=2.5, color=colour)
    for number, label in ((0, "no layer"), (1, "one layer"), (2, "two layers"), (3, "all layers")):
        axes.plot([], [], marker="o", markersize=5, linestyle="", color=LINES[number], label=label)
    axes.axvline(50, color="#888888", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(PROMPTS)), list(PROMPTS))
    axes.invert_yaxis()
    axes.set(xlabel="accuracy, % (dotted: chance)", title=f"{LENGTH} prompt tokens in each of these layers")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return Findings(
        tables={"Prompts by layer": table},
        figure=figure,
        claims=[
            Claim.of_differences(text, [a - b for a, b in zip(more, less, strict=True)])
            for text, more, less in (
                ("prompts in the upper half of the layers are better than in the lower half", upper, lower),
                ("a prompt in the last layer alone is better than in the first alone", highest, lowest),
                ("prompts in all layers are better than in either half",
                 every, [max(pair) for pair in zip(upper, lower, strict=True)]),
                ("prompts in all layers are better than a head alone", every, head),
            )
        ]
        + [
            Claim.of_differences(
                f"prompts in the upper half are within {100 * WITHIN:g} points of those in all layers",
                [WITHIN - (a - b) for a, b in zip(every, upper, strict=True)],
            )
        ],
        values={"accuracy": accuracies, "numbers": counts},
        settings={
            "model": f"minilm, its {LOWER} lower layers", "task": "word order", "tokens": length, "steps": steps,
            "batch": 16, "prompt tokens": LENGTH, "rate": RATE, "rate of the head": HEAD_RATE, "texts": len(train),
            "test texts": len(test),
        },
        notes=[
            "The task is whether the words of a text stand in their order, which a head alone does not read well off "
            "the frozen base. Published: BERT-large on RTE and BoolQ, layers added from below and from above, in a "
            "figure. A seed draws the texts to train and to test on, the orders of their words and all weights.",
            "Here the lower layers matter more, against the paper: the order of words is in the positions, which the "
            "first layers read, and this base has four layers, not 24. RTE and BoolQ on BERT-large would settle "
            "whether it is the task or the depth.",
        ],
    )  # fmt: skip
