"""Parameter, input and function composition along five criteria, each of them counted or measured."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from effzoo import peft
from effzoo.architectures import Transformer
from effzoo.lab.analyses.adapter_cost import kept_bytes, mergeable, pass_operations, step_operations
from effzoo.lab.analyses.together import averaged
from effzoo.lab.analyses.tuning import body_parameters, fast_accuracy, tune
from effzoo.lab.draw import LINES, panels
from effzoo.lab.experiment import Claim, Findings, Run, Table, experiment
from effzoo.lab.fit import Batch, Examples
from effzoo.lab.texts import DATA, minilm, texts
from effzoo.lab.word_order import word_order

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPECS = {
    "parameter": ("bitfit", "lora"), "input": ("prompt[length=8]", "prefix[length=8]"),
    "function": ("houlsby[bottleneck=64]", "ia3"), "all": ("full",),
}  # fmt: skip
COMPARED = ("parameter", "input", "function")
CRITERIA = ("parameter efficiency", "training efficiency", "inference efficiency", "performance", "compositionality")
MARKS = {
    "parameter": ("+", "-", "++", "+", "+"),
    "input": ("++", "--", "--", "-", "+"),
    "function": ("-", "+", "-", "++", "+"),
}
ORDER, TOPICS = TASKS = ("word order", "topics")
# above what the methods take on their own, as few steps must suffice; at 3e-3 houlsby ended at chance
RATES = {
    "bitfit": 5e-3, "lora": 5e-3, "prompt[length=8]": 5e-2, "prefix[length=8]": 3e-2, "houlsby[bottleneck=64]": 1e-3,
    "ia3": 2e-2, "full": 2e-4,
}  # fmt: skip
HEAD_RATE = 3e-3
KEPT = 10.0  # points that the mean of two adapters may lose and still count as working on both tasks
COUNTED = 64  # tokens of the texts for which operations are counted


@dataclass
class Measured:
    """One method.

    composition: of parameters, inputs or functions.
    share: of the parameters that is trained, in percent.
    kept: bytes for the backward pass.
    step: operations of a batch forward and backward, in times of full fine-tuning's.
    passed: operations of a forward pass, in times of the base's; merged: the same after merging.
    alone, together: accuracy in percent by task and seed, of its adapter and of the mean of both tasks' adapters.
    """

    composition: str
    share: float = 0.0
    kept: int = 0
    step: float = 0.0
    passed: float = 0.0
    merged: float | None = None
    alone: dict[str, list[float]] = field(default_factory=lambda: {task: [] for task in TASKS})
    together: dict[str, list[float]] = field(default_factory=lambda: {task: [] for task in TASKS})

    @property
    def cheapest(self) -> float:
        """A forward pass, merged where that can be."""
        return self.passed if self.merged is None else self.merged

    def lost(self, seed: int) -> float:
        """Points of accuracy between alone and together, the mean of the tasks."""
        return _mean([self.alone[task][seed] - self.together[task][seed] for task in TASKS])


@experiment(
    "comparison", deck=(0, 3), data=DATA,
    source="Ruder, Pfeiffer & Vulic 2022, Modular and parameter-efficient fine-tuning, EMNLP tutorial; Pfeiffer et "
    "al. 2023, arXiv:2302.11529",
)  # fmt: skip
def comparison(run: Run) -> Findings:
    """What do parameter, input and function composition cost and give, by the tutorial's five criteria?"""
    length, steps, few, batch = 12, run.choose(12, 120), run.choose(6, 16), 16
    lower = 3  # layers: word order is seen in these
    measured = {spec: Measured(composition) for composition, specs in SPECS.items() for spec in specs}
    counted = texts(run, length=COUNTED, train=4, test=4)
    _count(minilm(len(counted.names)), measured, counted.train.batch(slice(0, 4)))
    for seed in run.seeds:
        data = texts(run, length=length, train=run.choose(400, 1280), test=run.choose(200, 800), seed=seed)
        train = {ORDER: word_order(data.train, seed=2 * seed), TOPICS: data.train}
        test = {ORDER: word_order(data.test, seed=2 * seed + 1), TOPICS: data.test.at(slice(0, len(data.test) // 4))}
        model = minilm(len(data.names), seed=seed, layers=lower)
        for spec, method in measured.items():
            _train(model, spec, method, train, test, {ORDER: steps, TOPICS: few}, batch, seed)
        run.say(
            f"seed {seed}: " + ", ".join(f"{spec} {method.alone[ORDER][-1]:.1f}" for spec, method in measured.items())
        )

    groups = {composition: [measured[spec] for spec in SPECS[composition]] for composition in COMPARED}
    shares = {name: _mean([method.share for method in methods]) for name, methods in groups.items()}
    steps_of = {name: _mean([method.step for method in methods]) for name, methods in groups.items()}
    passes = {name: _mean([method.cheapest for method in methods]) for name, methods in groups.items()}
    seeds = range(len(run.seeds))
    alone = {name: [_mean([method.alone[ORDER][i] for method in of]) for i in seeds] for name, of in groups.items()}
    lost = {name: [_mean([method.lost(i) for method in of]) for i in seeds] for name, of in groups.items()}
    merged = [method.merged for methods in groups.values() for method in methods if method.merged is not None]
    settings = {
        "model": f"minilm, its {lower} lower layers", "tokens": length, "texts": len(data.train),
        "test texts": {task: len(examples) for task, examples in test.items()},
        "steps": {ORDER: steps, TOPICS: few}, "batch": batch, "learning rates": {**RATES, "head": HEAD_RATE},
        "operations": f"of 4 texts of at most {COUNTED} tokens through all layers",
    }  # fmt: skip
    return Findings(
        tables={"Methods": _methods(measured), "Compositions": _compositions(shares, steps_of, passes, alone, lost)},
        figure=_figure(measured),
        claims=[
            Claim.law(
                "input composition trains the fewest parameters, function composition the most",
                shares["input"] < shares["parameter"] < shares["function"],
            ),
            Claim.law(
                "a training step is dearest with input composition",
                steps_of["input"] > max(steps_of["parameter"], steps_of["function"]),
            ),
            Claim.law(
                "merged, a method costs nothing in inference: as many operations as the base",
                all(times == 1 for times in merged),
            ),
            Claim.law(
                "inference is cheapest with parameter composition, dearest with input composition",
                passes["parameter"] < passes["function"] < passes["input"],
            ),
            Claim.of_differences(
                "function composition is the most accurate",
                [alone["function"][i] - max(alone["parameter"][i], alone["input"][i]) for i in seeds],
            ),
            Claim.of_differences(
                "input composition is the least accurate",
                [min(alone["parameter"][i], alone["function"][i]) - alone["input"][i] for i in seeds],
            ),
            Claim.of_differences(
                f"with each composition the mean of two adapters does both tasks (less than {KEPT:g} points lost)",
                [KEPT - max(points[i] for points in lost.values()) for i in seeds],
            ),
        ],
        values={spec: dict(vars(method)) for spec, method in measured.items()},
        settings=settings,
        notes=[
            "Operations are counted, not timed: a multiplication and an addition of a product are two, everything else "
            "counts the entries it writes; a step is forward and backward, without the optimizer. Merged is what can "
            "be. Two tasks: whether the words of a text stand in their order, by which accuracy is compared, and its "
            "topic. Together is the mean of the two adapters' outputs at every site, with each task's own head. A "
            "seed draws the texts to train and to test on, and all weights. Published marks (from ++ to --) compare "
            "the families in general and are quoted from memory; they are judgements, not numbers."
        ],
    )  # fmt: skip


def _count(model: Transformer, measured: dict[str, Measured], batch: Batch) -> None:
    """Shares, kept bytes and operations, which depend on no seed."""
    base = pass_operations(model, batch)
    steps = {}
    for spec, method in measured.items():
        peft.attach(model, spec, name="counted")
        method.share, method.kept = 100 * body_parameters(model) / peft.account(model).total, kept_bytes(model, batch)
        steps[spec], method.passed = step_operations(model, batch), pass_operations(model, batch) / base
        if mergeable(model, "counted"):
            merged = peft.merge(copy.deepcopy(model), "counted", undo=False)
            method.merged = pass_operations(merged, batch) / base
        peft.detach(model, "counted")
    for spec, method in measured.items():
        method.step = steps[spec] / steps["full"]


def _train(
    model: Transformer,
    spec: str,
    method: Measured,
    train: dict[str, Examples],
    test: dict[str, Examples],
    steps: dict[str, int],
    batch: int,
    seed: int,
) -> None:
    rate = RATES[spec]
    for task, examples in train.items():
        torch.manual_seed(seed)
        tune(
            model, spec, examples, name=task.replace(" ", "_"), steps=steps[task], batch=batch, seed=seed, rate=rate,
            head_rate=HEAD_RATE,
        )  # fmt: skip
    names = [task.replace(" ", "_") for task in train]
    for name, (task, examples) in zip(names, test.items(), strict=True):
        peft.activate(model, name)
        method.alone[task].append(100 * fast_accuracy(model, examples))
        with averaged(model, names, name):
            method.together[task].append(100 * fast_accuracy(model, examples))
    for name in names:
        peft.detach(model, name)


def _methods(measured: dict[str, Measured]) -> Table:
    full = measured["full"]
    head = f"method, composition, trained, step / full, kept / full, pass / base, merged, {ORDER}, lowest to highest"
    table = [[*head.split(", "), TOPICS, *(f"{task}, together" for task in TASKS)]]
    for spec, method in measured.items():
        merged = "no" if method.merged is None else f"{method.merged:.3f}"
        costs = [f"{method.step:.2f}", f"{method.kept / full.kept:.2f}", f"{method.passed:.3f}", merged]
        order = method.alone[ORDER]
        accuracy = [f"{_mean(order):.1f} %", f"{min(order):.1f} to {max(order):.1f}"]
        others = [_mean(values) for values in (method.alone[TOPICS], *method.together.values())]
        table.append(
            [f"`{spec}`", method.composition, f"{method.share:.2f} %", *costs, *accuracy]
            + [f"{percents:.1f} %" for percents in others]
        )
    return table


def _compositions(
    shares: dict[str, float],
    steps: dict[str, float],
    passes: dict[str, float],
    alone: dict[str, list[float]],
    lost: dict[str, list[float]],
) -> Table:
    """The tutorial's table: what was measured, and its mark, by composition and criterion."""
    measured = {
        composition: (
            f"{shares[composition]:.2f} % trained", f"{steps[composition]:.2f} of a full step",
            f"{passes[composition]:.3f} of a pass, merged if it can be",
            f"{_mean(alone[composition]):.1f} %", f"{_mean(lost[composition]):.1f} points lost together",
        )
        for composition in COMPARED
    }  # fmt: skip
    table = [["criterion", *(cell for composition in COMPARED for cell in (composition, "published"))]]
    for i, criterion in enumerate(CRITERIA):
        cells = [(measured[composition][i], f"about {MARKS[composition][i]}") for composition in COMPARED]
        table.append([criterion, *(cell for pair in cells for cell in pair)])
    return table


def _figure(measured: dict[str, Measured]) -> Figure:
    """A panel for each criterion, a row for each method, coloured by composition."""
    figure, axes = panels(5, width=2.5, height=3.4, sharey=True)
    names = [spec.partition("[")[0] for spec in measured]
    colours = dict(zip(SPECS, LINES, strict=False))
    titles = ("trained parameters", "training step", "inference, merged if it can be", "word order", "together")
    labels = ("% of the base", "operations / full", "operations / base", "accuracy, %", "points lost, both tasks")
    for panel, title, label in zip(axes, titles, labels, strict=True):
        panel.set_title(title, fontsize=9)
        panel.set_xlabel(label, fontsize=9)
    for row, method in enumerate(measured.values()):
        colour = colours[method.composition]
        for panel, value in zip(axes, (method.share, method.step, method.cheapest), strict=False):
            panel.plot([value], [row], marker="o", color=colour)
        lost = [method.lost(i) for i in range(len(method.alone[ORDER]))]
        for panel, values in zip(axes[3:], (method.alone[ORDER], lost), strict=True):
            panel.plot(values, [row] * len(values), marker="o", markersize=4, linestyle="", color=colour, alpha=0.4)
            panel.plot([_mean(values)], [row], marker="|", markersize=11, markeredgewidth=2.5, color=colour)
    axes[0].set_xscale("log")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[4].axvline(KEPT, color="#888888", linewidth=0.9, linestyle=":")
    for composition, colour in colours.items():
        label = "full fine-tuning" if composition == "all" else f"{composition} composition"
        axes[0].plot([], [], marker="o", linestyle="", color=colour, label=label)
    figure.legend(frameon=False, fontsize=8, ncols=4, loc="outside lower center")
    return figure


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
