"""Sparse fine-tunings that add: a change for the inputs and one for the labels, and two tasks in one network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from effzoo import peft
from effzoo.errors import DataError
from effzoo.lab.analyses.lenet import LeNet
from effzoo.lab.analyses.seeds import judged, mean, percent
from effzoo.lab.analyses.sums import cosine, shared
from effzoo.lab.analyses.supermasks import task
from effzoo.lab.analyses.tuning import fast_accuracy, tune
from effzoo.lab.draw import LINES, MARKERS, band, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.fit import Examples, accuracy, fit
from effzoo.lab.images import images
from effzoo.lab.texts import DATA, minilm, texts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INPUTS, LABELS = "upside down", "renamed"
KEEPS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
DENSE = "full"
# of the small network: dense, and the entries of lt_sft, whose first stage has a twentieth of it
SMALL_RATE, SPARSE_RATE = 1.2e-3, 5e-3
RATES = {"lt_sft": 4e-3, "full": 2e-4, "lora": 4e-3}
HEAD_RATE = 5e-3
KEEP = 0.02
Scores = dict[str, dict[str, dict[str, float]]]  # method, what is counted, seed


@experiment(
    "sparse_sums", deck=3, data=DATA,
    source="Ansell et al. 2022, Composable sparse fine-tuning, arXiv:2110.07560, sections 3 and 6",
)  # fmt: skip
def sparse_sums(run: Run) -> Findings:
    """Do sparse changes, learned apart, add up to a network that does both, better than dense changes?"""
    length, steps, tests = run.choose((24, 24, 240), (128, 300, 1000))
    small_steps = run.choose(400, 4000)
    methods = run.choose(("lt_sft", "full"), ("lt_sft", "full", "lora"))
    data = texts(run, length=length, train=run.choose(500, 1100), test=tests)
    if len(data.names) < 4:
        raise DataError(
            f"two tasks need two labels each, and these texts have {len(data.names)}: {', '.join(data.names)}; give "
            "texts with four or more"
        )
    halves = (data.train, data.test)
    tasks = {
        "a": tuple(half.at(half.labels < 2) for half in halves),
        "b": tuple(half.at(half.labels >= 2) for half in halves),
    }
    big: Scores = {method: {} for method in methods}
    small: Scores = {}
    geometry: dict[str, dict[str, dict[str, float]]] = {}
    for seed in run.seeds:
        _digits(small_steps, seed, small, geometry)
        model = minilm(len(data.names), seed=seed)
        for method in methods:
            _pair(model, method, tasks, steps, seed, big[method])
        key = str(seed)
        run.say(
            f"seed {seed}: digits, both: "
            + ", ".join(f"{name} {100 * by['sum'][key]:.1f}" for name, by in small.items())
        )
        for method in methods:
            run.say(
                f"        {method}: " + ", ".join(f"{name} {100 * by[key]:.1f}" for name, by in big[method].items())
            )
    seeds = [str(seed) for seed in run.seeds]

    head = [
        "entries",
        INPUTS,
        LABELS,
        "both: the sum",
        "the first alone",
        "the second alone",
        "entries in common",
        "cosine",
        "published",
    ]
    first = [head]
    for name, by in small.items():
        cells = [
            percent([by[what][s] for s in seeds])
            for what in ("inputs", "labels", "sum", "inputs on both", "labels on both")
        ]
        cells += [
            f"{100 * mean([geometry[name][s]['shared'] for s in seeds]):.0f} %",
            f"{mean([geometry[name][s]['cosine'] for s in seeds]):.2f}",
        ]
        first.append([_said(name), *cells, "no number"])
    second = [["method", "a on a", "sum on a", "b on b", "sum on b", "loss by adding", "published"]]
    for method in methods:
        by = big[method]
        cells = [percent([by[what][s] for s in seeds]) for what in ("a on a", "sum on a", "b on b", "sum on b")]
        second.append([f"`{_spec(method)}`", *cells, f"{100 * mean([_lost(by, s) for s in seeds]):.1f}", "no number"])

    best = {s: max(small[f"{keep}"]["sum"][s] for keep in KEEPS if keep <= 0.2) for s in seeds}
    claims = [
        Claim(
            "digits: the sum of two sparse changes (10 % each) does both at once better than either alone",
            judged(
                seeds,
                lambda s: (
                    small["0.1"]["sum"][s] > max(small["0.1"][what][s] for what in ("inputs on both", "labels on both"))
                ),
            ),
        ),
        Claim(
            "digits: sums of sparse changes (the best share up to 20 %) are better than sums of dense ones",
            judged(seeds, lambda s: best[s] > small[DENSE]["sum"][s]),
        ),
        Claim(
            "digits: and so they are at 10 %", judged(seeds, lambda s: small["0.1"]["sum"][s] > small[DENSE]["sum"][s])
        ),
        Claim(
            "MiniLM: adding loses less with sparse changes than with dense ones",
            judged(seeds, lambda s: _lost(big["lt_sft"], s) < _lost(big["full"], s)),
        ),
        Claim(
            "MiniLM: adding sparse changes loses at most 2 points in the mean of the tasks",
            judged(seeds, lambda s: _lost(big["lt_sft"], s) <= 0.02 + 1e-6),
        ),
    ]
    groups_said = [", ".join(data.names[:2]), ", ".join(data.names[2:])]
    settings = {
        "small network": "LeNet-300-100 without biases, trained on digits", "its steps": small_steps, "model": "minilm",
        "length": length, "steps": steps, "batch": 16, "test texts": len(data.test), "task a": groups_said[0],
        "task b": groups_said[1],
    }  # fmt: skip
    return Findings(
        tables={f"digits: {INPUTS} and {LABELS}": first, "MiniLM: two tasks": second},
        figure=_figure(small, big, seeds),
        claims=claims,
        values={"digits": small, "digits, changes": geometry, "minilm": big},
        settings=settings,
        notes=[
            "Published: a change for a language and one for a task, added, in cross-lingual transfer with mBERT and "
            f"XLM-R, better than MAD-X adapters; dense sums are not in its tables. Here {INPUTS} digits stand for the "
            f"language and {LABELS} classes for the task; both at once was never trained. MiniLM: each task has two or "
            "three labels of the same five, and its own head. `full` is dense; the share 100 % is lt_sft with every "
            "entry."
        ],
    )


def _digits(steps: int, seed: int, results: Scores, geometry: dict[str, dict[str, dict[str, float]]]) -> None:
    """The small network: trained on digits, changed for other inputs and for other labels, and by both changes at
    once."""
    digits, key = images(Run()), str(seed)
    height, width = digits.size
    of = {name: [task(name, part) for part in (digits.train, digits.test)] for name in ("digit", INPUTS, LABELS)}
    both = Examples(task(INPUTS, digits.test).inputs, task(LABELS, digits.test).labels)
    model = LeNet(height * width, seed=seed)
    fit(model, of["digit"][0].stream(60, seed), steps, learning_rate=SMALL_RATE, weight_decay=0.0, bfloat16=False)
    for name in (*map(str, KEEPS), DENSE):
        spec = "full[targets=fc.*]" if name == DENSE else f"lt_sft[keep={name},targets=fc.*]"
        rate = SMALL_RATE if name == DENSE else SPARSE_RATE
        options: dict[str, Any] = {"steps": steps, "batch": 60, "seed": seed, "rate": rate, "weight_decay": 0.0}
        scores = results.setdefault(name, {})
        for adapter, kind in (("inputs", INPUTS), ("labels", LABELS)):
            tune(model, spec, of[kind][0], name=adapter, bfloat16=False, **options)
            scores.setdefault(adapter, {})[key] = accuracy(model, of[kind][1], 1024)
            scores.setdefault(f"{adapter} on both", {})[key] = accuracy(model, both, 1024)
        changes = [peft.delta(model, adapter) for adapter in ("inputs", "labels")]
        geometry.setdefault(name, {})[key] = {"shared": shared(*changes), "cosine": cosine(*changes)}
        peft.combine(model, {"inputs": 1.0, "labels": 1.0}, name="both")
        scores.setdefault("sum", {})[key] = accuracy(model, both, 1024)
        for adapter in ("both", "inputs", "labels"):
            peft.detach(model, adapter)


def _pair(
    model: nn.Module,
    method: str,
    tasks: dict[str, tuple[Examples, ...]],
    steps: int,
    seed: int,
    accuracies: dict[str, dict[str, float]],
) -> None:
    """Two tasks of MiniLM, each alone and in the sum, with the head of its own."""
    for name, (train, test) in tasks.items():
        tune(model, _spec(method), train, name=name, steps=steps, seed=seed, rate=RATES[method], head_rate=HEAD_RATE)
        accuracies.setdefault(f"{name} on {name}", {})[str(seed)] = fast_accuracy(model, test)
    for name, (_, test) in tasks.items():
        peft.combine(model, dict.fromkeys(tasks, 1.0), name="sum", head=name)
        accuracies.setdefault(f"sum on {name}", {})[str(seed)] = fast_accuracy(model, test)
        peft.detach(model, "sum")
    for name in tasks:
        peft.detach(model, name)


def _spec(method: str) -> str:
    if method == "lora":
        return "lora[targets=(attn.*,mlp.*)]"
    return f"{method}[keep={KEEP},targets=(attn.*,mlp.*)]" if method == "lt_sft" else "full[targets=(attn.*,mlp.*)]"


def _lost(by: dict[str, dict[str, float]], s: str) -> float:
    """By how much the sum is worse than each change alone, in the mean of the tasks."""
    return sum(by[f"{name} on {name}"][s] - by[f"sum on {name}"][s] for name in ("a", "b")) / 2


def _figure(small: Scores, big: Scores, seeds: Sequence[str]) -> Figure:
    """Left: the small network over the share of entries changed. Right: each task of MiniLM before and after the
    other's change is added."""
    figure, (left, right) = panels(2, width=5)
    x = [100 * keep for keep in KEEPS]
    lines = (
        ("sum", "both at once: the sum"),
        ("inputs", f"{INPUTS}: its change alone"),
        ("labels", f"{LABELS}: its change alone"),
        ("labels on both", f"both at once: {LABELS} alone"),
    )
    for number, (what, label) in enumerate(lines):
        band(left, x, [[100 * small[f"{keep}"][what][s] for keep in KEEPS] for s in seeds], label, number)
    left.axhline(
        100 * mean(small[DENSE]["sum"].values()),
        color=LINES[0],
        linewidth=1.2,
        linestyle=":",
        label="both at once: dense fine-tunings",
    )
    left.set(
        xscale="log",
        xlabel="entries changed, %",
        ylabel="accuracy, %",
        title="digits: inputs and labels, learned apart",
    )
    left.set_xticks(x, [f"{tick:.0f}" for tick in x])
    left.minorticks_off()
    left.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.62))
    for number, (method, by) in enumerate(big.items()):
        for place, name in enumerate(("a", "b")):
            at = [3 * place + 0.12 * number, 3 * place + 1 + 0.12 * number]
            runs = [[100 * by[f"{name} on {name}"][s], 100 * by[f"sum on {name}"][s]] for s in seeds]
            for run in runs:
                right.plot(at, run, color=LINES[number], marker="o", markersize=3.5, linewidth=0.8, alpha=0.45)
            means = [mean(values) for values in zip(*runs, strict=True)]
            right.plot(
                at, means, color=LINES[number], marker=MARKERS[number], linewidth=2, label=None if place else method
            )
    right.set_xticks([0, 1, 3, 4], ["a: alone", "a: sum", "b: alone", "b: sum"])
    right.set(xlim=(-0.4, 4.6), ylabel="accuracy, %", title="MiniLM: two tasks on texts")
    right.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def _said(name: str) -> str:
    return "all, plain fine-tuning" if name == DENSE else f"{100 * float(name):.0f} %"
