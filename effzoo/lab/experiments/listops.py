"""ListOps: every attention kind in the same small encoder, beside what Long Range Arena published at full scale."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch

from effzoo.builder import build
from effzoo.lab.analyses.threads import one_thread
from effzoo.lab.draw import LINES, panels
from effzoo.lab.experiment import Claim, Findings, Run, Table, experiment
from effzoo.lab.fit import Examples, accuracy, fit
from effzoo.tasks import ListOps
from effzoo.tasks.listops import VOCABULARY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = {  # options that suit sequences of 49 to 65 positions
    "full": "full", "blockwise": "blockwise[blocks=2]", "longformer": "longformer[window=16]",
    "local": "local[chunk=8]",
    "lsh": "lsh[rounds=4,chunk=8]", "linformer": "linformer[k=16]", "perceiver": "perceiver[latents=16]",
}  # fmt: skip
# Tay et al. 2020, table 1
PUBLISHED = {"full": 36.37, "longformer": 35.63, "linformer": 35.70, "lsh": 37.27, "local": 15.82}
CHANCE = 0.1


@experiment("listops", deck=4, source="Tay et al. 2020, Long Range Arena, arXiv:2011.04006, table 1")
def listops(run: Run) -> Findings:
    """How well does each attention kind evaluate nested expressions?"""
    longest, train, test = run.choose((40, 4_000, 800), (64, 20_000, 2_000))
    steps, batch, dim = run.choose((230, 32, 64), (2_000, 64, 64))
    task = ListOps(depth=run.choose(3, 4), arguments=4, shortest=5, longest=longest)
    ids, mask, labels = task.examples(train + test, seed=0)
    whole = Examples({"input_ids": ids, "attention_mask": mask}, labels)
    learned, judged = whole.at(slice(0, train)), whole.at(slice(train, None))
    guess = float((judged.labels == learned.labels.mode().values).float().mean())
    accuracies: dict[str, dict[str, float]] = {}
    losses: dict[str, dict[str, float]] = {}
    with one_thread():
        for seed, (name, spec) in itertools.product(run.seeds, KINDS.items()):
            torch.manual_seed(seed)
            model = build(
                "bert", attention=spec, task="classification", num_labels=10, layers=2, dim=dim, heads=4, mlp=2 * dim,
                vocab=len(VOCABULARY),
                max_length=longest + 1, dropout=0.0, attention_dropout=0.0, norm="pre", types=0, pad_token=0,
            )  # fmt: skip
            loss = fit(model, learned.stream(batch, seed), steps, learning_rate=1e-3, bfloat16=False)
            accuracies.setdefault(str(seed), {})[name] = accuracy(model, judged, 500)
            losses.setdefault(str(seed), {})[name] = sum(loss[-20:]) / len(loss[-20:])
            run.say(
                f"seed {seed}, {name}: {100 * accuracies[str(seed)][name]:.1f} %, loss {losses[str(seed)][name]:.2f}"
            )
    of_seeds = list(accuracies.values())
    worst = tuple(min(by.values()) == by["local"] for by in of_seeds)
    settings = {
        "depth": task.depth, "longest": longest, "train": train, "test": test, "steps": steps, "batch": batch,
        "layers": 2, "dim": dim, "kinds": ", ".join(KINDS.values()),
    }  # fmt: skip
    return Findings(
        tables={"Accuracy on ListOps, %": _table(of_seeds)},
        figure=_figure(of_seeds, guess),
        claims=[
            Claim(
                "every kind is above chance and above the most frequent value",
                tuple(min(by.values()) > max(CHANCE, guess) for by in of_seeds),
            ),
            Claim("local attention is the worst of all kinds, as in Long Range Arena", worst),
            Claim(
                "Longformer, Linformer and LSH are within 5 points of full attention, as there",
                tuple(
                    all(abs(by[name] - by["full"]) <= 0.05 for name in ("longformer", "linformer", "lsh"))
                    for by in of_seeds
                ),
            ),
        ],
        values={"accuracy": accuracies, "loss": losses, "most frequent value": guess, "published": PUBLISHED},
        settings=settings,
        notes=[
            "Long Range Arena: depth 10, 501 to 1,999 tokens, 4 layers of 512, 5,000 steps; here the same grammar on "
            "short expressions and a small model, so that only the order of the kinds can be compared. Chance is 10 %; "
            f"the most frequent value is right in {100 * guess:.1f} %.",
            "The class is read from the first position, which in `local` sees its own chunk alone, whatever the depth.",
            "A seed draws weights and the order of examples; the expressions are the same.",
        ],
    )


def _table(of_seeds: list[dict[str, float]]) -> Table:
    table: Table = [["attention", "here, mean", "lowest seed", "highest seed", "published (full scale)"]]
    for name, spec in KINDS.items():
        percents = [100 * by[name] for by in of_seeds]
        published = f"{PUBLISHED[name]:.2f}" if name in PUBLISHED else "no number"
        table.append(
            [
                f"`{spec}`",
                f"{sum(percents) / len(percents):.1f}",
                f"{min(percents):.1f}",
                f"{max(percents):.1f}",
                published,
            ]
        )
    return table


def _figure(of_seeds: list[dict[str, float]], guess: float) -> Figure:
    figure, (axes,) = panels(1, width=7.2, height=3.8)
    places = range(len(KINDS))
    means = [100 * sum(by[name] for by in of_seeds) / len(of_seeds) for name in KINDS]
    axes.bar(places, means, width=0.6, color=LINES[0], alpha=0.75, label="here, mean")
    style: dict[str, Any] = {"linestyle": "", "marker": "_", "markersize": 14, "color": "#000000"}
    for number, by in enumerate(of_seeds):
        axes.plot(places, [100 * by[name] for name in KINDS], label=None if number else "a seed", **style)
    published = [(place, PUBLISHED[name]) for place, name in enumerate(KINDS) if name in PUBLISHED]
    axes.plot(
        *zip(*published, strict=True),
        linestyle="",
        marker="D",
        markersize=7,
        color=LINES[1],
        label="published, Long Range Arena",
    )
    axes.axhline(100 * CHANCE, color="#666666", linewidth=1, linestyle="--", label="chance")
    axes.axhline(100 * guess, color="#666666", linewidth=1, linestyle=":", label="most frequent value")
    axes.set_xticks(places, list(KINDS))
    axes.grid(visible=False, axis="x")
    axes.set(ylabel="accuracy, %")
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=9, ncols=3, loc="outside lower center")
    return figure
