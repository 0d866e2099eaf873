"""Adapters and full fine-tuning over learning rates, and with few examples."""

from __future__ import annotations

from statistics import mean, pstdev

import torch

from effzoo import peft
from effzoo.architectures import Transformer
from effzoo.errors import TrainingError
from effzoo.lab.analyses.tuning import fast_accuracy, tune
from effzoo.lab.draw import band, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.fit import Examples
from effzoo.lab.texts import DATA, minilm, texts

METHODS = {"full": "freeze[first=0]", "adapter": "houlsby[bottleneck=64]"}
HEAD = "head alone"
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
USED = {"full": 3e-4, "adapter": 1e-2}  # with few texts
HEAD_RATE = 3e-3
LOWER = 2  # layers
PLATEAU = 0.05  # of accuracy, below the best rate
WITHIN = 0.02


@experiment(
    "learning_rates", deck=3, data=DATA,
    source="He et al. 2021, On the effectiveness of adapter-based tuning, arXiv:2106.03164; Houlsby et al. 2019, "
    "arXiv:1902.00751, appendix",
)  # fmt: skip
def learning_rates(run: Run) -> Findings:
    """How much does accuracy depend on the learning rate, and on the number of training texts, with adapters and with
    full fine-tuning?"""
    length, steps = 10, run.choose(10, 150)
    few = (32, 128)
    by_rate: dict[str, list[list[float]]] = {name: [] for name in METHODS}  # [seeds][rates]
    by_count: dict[str, list[list[float]]] = {name: [] for name in METHODS}  # [seeds][counts]
    head: list[float] = []
    for seed in run.seeds:
        data = texts(run, length=length, train=run.choose(300, 1280), test=run.choose(200, 800), seed=seed)
        train, test = data.train, data.test
        model = minilm(len(data.names), seed=seed, layers=LOWER)
        head.append(_reached(model, "head", train, test, HEAD_RATE, steps, seed))
        for name in METHODS:
            reached = [_reached(model, METHODS[name], train, test, rate, steps, seed) for rate in RATES]
            by_rate[name].append(reached)
            by_count[name].append(
                [_reached(model, METHODS[name], train.at(slice(0, n)), test, USED[name], steps, seed) for n in few]
                + [reached[RATES.index(USED[name])]]
            )
        run.say(f"seed {seed}: " + "; ".join(
            f"{name} {' '.join(f'{100 * x:.1f}' for x in by_rate[name][-1])}, with few texts "
            + " ".join(f"{100 * x:.1f}" for x in by_count[name][-1]) for name in METHODS
        ))  # fmt: skip

    counts = (*few, len(train))
    plateau = {name: [sum(x > max(of) - PLATEAU for x in of) for of in by_rate[name]] for name in METHODS}
    spread = {name: [pstdev(of) for of in by_rate[name]] for name in METHODS}
    best = {name: [max(of) for of in by_rate[name]] for name in METHODS}
    table = [["learning rate", *(f"{name}, %" for name in METHODS), "published"]]
    for place, rate in enumerate(RATES):
        table.append([f"{rate:g}", *(_cell([of[place] for of in by_rate[name]]) for name in METHODS), ""])
    table.append([HEAD, *[_cell(head)] * len(METHODS), ""])
    table.append(["standard deviation over rates", *(_cell(spread[name]) for name in METHODS), "smaller with adapters"])
    within = f"rates within {100 * PLATEAU:g} points of the best"
    table.append([within, *(f"{mean(plateau[name]):.1f} of {len(RATES)}" for name in METHODS), ""])
    texts_table = [["training texts", *(f"{name}, %" for name in METHODS), "adapter - full, points", "published"]]
    pairs = zip(by_count["adapter"], by_count["full"], strict=True)
    gains = [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]
    for place, n in enumerate(counts):
        points = 100 * mean(gain[place] for gain in gains)
        said = "adapters better" if not place else ""
        texts_table.append(
            [f"{n}", *(_cell([of[place] for of in by_count[name]]) for name in METHODS), f"{points:+.1f}", said]
        )

    figure, (left, right) = panels(2, sharey=True)
    for number, name in enumerate(METHODS):
        band(left, RATES, [[100 * x for x in of] for of in by_rate[name]], name, number)
        band(right, counts, [[100 * x for x in of] for of in by_count[name]], f"{name}, rate {USED[name]:g}", number)
    left.set(xscale="log", xlabel="learning rate", ylabel="accuracy, %", title="mean and range over seeds")
    right.set_xscale("log", base=2)
    right.set_xticks(counts, [f"{n}" for n in counts])
    right.set(xlabel="training texts", title="few texts, as many steps")
    for axes in (left, right):
        axes.axhline(100 * mean(head), color="#888888", linewidth=1, linestyle=":", label=HEAD)
        axes.legend(frameon=False, fontsize=8, loc="lower left")
    seeds = range(len(run.seeds))
    return Findings(
        tables={"Accuracy by learning rate": table, "Accuracy by number of training texts": texts_table},
        figure=figure,
        claims=[
            Claim.of_differences(
                "over the rates accuracy varies less with adapters (standard deviation)",
                [spread["full"][i] - spread["adapter"][i] for i in seeds],
            ),
            Claim.of_differences(
                f"more rates are within {100 * PLATEAU:g} points of the best one with adapters",
                [float(plateau["adapter"][i] - plateau["full"][i]) for i in seeds],
            ),
            Claim.of_differences(
                "the mean accuracy over the rates is higher with adapters",
                [mean(by_rate["adapter"][i]) - mean(by_rate["full"][i]) for i in seeds],
            ),
            Claim.of_differences(
                f"each at its best rate, adapters are within {100 * WITHIN:g} points of full fine-tuning",
                [WITHIN - (best["full"][i] - best["adapter"][i]) for i in seeds],
            ),
            Claim.of_differences(
                "adapters at their best rate are better than the head alone",
                [best["adapter"][i] - head[i] for i in seeds],
            ),
            Claim.of_differences(
                f"with {counts[0]} texts adapters are better than full fine-tuning", [gain[0] for gain in gains]
            ),
        ],
        values={"head alone": head, "accuracy by rate": by_rate, "accuracy by number of texts": by_count},
        settings={
            "model": f"minilm, its {LOWER} lower layers", "task": "topics", "tokens": length, "steps": steps,
            "batch": 16, "rates": list(RATES), "rate of the head": HEAD_RATE, "texts": len(train),
            "test texts": len(test), "training texts": list(counts),
        },
        notes=[
            "Both methods are trained at the same rates, over more than two decades, so that each has its best one "
            "among them; the head, which is new, has one rate throughout. Full fine-tuning leaves the embeddings as "
            "they are. Published in figures, quoted from memory: 20 runs, rates up to 1e-4 (He et al.) and 1e-3 "
            "(Houlsby et al.), adapters better over more of them; and adapters better with few examples. A seed draws "
            "the texts to train and to test on, and all weights. A run whose loss is no number counts as the share of "
            "the most frequent topic.",
            "Seeds 0 to 4 could not tell which is better with few texts; these are others, and judge alone: full "
            "fine-tuning is. Twenty seeds would tell the means over the rates apart, and the best rates.",
        ],
    )  # fmt: skip


def _reached(
    model: Transformer, spec: str, train: Examples, test: Examples, rate: float, steps: int, seed: int
) -> float:
    torch.manual_seed(seed)
    try:
        tune(model, spec, train, name="tried", steps=steps, seed=seed, rate=rate, head_rate=HEAD_RATE)
        return fast_accuracy(model, test)
    except TrainingError:
        return float(test.labels.bincount().max()) / len(test)
    finally:
        peft.detach(model, "tried")


def _cell(values: list[float]) -> str:
    return f"{100 * mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"
