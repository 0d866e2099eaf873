"""Freezing the first layers, and the last layers against adapters of as many parameters."""

from __future__ import annotations

from effzoo import peft
from effzoo.lab.analyses.seeds import mean, percent
from effzoo.lab.analyses.tuning import body_parameters, fast_accuracy, tune
from effzoo.lab.draw import band, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.texts import DATA, minilm, texts
from effzoo.lab.word_order import word_order

DEPTH = 4  # layers, so that one of them is a fourth
FROZEN = (0, 2, 3, 4)
BUDGETS = {"as many as the last layer": 1, "a thirtieth of it": 30}
# for some dozens of steps: more than the methods take on their own; wide adapters diverge at the rate of narrow ones
RATE, HEAD_RATE, ADAPTER_RATES = 2e-4, 3e-3, {1: 1e-3, 30: 3e-3}
REACHED = 0.9


@experiment(
    "freezing", deck=4, data=DATA,
    source="Lee et al. 2019, What would Elsa do?, arXiv:1911.03090, section 4; Houlsby et al. 2019, "
    "arXiv:1902.00751, figures 1 and 4",
)  # fmt: skip
def freezing(run: Run) -> Findings:
    """How many of the first layers can stay frozen, and do adapters use the same number of parameters better than the
    last layers do?"""
    length, steps = 10, run.choose(16, 60)
    accuracies: dict[str, list[float]] = {}  # by setting, one for each seed
    counts: dict[str, int] = {}
    specs: dict[str, str] = {}
    for seed in run.seeds:
        data = texts(run, length=length, train=run.choose(300, 1280), test=run.choose(200, 800), seed=seed)
        train, test = word_order(data.train, seed=2 * seed), word_order(data.test, seed=2 * seed + 1)
        model = minilm(2, seed=seed, layers=DEPTH)
        settings = [(f"first {first} frozen", f"freeze[first={first}]", RATE) for first in FROZEN]
        layer = sum(parameter.numel() for parameter in model.blocks[-1].parameters())
        settings += [
            (f"houlsby, {name}", str(peft.within(model, "houlsby", layer // part)), ADAPTER_RATES[part])
            for name, part in BUDGETS.items()
        ]
        for name, spec, rate in settings:
            tune(model, spec, train, name="tried", steps=steps, seed=seed, rate=rate, head_rate=HEAD_RATE)
            counts[name], specs[name] = body_parameters(model), spec
            accuracies.setdefault(name, []).append(fast_accuracy(model, test))
            peft.detach(model, "tried")
        run.say(f"seed {seed}: " + ", ".join(f"{name} {100 * of[-1]:.1f}" for name, of in accuracies.items()))

    whole, half, top, head = (accuracies[f"first {first} frozen"] for first in FROZEN)
    equal, small = (accuracies[f"houlsby, {name}"] for name in BUDGETS)
    published = {
        f"first {DEPTH - 1} frozen": "90 % with a fourth of the layers trained",
        "houlsby, a thirtieth of it": "no number (curves)",
    }
    table = [["trained", "spec", "parameters", "accuracy", "of full fine-tuning", "published"]]
    for name, of_seeds in accuracies.items():
        relative = mean([a / b for a, b in zip(of_seeds, whole, strict=True)])
        table.append(
            [name, f"`{specs[name]}`", f"{counts[name]:,}", percent(of_seeds), f"{100 * relative:.1f} %",
             published.get(name, "")]
        )  # fmt: skip

    figure, (left, right) = panels(2, sharey=True)
    in_percent = {name: [100 * value for value in of_seeds] for name, of_seeds in accuracies.items()}
    by_depth = [in_percent[f"first {first} frozen"] for first in FROZEN]
    band(left, FROZEN, list(zip(*by_depth, strict=True)), "freeze the first ...", 0)
    left.axhline(
        100 * REACHED * mean(whole), color="#888888", linewidth=0.9, linestyle=":", label="90 % of full fine-tuning"
    )
    left.set(
        xlabel=f"frozen layers of {DEPTH} (embeddings too)", ylabel="accuracy, %", title="freezing from below",
        xticks=FROZEN,
    )  # fmt: skip
    left.legend(frameon=False, fontsize=8, loc="lower left")
    for number, (label, names) in enumerate({
        "last layers": [f"first {first} frozen" for first in FROZEN if first < DEPTH][::-1],
        "houlsby": [f"houlsby, {name}" for name in BUDGETS][::-1],
    }.items()):  # fmt: skip
        runs = list(zip(*(in_percent[name] for name in names), strict=True))
        band(right, [counts[name] for name in names], runs, label, number)
    right.axhline(100 * mean(head), color="#888888", linewidth=0.9, linestyle="--", label="head alone")
    right.axvline(layer, color="#888888", linewidth=0.9, linestyle=":", label="one layer")
    right.set(xscale="log", xlabel="trained parameters (without the head)", title="layers against adapters")
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(0.0, 0.5))

    return Findings(
        tables={"accuracy": table},
        figure=figure,
        claims=[
            Claim.of_differences(
                f"with {DEPTH - 2} of {DEPTH} layers frozen, 90 % of full fine-tuning is reached",
                [a - REACHED * b for a, b in zip(half, whole, strict=True)],
            ),
            Claim.of_differences(
                f"with {DEPTH - 1} of {DEPTH} layers frozen, a fourth trained, it is too",
                [a - REACHED * b for a, b in zip(top, whole, strict=True)],
            ),
            Claim.of_differences(
                "with all of them frozen, the head alone trained, it is not",
                [REACHED * b - a for a, b in zip(head, whole, strict=True)],
            ),
            Claim.of_differences(
                "adapters (houlsby) with as many parameters as the last layer are better than the last layer",
                [a - b for a, b in zip(equal, top, strict=True)],
            ),
            Claim.of_differences(
                "with a thirtieth of them they are better too", [a - b for a, b in zip(small, top, strict=True)]
            ),
        ],
        values={"accuracy": accuracies, "parameters": counts, "specs": specs},
        settings={
            "model": f"minilm, its {DEPTH} lower layers", "task": "word order", "length": length, "steps": steps,
            "batch": 16, "train texts": len(train), "test texts": len(test), "learning rates":
            f"layers {RATE}, adapters {ADAPTER_RATES[1]} and {ADAPTER_RATES[30]}, head {HEAD_RATE}",
        },
        notes=[
            "The task is whether the words of a text stand in their order: topics a head alone reads off the frozen "
            "base. Published: BERT and RoBERTa on GLUE and IMDb, trained for epochs; in Houlsby's figure, over nine "
            "GLUE tasks, adapters hold their accuracy over two orders of magnitude while the last layers lose much. A "
            "seed draws the texts to train and to test on, and all weights. Embeddings are frozen throughout. "
            "Parameters are those without the task head, which every setting trains.",
            "Order is a matter of neighbouring words, which low layers compare; the paper's tasks are of sentences. "
            "Whether the last fourth suffices there would be told by GLUE with 12 layers.",
        ],
    )  # fmt: skip
