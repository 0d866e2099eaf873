"""The intrinsic dimension of telling topics apart, for the lower layers of a pretrained transformer: structure-aware or
not."""

from __future__ import annotations

import math
from statistics import mean
from typing import Any

import effzoo
from effzoo.lab.analyses.intrinsic import crossing, d90
from effzoo.lab.draw import band, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.fit import fit
from effzoo.lab.score import score
from effzoo.lab.texts import DATA, Texts, minilm, texts

# the head too: trained beside the subspace, it would tell topics apart at any d
TARGETS = ("attn.*", "mlp.*", "head.*")
METHODS = {"SAID": "said", "DID": "intrinsic"}
RATE, BASE_RATE, LAYERS = 0.3, 1e-3, 1
PUBLISHED = [
    ["BERT-base", "1608 / 1861", "8030 / 9295"],
    ["BERT-large", "1037 / 2493", "1200 / 1389"],
    ["RoBERTa-base", "896 / 1000", "896 / 1389"],
    ["RoBERTa-large", "207 / 322", "774 / 774"],
]


@experiment(
    "intrinsic_text", deck=(1, 3), data=DATA,
    source="Aghajanyan et al. 2020, Intrinsic dimensionality, arXiv:2012.13255, table 1 and figure 1",
)  # fmt: skip
def intrinsic_text(run: Run) -> Findings:
    """In how many directions must a pretrained transformer be fine-tuned, with one factor for each layer and
    without?"""
    dims, steps, length = run.choose((512, 2048), (512, 1024, 2048)), run.choose(30, 40), 16
    bases: list[float] = []
    curves: dict[str, list[dict[int, float]]] = {name: [] for name in METHODS}
    for seed in run.seeds:
        data = texts(run, length=length, train=run.choose(800, 1300), test=run.choose(200, 800), seed=seed)
        bases.append(_reached(data, None, steps, seed))
        for name, method in METHODS.items():
            options: dict[str, Any] = {"name": method, "seed": seed, "targets": TARGETS}
            curve = {d: _reached(data, {**options, "dim": d}, steps, seed) for d in dims}
            curves[name].append(curve)
            run.say(
                f"seed {seed}, {name}: "
                + ", ".join(f"d = {d} {a:.3f}" for d, a in curve.items())
                + f", all {bases[-1]:.3f}"
            )

    model = minilm(len(data.names), layers=LAYERS)
    size = sum(p.numel() for name, p in model.named_parameters() if _counts(name))
    crossings = {
        name: [crossing(c, b) for c, b in zip(accuracies, bases, strict=True)] for name, accuracies in curves.items()
    }
    table = [["method", "all of D: accuracy", *(f"d = {d}" for d in dims), "d90 by seed", "crossing, mean"]]
    for name, of_seeds in curves.items():
        between = [x for x in crossings[name] if x is not None]
        nineties = [d90(c, b) for c, b in zip(of_seeds, bases, strict=True)]
        table.append(
            [name, f"{mean(bases):.3f}", *(f"{mean(c[d] for c in of_seeds):.3f}" for d in dims),
             ", ".join(f"{d or f'> {max(dims)}'}" for d in nineties), f"{mean(between):.0f}" if between else ""]
        )  # fmt: skip
    figure, (axes,) = panels(1, width=6.0, height=4.0)
    for number, (name, of_seeds) in enumerate(curves.items()):
        share = [[c[d] / b for d in dims] for c, b in zip(of_seeds, bases, strict=True)]
        band(axes, dims, share, name, number)
    axes.axhline(0.9, color="#888888", linewidth=1, linestyle=":")
    axes.axvline(size / 1000, color="#888888", linewidth=1, linestyle="--", label="D / 1000")
    axes.set(xlabel="d", xscale="log", ylabel="share of the accuracy when all of D is trained")
    axes.set(title=f"layers of MiniLM: {LAYERS}, D = {size:,}; mean and range over seeds")
    axes.set_xticks(list(dims), [f"{d}" for d in dims])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    found = {name: [max(dims) if d is None else d for d in of_seeds] for name, of_seeds in crossings.items()}
    published = [["published, d90 by SAID / DID", "MRPC", "QQP"], *PUBLISHED]
    settings = {
        "model": f"minilm, {LAYERS} layers", "D": size, "data": data.about, "tokens": length,
        "test texts": len(data.test), "steps": steps, "batch": 16, "learning rate": RATE,
        "learning rate of all": BASE_RATE,
    }  # fmt: skip
    return Findings(
        tables={"accuracy in d dimensions": table, "published": published},
        figure=figure,
        claims=[
            Claim.of_differences(
                "d90 is less than a thousandth of the number of parameters, by SAID and by DID (by the crossing)",
                [math.log(size / 1000 / max(of_seed)) for of_seed in zip(*found.values(), strict=True)],
            ),
            Claim.of_differences(
                "SAID needs fewer dimensions than DID (by the crossing)",
                [math.log(b / a) for a, b in zip(found["SAID"], found["DID"], strict=True)],
            ),
        ],
        values={"baseline": bases, "accuracy": curves, "crossing": crossings},
        settings=settings,
        notes=[
            "D: blocks and head; embeddings stay, and the head moves in the subspace, where it counts. DID is Fastfood "
            "without factors. The crossing lies between two d tried, on a straight line over log d; differences are "
            "of its logarithm, and where no d tried reaches 90 %, the largest stands for it. Published: whole "
            "models, pairs of sentences, many more steps; their d90 are of another task and no target here. That a "
            "larger model needs fewer dimensions is not asked: it takes two that were pretrained alike, and lower "
            "layers of one are no smaller model. Seeds draw texts, head and directions.",
            "Seeds 0 to 4 could not tell whether DID too needs less than a thousandth; these are others, and judge "
            "alone. 40 steps leave every subspace short of what it reaches.",
        ],
    )


def _counts(name: str) -> bool:
    """Whether a parameter is one of the D: those of the sites that `TARGETS` names."""
    return name.startswith(("blocks.", "head."))


def _reached(data: Texts, spec: Any, steps: int, seed: int) -> float:
    """The accuracy of the layers trained in all their parameters, or in those of a spec."""
    model = minilm(len(data.names), seed=seed, layers=LAYERS)
    if spec is not None:
        effzoo.attach(model, spec)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(_counts(name))
    fit(model, data.train.stream(16, seed), steps, learning_rate=BASE_RATE if spec is None else RATE, weight_decay=0.0)
    return score(model, data.test).accuracy
