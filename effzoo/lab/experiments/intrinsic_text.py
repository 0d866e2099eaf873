"""The intrinsic dimension of telling topics apart, for a pretrained transformer: structure-aware or not, by its depth,
and without pretraining."""

from __future__ import annotations

from statistics import mean
from typing import Any

import effzoo
from effzoo.architectures import Transformer
from effzoo.lab.analyses.intrinsic import crossing, d90
from effzoo.lab.draw import band, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.fit import fit
from effzoo.lab.score import score
from effzoo.lab.texts import DATA, Texts, minilm, texts

# the head too: trained beside the subspace, it would tell topics apart at any d
TARGETS = ("attn.*", "mlp.*", "head.*")
METHODS = {"SAID": "said", "DID": "intrinsic"}
RATE, BASE_RATE = 0.3, 1e-3
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
    depths = run.choose((1, 2), (1, 3, 6))
    dims = run.choose((256, 1024, 4096), (16, 32, 64, 128, 256, 512, 1024, 2048, 4096))
    steps = run.choose(30, 300)
    data = texts(run, length=run.choose(24, 64), train=run.choose(800, 1400), test=run.choose(200, 600))
    ways = [
        (depth, name) for depth in depths for name in (METHODS if depth == depths[0] or not run.quick else ("SAID",))
    ]
    bases: dict[int, list[float]] = {depth: [] for depth in depths}
    curves: dict[tuple[int, str], list[dict[int, float]]] = {way: [] for way in ways}
    for seed in run.seeds:
        for depth in depths:
            bases[depth].append(_reached(data, depth, None, steps, seed))
        for depth, name in ways:
            options: dict[str, Any] = {"name": METHODS[name], "seed": seed, "targets": TARGETS}
            curve = {d: _reached(data, depth, {**options, "dim": d}, steps, seed) for d in dims}
            curves[depth, name].append(curve)
            run.say(
                f"seed {seed}, {depth} layers, {name}: "
                + ", ".join(f"d = {d} {a:.3f}" for d, a in curve.items())
                + f", all {bases[depth][-1]:.3f}"
            )

    nineties = {
        way: [d90(c, b) for c, b in zip(accuracies, bases[way[0]], strict=True)] for way, accuracies in curves.items()
    }
    crossings = {
        way: [crossing(c, b) for c, b in zip(accuracies, bases[way[0]], strict=True)]
        for way, accuracies in curves.items()
    }
    sizes = {depth: _size(len(data.names), depth) for depth in depths}
    table = [
        [
            "layers of MiniLM",
            "D",
            "method",
            "all of D: accuracy",
            *(f"d = {d}" for d in dims),
            "d90 by seed",
            "crossing, mean",
        ]
    ]
    for way in ways:
        between = [x for x in crossings[way] if x is not None]
        table.append(
            [f"{way[0]}", f"{sizes[way[0]]:,}", way[1], f"{mean(bases[way[0]]):.3f}",
            *(f"{mean(c[d] for c in curves[way]):.3f}" for d in dims),
             ", ".join(f"{d or f'> {max(dims)}'}" for d in nineties[way]), f"{mean(between):.0f}" if between else ""]
        )  # fmt: skip
    figure, (axes,) = panels(1, width=6.0, height=4.0)
    for number, way in enumerate(ways):
        share = [[c[d] / b for d in dims] for c, b in zip(curves[way], bases[way[0]], strict=True)]
        band(axes, dims, share, f"{way[1]}, {way[0]} layer{'s' if way[0] > 1 else ''}", number)
    axes.axhline(0.9, color="#888888", linewidth=1, linestyle=":")
    axes.set(xlabel="d", xscale="log", ylabel="share of the accuracy when all of D is trained", ylim=(0, 1.05))
    axes.set_xticks(list(dims), [f"{d}" for d in dims])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    count, deepest, flattest = range(len(run.seeds)), depths[-1], depths[0]
    published = [["published, d90 by SAID / DID", "MRPC", "QQP"], *PUBLISHED]
    settings = {
        "model": "minilm", "layers": list(depths), "data": data.about, "steps": steps, "batch": 16,
        "learning rate": RATE, "learning rate of all": BASE_RATE,
    }  # fmt: skip
    return Findings(
        tables={"accuracy in d dimensions": table, "published": published},
        figure=figure,
        claims=[
            Claim(
                "d90 is less than a thousandth of the number of parameters, for every depth and method",
                tuple(
                    all((d := dims[i]) is not None and d < sizes[way[0]] / 1000 for way, dims in nineties.items())
                    for i in count
                ),
            ),
            Claim(
                f"SAID needs fewer dimensions than DID, {flattest} layer (by the crossing)",
                tuple(_below(crossings[flattest, "SAID"][i], crossings[flattest, "DID"][i]) for i in count),
            ),
            Claim(
                f"the larger model needs fewer dimensions: {deepest} layers fewer than {flattest}, by SAID (by the "
                "crossing)",
                tuple(_below(crossings[deepest, "SAID"][i], crossings[flattest, "SAID"][i]) for i in count),
            ),
        ],
        values={
            "baseline": {str(depth): accuracies for depth, accuracies in bases.items()},
            "accuracy": {f"{name}, {depth}": accuracies for (depth, name), accuracies in curves.items()},
            "d90": {f"{name}, {depth}": accuracies for (depth, name), accuracies in nineties.items()},
            "crossing": {f"{name}, {depth}": dims for (depth, name), dims in crossings.items()},
        },
        settings=settings,
        notes=[
            "Smaller models are the lower layers of MiniLM, of which each was trained within the whole. D: blocks and "
            "head; embeddings stay, and the head moves in the subspace, where it counts. DID is Fastfood without "
            "factors. Published: whole models, pairs of sentences, many more steps; their d90 are of another task and "
            "no target here."
        ],
    )


def _shallow(labels: int, depth: int, seed: int) -> Transformer:
    """The lower layers of MiniLM with its weights, and a fresh head."""
    whole = minilm(labels, seed=seed)
    model = minilm(labels, seed=seed, layers=depth, pretrained=None)
    # strict: all of it is there
    model.load_state_dict({key: value for key, value in whole.state_dict().items() if key in model.state_dict()})
    return model


def _size(labels: int, depth: int) -> int:
    return sum(p.numel() for name, p in _shallow(labels, depth, 0).named_parameters() if _counts(name))


def _counts(name: str) -> bool:
    """Whether a parameter is one of the D: those of the sites that `TARGETS` names."""
    return name.startswith(("blocks.", "head."))


def _reached(data: Texts, depth: int, spec: Any, steps: int, seed: int) -> float:
    """The accuracy of the lower layers trained in all their parameters, or in those of a spec."""
    model = _shallow(len(data.names), depth, seed)
    if spec is not None:
        effzoo.attach(model, spec)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(_counts(name))
    fit(model, data.train.stream(16, seed), steps, learning_rate=BASE_RATE if spec is None else RATE, weight_decay=0.0)
    return score(model, data.test).accuracy


def _below(a: float | None, b: float | None) -> bool:
    return a is not None and (b is None or a < b)
