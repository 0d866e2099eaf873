"""Masks on one fixed random network: a task is one bit for each weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from effzoo import peft
from effzoo.lab.analyses.lenet import LeNet
from effzoo.lab.analyses.lottery import reshuffled
from effzoo.lab.analyses.seeds import percent
from effzoo.lab.analyses.supermasks import TASKS, large_final, large_final_same_sign, overlap, signed_constant, task
from effzoo.lab.draw import LINES, heat, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.fit import ADAM, Examples, accuracy, fit
from effzoo.lab.images import DATA, images
from effzoo.peft.parameter.supermask import MaskedWeight
from effzoo.sites import sites

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEEP = 0.5
FINAL = 0.2  # share that the masks of a trained network keep
NEAR = 0.05  # a learned mask to trained weights
RATE, MASK_RATE = 1.2e-3, 1e-3
KINDS = ("nothing is learned", "mask of trained weights", "mask is learned", "weights are trained")
START = 1e-2  # of the scores, in the mean
MASK = {"name": "supermask", "keep": KEEP, "init": START, "targets": "fc.*"}
PUBLISHED = {  # Zhou et al. 2019, abstract and table 1, MNIST
    "as drawn": "",
    "random mask": "",
    "mask of a trained network": "79.3 (about)",
    "the same, signs kept, signed constants": "86",
    "learned mask": "95.3",
    "learned mask, signed constants": "96.4 (about)",
    "trained weights": "97.7 (about)",
}


@experiment(
    "supermask", deck=3, data=DATA,
    source="Zhou et al. 2019, Deconstructing lottery tickets, arXiv:1905.01067, abstract and table 1",
)  # fmt: skip
def supermask(run: Run) -> Findings:
    """How good can a network of random weights become by a mask alone, and how many tasks can share its weights?"""
    steps, batch = run.choose(150, 250), 60
    scores: dict[str, dict[str, float]] = {name: {} for name in PUBLISHED}
    tasks: dict[str, dict[str, dict[str, float]]] = {"mask": {}, "trained": {}}
    crossed: list[list[list[float]]] = []
    agreement: list[list[list[float]]] = []
    for seed in run.seeds:
        key, data = str(seed), images(run, train=10000, test=2000, seed=seed)
        height, width = data.size
        model, constant = LeNet(height * width, seed=seed), LeNet(height * width, seed=seed)
        with torch.no_grad():
            for weight in constant.matrices():
                weight.copy_(signed_constant(weight))
        start = [weight.detach().clone() for weight in model.matrices()]
        scores["as drawn"][key] = accuracy(model, data.test, 1024)
        trained = {
            name: _trained(height * width, seed, task(name, data.train), task(name, data.test), steps, batch)
            for name in TASKS
        }
        scores["trained weights"][key] = trained["digit"][0]
        final = trained["digit"][1]
        scores["mask of a trained network"][key] = _under(
            LeNet(height * width, seed=seed), [large_final(w, FINAL) for w in final], data.test
        )
        same = [large_final_same_sign(a, b, FINAL) for a, b in zip(start, final, strict=True)]
        scores["the same, signs kept, signed constants"][key] = _under(constant, same, data.test)
        masks = {}
        for name in TASKS:  # one network, one adapter of one bit a weight for each task
            peft.attach(model, MASK, name=_name(name))
            learn(model, task(name, data.train), steps, batch, seed)
            masks[name] = [module.mask() for module in _hung(model)]
        grid = []
        for name in TASKS:
            peft.activate(model, _name(name))
            grid.append([accuracy(model, task(other, data.test), 1024) for other in TASKS])
        crossed.append(grid)
        agreement.append([[overlap(masks[a], masks[b]) for b in TASKS] for a in TASKS])
        tasks["mask"][key] = {name: grid[i][i] for i, name in enumerate(TASKS)}
        tasks["trained"][key] = {name: trained[name][0] for name in TASKS}
        scores["learned mask"][key] = tasks["mask"][key]["digit"]
        random = reshuffled(masks["digit"], seed)
        scores["random mask"][key] = _under(LeNet(height * width, seed=seed), random, data.test)
        peft.attach(constant, MASK, name="learned")
        with torch.no_grad():  # constants would all have the same score: the mask starts as on the weights as drawn
            for module, weight in zip(_hung(constant), start, strict=True):
                assert module.scores is not None
                module.scores.copy_(START * weight.abs() / weight.abs().mean())
        learn(constant, data.train, steps, batch, seed)
        scores["learned mask, signed constants"][key] = accuracy(constant, data.test, 1024)
        run.say(f"seed {seed}: " + ", ".join(f"{name} {100 * by_seed[key]:.1f}" for name, by_seed in scores.items()))
    seeds = [str(seed) for seed in run.seeds]
    weights = sum(w.numel() for w in start)

    table = [["network", "accuracy", "published, MNIST"]]
    table += [[name, percent(list(by.values())), PUBLISHED[name]] for name, by in scores.items()]
    second = [["task", "mask on the shared weights", "weights trained for it", "bytes: mask", "weights", "published"]]
    for name in TASKS:
        cells = [percent([tasks[kind][s][name] for s in seeds]) for kind in ("mask", "trained")]
        second.append([name, *cells, f"{-(-weights // 8):,}", f"{4 * weights:,}", "no number"])

    lost = [scores["trained weights"][s] - scores["learned mask"][s] for s in seeds]
    settings = {
        "network": "LeNet-300-100 without biases", "weights": weights, "images": data.about,
        "trained on": len(data.train), "counted on": len(data.test), "steps": steps,
        "batch": batch, "kept by learned masks": KEEP, "kept by masks of a trained network": FINAL,
        "rates": f"weights {RATE}, scores {MASK_RATE}",
    }  # fmt: skip
    return Findings(
        tables={"digits": table, "six tasks on one random network": second},
        figure=_figure(scores, crossed),
        claims=[
            Claim.of_differences(
                "a learned mask on random weights is right on more than 90 % of the digits",
                [scores["learned mask"][s] - 0.9 for s in seeds],
            ),
            Claim.of_differences("a learned mask is less accurate than trained weights", lost),
            Claim.of_differences(
                "a learned mask is less than 5 points below trained weights", [NEAR - x for x in lost]
            ),
            Claim.of_differences(
                "a learned mask is more accurate with signed constants for weights",
                [scores["learned mask, signed constants"][s] - scores["learned mask"][s] for s in seeds],
            ),
            Claim.of_differences(
                "the mask of a trained network, on weights as drawn, is right on more than 30 %",
                [scores["mask of a trained network"][s] - 0.3 for s in seeds],
            ),
            Claim.of_differences(
                "a random mask is right on less than 30 %", [0.3 - scores["random mask"][s] for s in seeds]
            ),
            Claim.of_differences(
                "on every one of six tasks the mask is within 5 points of weights that were trained for it",
                [NEAR - max(tasks["trained"][s][name] - tasks["mask"][s][name] for name in TASKS) for s in seeds],
            ),
        ],
        values={"digits": scores, "tasks": tasks, "crossed": crossed, "agreement of masks": agreement},
        settings=settings,
        notes=[
            "Published: MNIST; masks drawn as Bernoulli(sigmoid(m)) by SGD at a rate of 100. Here the method "
            "`supermask` keeps the half of each matrix with the largest scores, straight through, by AdamW, so no "
            "weight is drawn while it trains. A seed draws the images, the weights, and the "
            "order of the images. Signed constants are published as 1.1 points better with masks that are drawn while "
            "they train, for many epochs; so long a training with such masks would settle it."
        ],
    )


def _figure(scores: dict[str, dict[str, float]], crossed: list[list[list[float]]]) -> Figure:
    """Left: the accuracy on digits, by what is learned. Right: every mask on every task."""
    figure, (left, right) = panels(2, width=5.4)
    for place, (name, by) in enumerate(scores.items()):
        values = [100 * value for value in by.values()]
        left.barh(place, sum(values) / len(values), color=LINES[_kind(name)], height=0.65)
        left.plot(values, [place] * len(values), marker="o", markersize=3, linestyle="", color="#333333")
        left.text(max(values) + 2, place, f"{sum(values) / len(values):.1f}", va="center", fontsize=8)
    for number, label in enumerate(KINDS):
        left.barh(0, 0, color=LINES[number], label=label)
    left.legend(frameon=False, fontsize=7, loc="upper right")
    left.set_yticks(range(len(scores)), list(scores))
    left.invert_yaxis()
    left.set(xlabel="accuracy, %", xlim=(0, 112), title="digits")
    heat(right, (100 * torch.tensor(crossed).mean(dim=0)).tolist(), TASKS, TASKS, vmin=0, vmax=100)
    right.set_xticks(range(len(TASKS)), TASKS, rotation=30, ha="right", rotation_mode="anchor")
    right.set(xlabel="counted on", ylabel="mask of", title="accuracy, %: one network, six masks")
    return figure


def learn(model: torch.nn.Module, train: Examples, steps: int, batch: int, seed: int) -> None:
    """Train the active mask, and pack it into bits."""
    fit(model, train.stream(batch, seed), steps, learning_rate=MASK_RATE, **ADAM)


def _trained(
    inputs: int, seed: int, train: Examples, test: Examples, steps: int, batch: int
) -> tuple[float, list[torch.Tensor]]:
    model = LeNet(inputs, seed=seed)
    fit(model, train.stream(batch, seed), steps, learning_rate=RATE, **ADAM)
    return accuracy(model, test, 1024), [weight.detach() for weight in model.matrices()]


@torch.no_grad()
def _under(model: LeNet, masks: Sequence[torch.Tensor], test: Examples) -> float:
    """The accuracy with the weights outside the masks at 0; the model is left as it was."""
    before = [weight.clone() for weight in model.matrices()]
    for weight, mask in zip(model.matrices(), masks, strict=True):
        weight.mul_(mask)
    score = accuracy(model, test, 1024)
    for weight, old in zip(model.matrices(), before, strict=True):
        weight.copy_(old)
    return score


def _hung(model: torch.nn.Module) -> list[MaskedWeight]:
    return [module for _, site in sites(model) for module in site.hung() if isinstance(module, MaskedWeight)]


def _kind(name: str) -> int:
    """Which of `KINDS` a row of the figure is."""
    if name == "trained weights":
        return 3
    return 2 if name.startswith("learned") else 0 if name in ("as drawn", "random mask") else 1


def _name(task_name: str) -> str:
    return "task_" + task_name.replace(" ", "_")  # an adapter name is an identifier, and `half` is taken
