"""Adapters by size, and without those of some layers: what each layer's adapter is worth."""

from __future__ import annotations

import functools

import torch

from effzoo import peft
from effzoo.lab.analyses.spans import Span, ablated, spans
from effzoo.lab.analyses.tuning import body_parameters, fast_accuracy, tune
from effzoo.lab.draw import LINES, band, heat, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.texts import DATA, minilm, texts
from effzoo.lab.word_order import word_order

# mean validation accuracy over eight tasks, BERT-large; quoted from memory
SIZES = {8: "about 86.2", 64: "about 85.8", 256: "about 85.7"}
REMOVED = 64  # the bottleneck whose adapters are taken out
RATES = {8: 3e-3, 64: 3e-3, 256: 1e-3}  # of adapters and head; at 3e-3 the widest diverges
LOWER = 4  # layers
LITTLE = 2.0  # points, at most, that a single layer costs in the paper
NEAR = 5.0  # points above the majority class that still count as near it


@experiment(
    "adapter_spans", deck=(2, 4), data=DATA,
    source="Houlsby et al. 2019, arXiv:1902.00751, section 3.6, figure 6 and text",
)  # fmt: skip
def adapter_spans(run: Run) -> Findings:
    """What does it cost to take trained adapters out of some layers, and how wide must they be?"""
    length, steps, batch = 10, run.choose(24, 80), 16
    by_size: dict[int, list[float]] = {size: [] for size in SIZES}
    removed: list[dict[Span, float]] = []
    trained: dict[int, float] = {}
    layers = 0
    for seed in run.seeds:
        data = texts(run, length=length, train=run.choose(400, 1280), test=run.choose(200, 800), seed=seed)
        train, test = word_order(data.train, seed=2 * seed), word_order(data.test, seed=2 * seed + 1)
        model = minilm(2, seed=seed, layers=LOWER)
        layers = model.config.layers
        for size in SIZES:
            torch.manual_seed(seed)
            tune(
                model, f"houlsby[bottleneck={size}]", train, name="task", steps=steps, batch=batch, seed=seed,
                rate=RATES[size], head_rate=RATES[size],
            )  # fmt: skip
            trained[size] = 100 * body_parameters(model) / peft.account(model).total
            by_size[size].append(100 * fast_accuracy(model, test))
            if size == REMOVED:
                score = functools.partial(fast_accuracy, model, test)
                removed.append({span: 100 * left for span, left in ablated(model, score, layers, "task").items()})
            peft.detach(model, "task")
        widths = ", ".join(f"{size} wide {percents[-1]:.1f} %" for size, percents in by_size.items())
        run.say(f"seed {seed}: {widths}; none left {_all(removed[-1]):.1f} %")

    majority = 50.0  # every second text is shuffled
    lost = [
        {span: whole - left for span, left in of_span.items()}
        for whole, of_span in zip(by_size[REMOVED], removed, strict=True)
    ]
    mean = {span: sum(of_span[span] for of_span in lost) / len(lost) for span in spans(layers)}
    figure, (left, right) = panels(2, width=5.2, height=4.0)
    cells = [
        [0.0 - mean[first, last] if (first, last) in mean else None for last in range(layers)]
        for first in range(layers)
    ]
    places = [f"{i}" for i in range(layers)]
    heat(left, cells, places, places, form="{:+.1f}", cmap="viridis", vmin=majority - _mean(by_size[REMOVED]), vmax=0)
    figure.colorbar(left.images[0], ax=left, label="points", shrink=0.8)
    left.set(
        xlabel="last layer taken out", ylabel="first layer taken out",
        title="change of accuracy without the adapters of a span",
    )  # fmt: skip
    lines = {
        "this layer alone": [(i, i) for i in range(layers)],
        f"this layer to layer {layers - 1}": [(i, layers - 1) for i in range(layers)],
        "layer 0 to this layer": [(0, i) for i in range(layers)],
    }
    for number, (label, of_line) in enumerate(lines.items()):
        band(right, range(layers), [[of_span[span] for span in of_line] for of_span in removed], label, number)
    right.axhline(_mean(by_size[REMOVED]), color=LINES[3], linewidth=1, linestyle="--", label="none taken out")
    right.axhline(majority, color="#888888", linewidth=1, linestyle=":", label="chance")
    right.set(xlabel="layer", ylabel="accuracy, %", title="adapters taken out of ...", ylim=(40, 100))
    right.set_xticks(range(layers))
    right.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, -0.42))

    half = layers // 2
    lower, upper = (0, half - 1), (half, layers - 1)
    table = [["adapters taken out", "accuracy", "points lost", "lowest to highest", "published"]]
    table.append(["none", f"{_mean(by_size[REMOVED]):.1f} %", "0", "", ""])
    worst = [max(of_span[i, i] for i in range(layers)) for of_span in lost]
    rows = [(f"layer {i}", (i, i), "at most 2 points") for i in range(layers)]
    rows += [("lower half", lower, "hardly matters (MNLI, layers 0-4)"), ("upper half", upper, "no number")]
    rows += [("all", (0, layers - 1), f"majority: 37 % MNLI, 69 % CoLA; here {majority:.0f} %")]
    for name, span, published in rows:
        points = [of_span[span] for of_span in lost]
        accuracy = _mean([of_span[span] for of_span in removed])
        table.append(
            [name, f"{accuracy:.1f} %", f"{mean[span]:.1f}", f"{min(points):.1f} to {max(points):.1f}", published]
        )
    sizes = [["bottleneck", "trained", "accuracy", "lowest to highest", "published (mean of 8 tasks)"]]
    for size, percents in by_size.items():
        sizes.append(
            [
                f"{size}",
                f"{trained[size]:.2f} %",
                f"{_mean(percents):.1f} %",
                f"{min(percents):.1f} to {max(percents):.1f}",
                SIZES[size],
            ]
        )
    settings = {
        "model": f"minilm, its {LOWER} lower layers", "tokens": length, "task": "word order",
        "texts": len(train), "test texts": len(test),
        "steps": steps, "batch": batch, "learning rates": {f"{size}": rate for size, rate in RATES.items()},
    }  # fmt: skip
    return Findings(
        tables={f"Adapters of width {REMOVED} taken out of a span": table, "Width of the bottleneck": sizes},
        figure=figure,
        claims=[
            Claim.of_differences(
                f"without the adapters of any single layer at most {LITTLE:g} points are lost",
                [LITTLE - points for points in worst],
            ),
            Claim.of_differences(
                f"without any adapter accuracy is within {NEAR:g} points of the majority class's",
                [majority + NEAR - _all(of_span) for of_span in removed],
            ),
            Claim.of_differences(
                "without any adapter more is lost than without those of any one layer",
                [_all(of_span) - high for of_span, high in zip(lost, worst, strict=True)],
            ),
            Claim.of_differences(
                "the adapters of the lower half of the layers are worth less than those of the upper half",
                [of_span[upper] - of_span[lower] for of_span in lost],
            ),
            Claim.of_differences(
                "accuracy at the three widths is within 3 points",
                [3 - (max(widths) - min(widths)) for widths in zip(*by_size.values(), strict=True)],
            ),
        ],
        values={
            "accuracy": {f"{size}": percents for size, percents in by_size.items()},
            "majority": majority,
            "trained percent": {f"{size}": share for size, share in trained.items()},
            "without": {
                str(seed): {f"{a}-{b}": value for (a, b), value in of_span.items()}
                for seed, of_span in zip(run.seeds, removed, strict=True)
            },
        },
        settings=settings,
        notes=[
            "Taken out is all that the method hung in a layer: both bottlenecks and the trained norms. The task head "
            "stays, and nothing is trained again. The task is whether the words of a text stand in their order: topics "
            "a head alone reads off the frozen base. A seed draws the texts to train and to test on, the orders and "
            "all weights; differences are in points. Each width has a rate of its own, as in the paper, which sweeps "
            "it. Published: BERT-base (12 layers) with width 64 on MNLI and CoLA; the accuracies by width are quoted "
            "from memory.",
            "Order is a matter of neighbouring words, which low layers compare, and the base and the head hold some of "
            "it without adapters; there are four layers where the paper has twelve. Whether task or depth makes the "
            "difference would be told by MNLI with 12 layers.",
            "Seeds 0 to 4 could not tell whether the widths differ; these are others, and judge alone.",
        ],
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _all(of_span: dict[Span, float]) -> float:
    """The value of the longest span."""
    return of_span[max(of_span, key=lambda span: span[1] - span[0])]
