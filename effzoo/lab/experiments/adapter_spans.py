"""Adapters by size, and without those of some layers: what each layer's adapter is worth."""

from __future__ import annotations

import functools

import torch

from effzoo import peft
from effzoo.lab.analyses.spans import Span, ablated, spans
from effzoo.lab.analyses.tuning import body_parameters, fast_accuracy, tune
from effzoo.lab.draw import band, heat, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.texts import DATA, minilm, texts

# mean validation accuracy over eight tasks, BERT-large; quoted from memory
SIZES = {8: "about 86.2", 64: "about 85.8", 256: "about 85.7"}
REMOVED = 64  # the bottleneck whose adapters are taken out
LITTLE = 2.0  # points, at most, that a single layer costs in the paper
NEAR = 5.0  # points above the majority class that still count as near it


@experiment(
    "adapter_spans", deck=(2, 4), data=DATA,
    source="Houlsby et al. 2019, arXiv:1902.00751, section 3.6, figure 6 and text",
)  # fmt: skip
def adapter_spans(run: Run) -> Findings:
    """What does it cost to take trained adapters out of some layers, and how wide must they be?"""
    length, steps, batch = run.choose(32, 64), run.choose(40, 300), 16
    data = texts(run, length=length, train=run.choose(480, 1200), test=run.choose(200, 1000))
    majority = 100 * float(data.test.labels.bincount().max()) / len(data.test)
    by_size: dict[int, list[float]] = {size: [] for size in SIZES}
    removed: list[dict[Span, float]] = []
    trained: dict[int, float] = {}
    layers = 0
    for seed in run.seeds:
        model = minilm(len(data.names), seed=seed)
        layers = model.config.layers
        for size in SIZES:
            torch.manual_seed(seed)
            tune(model, f"houlsby[bottleneck={size}]", data.train, name="task", steps=steps, batch=batch, seed=seed)
            trained[size] = 100 * body_parameters(model) / peft.account(model).total
            by_size[size].append(100 * fast_accuracy(model, data.test))
            if size == REMOVED:
                score = functools.partial(fast_accuracy, model, data.test)
                removed.append({span: 100 * left for span, left in ablated(model, score, layers, "task").items()})
            peft.detach(model, "task")
        widths = ", ".join(f"{size} wide {percents[-1]:.1f} %" for size, percents in by_size.items())
        run.say(f"seed {seed}: {widths}; none left {_all(removed[-1]):.1f} %")

    lost = [
        {span: whole - left for span, left in of_span.items()}
        for whole, of_span in zip(by_size[REMOVED], removed, strict=True)
    ]
    mean = {span: sum(of_span[span] for of_span in lost) / len(lost) for span in spans(layers)}
    figure, (left, right) = panels(2, width=5.0)
    cells = [
        [0.0 - mean[first, last] if (first, last) in mean else None for last in range(layers)]
        for first in range(layers)
    ]
    heat(
        left,
        cells,
        [f"{i}" for i in range(layers)],
        [f"{i}" for i in range(layers)],
        form="{:+.1f}",
        cmap="magma",
        vmax=0,
    )
    left.set(
        xlabel="last layer of the span", ylabel="first layer", title="change without the adapters of a span, points"
    )
    band(right, range(layers), [[of_span[i, i] for i in range(layers)] for of_span in lost], "one layer", 0)
    band(right, range(layers), [[of_span[0, i] for i in range(layers)] for of_span in lost], "layers 0 to this one", 1)
    band(
        right,
        range(layers),
        [[of_span[i, layers - 1] for i in range(layers)] for of_span in lost],
        f"this layer to {layers - 1}",
        2,
    )
    right.axhline(LITTLE, color="#888888", linewidth=0.8, linestyle=":")
    right.set(xlabel="layer", ylabel="points of accuracy lost", title="mean and range over seeds")
    right.legend(frameon=False, fontsize=8)

    half = layers // 2
    lower, upper = (0, half - 1), (half, layers - 1)
    table = [["adapters taken out", "accuracy", "points lost", "lowest to highest", "published"]]
    table.append(["none", f"{_mean(by_size[REMOVED]):.1f} %", "0", "", ""])
    worst = [max(of_span[i, i] for i in range(layers)) for of_span in lost]
    lines = [(f"layer {i}", (i, i), "at most 2 points") for i in range(layers)]
    lines += [("lower half", lower, "hardly matters (MNLI, layers 0-4)"), ("upper half", upper, "no number")]
    lines += [("all", (0, layers - 1), f"majority: 37 % MNLI, 69 % CoLA; here {majority:.1f} %")]
    for name, span, published in lines:
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
        "model": "minilm", "tokens": length, "texts": len(data.train), "test texts": len(data.test), "steps": steps,
        "batch": batch,
    }  # fmt: skip
    return Findings(
        tables={f"Adapters of width {REMOVED} taken out of a span": table, "Width of the bottleneck": sizes},
        figure=figure,
        claims=[
            Claim(
                f"without the adapters of any single layer at most {LITTLE:g} points are lost",
                tuple(points <= LITTLE for points in worst),
            ),
            Claim(
                f"without any adapter accuracy is within {NEAR:g} points of the majority class's",
                tuple(_all(of_span) <= majority + NEAR for of_span in removed),
            ),
            Claim(
                "without any adapter more is lost than without those of any one layer",
                tuple(_all(of_span) > high for of_span, high in zip(lost, worst, strict=True)),
            ),
            Claim(
                "the adapters of the lower half of the layers are worth less than those of the upper half",
                tuple(of_span[lower] < of_span[upper] for of_span in lost),
            ),
            Claim(
                "accuracy at the three widths is within 3 points",
                tuple(max(widths) - min(widths) <= 3 for widths in zip(*by_size.values(), strict=True)),
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
            "stays, and nothing is trained again. Adapters and head learn at one rate, as in the paper; the faster a "
            "new head learns, the less it leaves to them on topics that the base tells apart already. Published: "
            "BERT-base with width 64; the accuracies by width are quoted from memory."
        ],
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _all(of_span: dict[Span, float]) -> float:
    """The value of the longest span."""
    return of_span[max(of_span, key=lambda span: span[1] - span[0])]
