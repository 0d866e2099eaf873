"""Magnitude against movement pruning while a network is fine-tuned."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from effzoo import peft
from effzoo.lab.analyses.lenet import LeNet
from effzoo.lab.analyses.pruning import kept_by_size, pruned_weights
from effzoo.lab.analyses.seeds import percent
from effzoo.lab.analyses.supermasks import task
from effzoo.lab.analyses.tuning import tune
from effzoo.lab.draw import band, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.fit import ADAM, accuracy, fit
from effzoo.lab.images import DATA, images

RATE = 1.2e-3
METHODS = ("magnitude", "movement")
HALF, TENTH = 0.5, 0.1
KEEPS = (HALF, 0.2, TENTH, 0.03)
LOW = 0.15  # the share below which the paper sees movement ahead
PARTS = 10
Scores = dict[str, dict[float, dict[str, float]]]  # method, share that is kept, seed


@experiment(
    "pruning",
    deck=(3, 0),
    source="Sanh, Wolf & Rush 2020, Movement pruning, arXiv:2005.07683, figures 2 and 3",
    data=DATA,
)
def pruning(run: Run) -> Findings:
    """Which weights should a fine-tuned network keep: the large ones, or those that training moves away from zero?

    A network trained on digits is fine-tuned to digits upside down, and pruned meanwhile.
    """
    steps = run.choose(150, 300)
    scores: Scores = {method: {keep: {} for keep in KEEPS} for method in METHODS}
    by_size: dict[str, dict[str, list[float]]] = {method: {} for method in METHODS}
    dense: dict[str, float] = {}
    for seed in run.seeds:
        key, data = str(seed), images(run, train=10000, test=2000, seed=seed)
        training, testing = (task("upside down", part) for part in (data.train, data.test))
        height, width = data.size
        network = LeNet(height * width, seed=seed)
        fit(network, data.train.stream(60, seed), steps, learning_rate=RATE, **ADAM)
        options: dict[str, Any] = {"steps": steps, "batch": 60, "seed": seed, "rate": RATE, "bfloat16": False}
        tune(network, "full[targets=fc.*]", training, name="tried", **options)
        dense[key] = accuracy(network, testing, 1024)
        peft.detach(network, "tried")
        for method in METHODS:
            for keep in KEEPS:
                tune(network, f"{method}[keep={keep},targets=fc.*]", training, name="tried", **options)
                scores[method][keep][key] = accuracy(network, testing, 1024)
                if keep == TENTH:
                    by_size[method][key] = kept_by_size(*pruned_weights(network), PARTS)
                peft.detach(network, "tried")
        run.say(
            f"seed {seed}: all {100 * dense[key]:.1f}, "
            + ", ".join(
                f"{m} {100 * keep:.0f} % {100 * by[key]:.1f}" for m in METHODS for keep, by in scores[m].items()
            )
        )
    seeds = [str(seed) for seed in run.seeds]

    figure, (left, right) = panels(2)
    for number, method in enumerate(METHODS):
        runs = [[100 * scores[method][keep][s] for keep in KEEPS] for s in seeds]
        band(left, [100 * keep for keep in KEEPS], runs, method, number)
        middles = [100 * (i + 0.5) / PARTS for i in range(PARTS)]
        band(right, middles, [[100 * x for x in by_size[method][s]] for s in seeds], method, number)
    quiet: dict[str, Any] = {"color": "#888888", "linewidth": 1.2, "linestyle": ":"}
    left.axhline(100 * mean(dense.values()), label="nothing pruned", **quiet)
    left.set(xscale="log", xlabel="weights kept, %", ylabel="accuracy, %", title="fine-tuned to digits upside down")
    left.set_xticks([100 * keep for keep in KEEPS], [f"{100 * keep:.0f}" for keep in KEEPS])
    left.minorticks_off()
    left.invert_xaxis()
    left.legend(frameon=False, fontsize=8, loc="lower left")
    right.axhline(100 * TENTH, label="the same of every size", **quiet)
    right.set(
        xlabel="rank of |w| before fine-tuning, % (100: largest)",
        ylabel="of these kept, %",
        title=f"which {100 * TENTH:.0f} % are kept",
    )
    right.legend(frameon=False, fontsize=8, loc="upper left")

    def ahead(keep: float) -> list[float]:
        """By how much movement is more accurate, for each seed."""
        return [scores["movement"][keep][s] - scores["magnitude"][keep][s] for s in seeds]

    few = [ahead(keep) for keep in KEEPS if keep <= LOW]
    claims = [
        Claim.of_differences("with half of the weights kept, magnitude is more accurate", [-x for x in ahead(HALF)]),
        Claim.of_differences("with 10 % kept, movement is more accurate", ahead(TENTH)),
        Claim.of_differences(
            "with 10 % and fewer kept, movement is more accurate in the mean",
            [mean(values) for values in zip(*few, strict=True)],
        ),
        Claim.of_differences(
            "the fewer are kept, the further movement is ahead: at 3 % more than at half",
            [a - b for a, b in zip(ahead(KEEPS[-1]), ahead(HALF), strict=True)],
        ),
        Claim.of_differences(
            "movement keeps fewer of the largest tenth of the weights than magnitude (share of them)",
            [by_size["magnitude"][s][-1] - by_size["movement"][s][-1] for s in seeds],
        ),
    ]
    settings = {
        "network": "LeNet-300-100 without biases, trained on digits", "images": data.about, "steps": steps, "batch": 60,
        "trained on": len(data.train), "counted on": len(data.test), "rate": RATE,
    }  # fmt: skip
    return Findings(
        tables={"accuracy": _table(scores, dense, seeds)},
        figure=figure,
        claims=claims,
        values={"accuracy": _plain(scores), "nothing pruned": dense, "kept by size, tenths from the smallest": by_size},
        settings=settings,
        notes=[
            "Published: BERT base on SQuAD, MNLI and QQP, every layer pruned over 6 to 12 epochs; movement is better "
            "from about 15 % downwards. Scores need such a long training before they say anything: in some dozens of "
            "steps on a pretrained transformer movement is at chance. So a small network stands for it here, "
            "fine-tuned as long as it was trained before. Shares are of each matrix. At half of "
            "the weights neither loses half a point, so that which is ahead would have to be settled on a task that "
            "half of the weights cost more. A seed draws the images, the weights, and the order of the images."
        ],
    )


def _table(scores: Scores, dense: dict[str, float], seeds: Sequence[str]) -> list[list[str]]:
    table = [["kept", *METHODS, "published"], ["all", *[percent([dense[s] for s in seeds])] * 2, ""]]
    for keep in scores[METHODS[0]]:
        expected = "magnitude better" if keep > LOW else "movement better (about)"
        table.append(
            [
                f"{100 * keep:.0f} %",
                *(percent([scores[method][keep][s] for s in seeds]) for method in METHODS),
                expected,
            ]
        )
    return table


def _plain(scores: Scores) -> dict[str, dict[str, dict[str, float]]]:
    return {method: {f"{keep}": by_seed for keep, by_seed in by.items()} for method, by in scores.items()}
