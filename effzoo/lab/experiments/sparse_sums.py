"""Sparse fine-tunings that add: a change for the inputs and one for the labels, and two tasks in one network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from effzoo import peft
from effzoo.lab.analyses.lenet import LeNet
from effzoo.lab.analyses.seeds import mean, percent
from effzoo.lab.analyses.sums import cosine, shared
from effzoo.lab.analyses.supermasks import task
from effzoo.lab.analyses.tuning import fast_accuracy, tune
from effzoo.lab.draw import LINES, MARKERS, band, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.fit import Examples, accuracy, fit
from effzoo.lab.images import DATA, Images, images
from effzoo.lab.texts import minilm, texts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INPUTS, LABELS = "upside down", "renamed"
KEEPS = (0.02, 0.1, 0.5)
SPARSE = "0.1"  # of the claims: the paper's changes have about as much
DENSE, LOW_RANK = "full", "lora"
# of the small network
SPECS = {f"{keep}": f"lt_sft[keep={keep},targets=fc.*]" for keep in KEEPS}
SPECS |= {LOW_RANK: "lora[rank=16,targets=fc.*]", DENSE: "full[targets=fc.*]"}
# of the small network: dense, and the entries of lt_sft, whose first stage has a twentieth of it
SMALL_RATE, SPARSE_RATE = 1.2e-3, 5e-3
RATES = {"lt_sft": 4e-3, "full": 2e-4}
HEAD_RATE = 5e-3
KEEP, LENGTH = 0.02, 24
Scores = dict[str, dict[str, dict[str, float]]]  # method, what is counted, seed


@experiment(
    "sparse_sums", deck=3, data=DATA,
    source="Ansell et al. 2022, Composable sparse fine-tuning, arXiv:2110.07560, sections 3 and 6",
)  # fmt: skip
def sparse_sums(run: Run) -> Findings:
    """Do sparse changes, learned apart, add up to a network that does both, better than low-rank and dense changes?"""
    small_steps, (depth, steps, tests) = run.choose(150, 250), run.choose((2, 24, 240), (3, 40, 800))
    methods = ("lt_sft", "full")
    big: Scores = {method: {} for method in methods}
    small: Scores = {}
    geometry: dict[str, dict[str, dict[str, float]]] = {}
    for seed in run.seeds:
        digits = images(run, train=10000, test=2000, seed=seed)
        _digits(digits, small_steps, seed, small, geometry)
        data = texts(Run(), length=LENGTH, train=run.choose(500, 1100), test=tests, seed=seed)
        halves = (data.train, data.test)
        tasks = {
            "a": tuple(half.at(half.labels < 2) for half in halves),
            "b": tuple(half.at(half.labels >= 2) for half in halves),
        }
        model = minilm(len(data.names), seed=seed, layers=depth)
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

    ten = small[SPARSE]
    alone = {s: max(ten[what][s] for what in ("inputs on both", "labels on both")) for s in seeds}
    claims = [
        Claim.of_differences(
            "digits: the sum of two sparse changes (10 % each) is more accurate on both at once than either alone",
            [ten["sum"][s] - alone[s] for s in seeds],
        ),
        Claim.of_differences(
            "digits: it is more accurate than the sum of two low-rank changes of as many parameters",
            [ten["sum"][s] - small[LOW_RANK]["sum"][s] for s in seeds],
        ),
        Claim.of_differences(
            "MiniLM: adding loses less with sparse changes than with dense ones",
            [_lost(big["full"], s) - _lost(big["lt_sft"], s) for s in seeds],
        ),
        Claim.of_differences(
            "MiniLM: adding sparse changes loses at most 2 points in the mean of the tasks",
            [0.02 - _lost(big["lt_sft"], s) for s in seeds],
        ),
    ]
    groups_said = [", ".join(data.names[:2]), ", ".join(data.names[2:])]
    settings = {
        "small network": "LeNet-300-100 without biases, trained on digits", "images": digits.about,
        "its images": len(digits.train), "images to count on": len(digits.test), "its steps": small_steps,
        "model": f"the lower {depth} layers of MiniLM", "texts": data.about, "length": LENGTH,
        "steps": steps, "batch": 16, "test texts": len(data.test), "task a": groups_said[0], "task b": groups_said[1],
    }  # fmt: skip
    return Findings(
        tables={f"digits: {INPUTS} and {LABELS}": first, "MiniLM: two tasks": second},
        figure=_figure(small, big, seeds),
        claims=claims,
        values={"digits": small, "digits, changes": geometry, "minilm": big},
        settings=settings,
        notes=[
            "Published: a change for a language and one for a task, added, in cross-lingual transfer with mBERT and "
            "XLM-R, better than MAD-X adapters of as many parameters; dense sums are not in its tables. Here "
            f"{INPUTS} digits stand for the language, {LABELS} classes for the task, and LoRA of rank 16, with as many "
            "parameters as 10 % of the entries, for the adapters; both at once was never trained. MiniLM: each task "
            "has two or three labels of the same five, and its own head. `full` is dense. A seed draws images, texts "
            "and weights.",
            "Seeds 0 to 4 could not tell which adds better on digits; these are others, and judge alone: the sum of "
            "LoRAs does. On MiniLM more steps would tell, with which dense changes grow and meet.",
        ],
    )


def _digits(
    digits: Images, steps: int, seed: int, results: Scores, geometry: dict[str, dict[str, dict[str, float]]]
) -> None:
    """The small network: trained on digits, changed for other inputs and for other labels, and by both changes at
    once."""
    key = str(seed)
    height, width = digits.size
    of = {name: [task(name, part) for part in (digits.train, digits.test)] for name in ("digit", INPUTS, LABELS)}
    both = Examples(task(INPUTS, digits.test).inputs, task(LABELS, digits.test).labels)
    model = LeNet(height * width, seed=seed)
    fit(model, of["digit"][0].stream(60, seed), steps, learning_rate=SMALL_RATE, weight_decay=0.0, bfloat16=False)
    for name, spec in SPECS.items():
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
    for name, line, label in ((DENSE, ":", "dense"), (LOW_RANK, "--", "low rank")):
        height = 100 * mean(small[name]["sum"].values())
        left.axhline(height, color=LINES[0], linewidth=1.2, linestyle=line, label=f"both at once: the sum, {label}")
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
    said = {DENSE: "all, plain fine-tuning", LOW_RANK: "LoRA, rank 16"}
    return said.get(name) or f"{100 * float(name):.0f} %"
