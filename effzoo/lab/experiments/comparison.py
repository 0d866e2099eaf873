"""Parameter, input and function composition along five criteria, each of them measured."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from matplotlib.axes import Axes

from effzoo import peft
from effzoo.architectures import Transformer
from effzoo.lab.analyses.adapter_cost import forward, kept_bytes, mergeable, step
from effzoo.lab.analyses.together import averaged, divided
from effzoo.lab.analyses.tuning import body_parameters, fast_accuracy, tune
from effzoo.lab.draw import LINES, panels
from effzoo.lab.experiment import Claim, Findings, Run, Table, experiment
from effzoo.lab.fit import Batch, Examples
from effzoo.lab.texts import DATA, minilm, texts
from effzoo.measure.timing import interleaved, ratio

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
MIB = 2**20
HEAD_RATE = 5e-3  # of the new head, so that few steps suffice for it
KEPT = 10.0  # points that the mean of two adapters may lose and still count as working on both tasks


@dataclass
class Measured:
    """One method.

    composition: of parameters, inputs or functions.
    share: of the parameters that is trained, in percent.
    kept: bytes for the backward pass.
    step: seconds, in times of a step of full fine-tuning.
    passed: seconds of a forward pass, in times of the base's; merged: the same after merging.
    alone, together: accuracy in percent by seed, of an adapter and of the mean of two.
    """

    composition: str
    share: float = 0.0
    kept: int = 0
    step: float = 0.0
    passed: float = 0.0
    merged: float | None = None
    alone: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)

    @property
    def cheapest(self) -> float:
        """A forward pass, merged where that can be."""
        return self.passed if self.merged is None else self.merged

    def lost(self, seed: int) -> float:
        """Points of accuracy between alone and together."""
        return self.alone[seed] - self.together[seed]


@experiment(
    "comparison", deck=(0, 3), data=DATA,
    source="Ruder, Pfeiffer & Vulic 2022, Modular and parameter-efficient fine-tuning, EMNLP tutorial; Pfeiffer et "
    "al. 2023, arXiv:2302.11529",
)  # fmt: skip
def comparison(run: Run) -> Findings:
    """What do parameter, input and function composition cost and give, by the tutorial's five criteria?"""
    length, steps, batch = run.choose(32, 64), run.choose(12, 200), run.choose(8, 16)
    data = texts(run, length=length, train=run.choose(480, 1200), test=run.choose(240, 1000))
    halves = [list(range(start, len(data.names), 2)) for start in (0, 1)]
    train, test = divided(data.train, halves), divided(data.test, halves)
    labels = max(map(len, halves))
    measured = {spec: Measured(composition) for composition, specs in SPECS.items() for spec in specs}
    _count(minilm(labels), measured, train[0].batch(slice(0, batch)), run)
    for seed in run.seeds:
        model = minilm(labels, seed=seed)
        for spec, method in measured.items():
            _train(model, spec, method, train, test, steps, batch, seed)
        run.say(f"seed {seed}: " + ", ".join(f"{spec} {method.alone[-1]:.1f}" for spec, method in measured.items()))

    figure, (axes,) = panels(1, width=7.2, height=4.4)
    _draw(axes, measured)
    groups = {composition: [measured[spec] for spec in SPECS[composition]] for composition in COMPARED}
    shares = {name: _mean([method.share for method in methods]) for name, methods in groups.items()}
    steps_of = {name: _mean([method.step for method in methods]) for name, methods in groups.items()}
    passes = {name: _mean([method.cheapest for method in methods]) for name, methods in groups.items()}
    seeds = range(len(run.seeds))
    alone: dict[str, list[float]] = {name: [] for name in groups}
    lost: dict[str, list[float]] = {name: [] for name in groups}
    for i, (name, methods) in itertools.product(seeds, groups.items()):
        alone[name].append(_mean([method.alone[i] for method in methods]))
        lost[name].append(_mean([method.lost(i) for method in methods]))
    merged = [method.merged for methods in groups.values() for method in methods if method.merged is not None]
    settings = {
        "model": "minilm", "tokens": length, "texts": [len(examples) for examples in train],
        "test texts": [len(examples) for examples in test], "steps": steps, "batch": batch,
        "learning rate of the head": HEAD_RATE,
    }  # fmt: skip
    return Findings(
        tables={"Methods": _methods(measured), "Compositions": _compositions(shares, steps_of, passes, alone, lost)},
        figure=figure,
        claims=[
            Claim(
                "input composition trains the fewest parameters, function composition the most",
                (shares["input"] < shares["parameter"] < shares["function"],),
            ),
            Claim(
                "a training step is dearest with input composition",
                (steps_of["input"] > max(steps_of["parameter"], steps_of["function"]),),
            ),
            Claim(
                "merged, a method costs nothing in inference (within a tenth of the base)",
                (all(abs(times - 1) < 0.1 for times in merged),),
            ),
            Claim(
                "inference is cheapest with parameter composition, dearest with input composition",
                (passes["parameter"] < passes["function"] < passes["input"],),
            ),
            Claim(
                "function composition is the most accurate",
                tuple(alone["function"][i] > max(alone["parameter"][i], alone["input"][i]) for i in seeds),
            ),
            Claim(
                "input composition is the least accurate",
                tuple(alone["input"][i] < min(alone["parameter"][i], alone["function"][i]) for i in seeds),
            ),
            Claim(
                f"with each composition the mean of two adapters does both tasks (less than {KEPT:g} points lost)",
                tuple(max(points[i] for points in lost.values()) < KEPT for i in seeds),
            ),
        ],
        values={spec: dict(vars(method)) for spec, method in measured.items()},
        settings=settings,
        notes=[
            "Two tasks: every second label, and the others. Accuracy is the mean over both, each with its own adapter; "
            "together is that with the mean of the two adapters' outputs at every site and each task's own head. Times "
            "are medians of turns on one machine. Published marks (from ++ to --) compare the families in general and "
            "are quoted from memory; they are judgements, not numbers."
        ],
    )


def _count(model: Transformer, measured: dict[str, Measured], batch: Batch, run: Run) -> None:
    """Shares, kept bytes and times, which depend on no seed; all methods are attached to one model, and act in
    turns."""
    steps: dict[str, Callable[[], object]] = {}
    passes: dict[str, Callable[[], object]] = {"base": _on(model, (), forward(model, batch))}
    for number, (spec, method) in enumerate(measured.items()):
        name = f"method_{number}"
        peft.attach(model, spec, name=name)
        method.share, method.kept = 100 * body_parameters(model) / peft.account(model).total, kept_bytes(model, batch)
        steps[spec] = _on(model, (name,), step(model, batch))
        passes[spec] = _on(model, (name,), forward(model, batch))
        if mergeable(model, name):
            passes[f"{spec} merged"] = forward(peft.merge(_alone(model, name), name, undo=False), batch)
    rounds = run.choose(5, 21)
    timed = interleaved(steps, rounds=rounds, least=3, seconds=run.choose(10.0, 60.0))
    passed = interleaved(passes, rounds=rounds, least=3, seconds=run.choose(10.0, 60.0))
    for spec, method in measured.items():
        method.step = ratio(timed[spec], timed["full"]).median
        method.passed = ratio(passed[spec], passed["base"]).median
        method.merged = ratio(passed[f"{spec} merged"], passed["base"]).median if f"{spec} merged" in passed else None
    run.say(
        "steps in times of full fine-tuning's: "
        + ", ".join(f"{spec} {method.step:.2f}" for spec, method in measured.items())
    )


def _alone(model: Transformer, name: str) -> Transformer:
    """A copy of the model with one of its adapters."""
    alone = copy.deepcopy(model)
    for other in [other for other in peft.attached(alone) if other != name]:
        peft.detach(alone, other)
    return peft.activate(alone, name)


def _on(model: Transformer, names: tuple[str, ...], what: Callable[[], object]) -> Callable[[], object]:
    """`what` with these adapters active."""

    def run() -> None:
        peft.activate(model, *names)
        what()

    return run


def _train(
    model: Transformer,
    spec: str,
    method: Measured,
    train: list[Examples],
    test: list[Examples],
    steps: int,
    batch: int,
    seed: int,
) -> None:
    names = [f"task_{number}" for number in range(len(train))]
    for name, examples in zip(names, train, strict=True):
        torch.manual_seed(seed)
        tune(model, spec, examples, name=name, steps=steps, batch=batch, seed=seed, head_rate=HEAD_RATE)
    alone, together = [], []
    for name, examples in zip(names, test, strict=True):
        peft.activate(model, name)
        alone.append(100 * fast_accuracy(model, examples))
        with averaged(model, names, name):
            together.append(100 * fast_accuracy(model, examples))
    method.alone.append(_mean(alone))
    method.together.append(_mean(together))
    for name in names:
        peft.detach(model, name)


def _methods(measured: dict[str, Measured]) -> Table:
    full = measured["full"]
    head = "method, composition, trained, step / full, kept / full, pass / base, merged, accuracy, lowest to highest"
    table = [[*head.split(", "), "together"]]
    for spec, method in measured.items():
        merged = "no" if method.merged is None else f"{method.merged:.2f}"
        times = [f"{method.step:.2f}", f"{method.kept / full.kept:.2f}", f"{method.passed:.2f}", merged]
        accuracy = [f"{_mean(method.alone):.1f} %", f"{min(method.alone):.1f} to {max(method.alone):.1f}"]
        share = f"{method.share:.2f} %"
        table.append([f"`{spec}`", method.composition, share, *times, *accuracy, f"{_mean(method.together):.1f} %"])
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
            f"{passes[composition]:.2f} of a pass, merged if it can be",
            f"{_mean(alone[composition]):.1f} %", f"{_mean(lost[composition]):.1f} points lost together",
        )
        for composition in COMPARED
    }  # fmt: skip
    table = [["criterion", *(cell for composition in COMPARED for cell in (composition, "published"))]]
    for i, criterion in enumerate(CRITERIA):
        cells = [(measured[composition][i], f"about {MARKS[composition][i]}") for composition in COMPARED]
        table.append([criterion, *(cell for pair in cells for cell in pair)])
    return table


def _draw(axes: Axes, measured: dict[str, Measured]) -> None:
    """Accuracy against the share that is trained; the area of a marker is what is kept for the backward pass."""
    most = max(method.kept for method in measured.values())
    for number, (composition, specs) in enumerate(SPECS.items()):
        for spec in specs:
            method = measured[spec]
            mean, low, high = _mean(method.alone), min(method.alone), max(method.alone)
            axes.errorbar(
                [method.share], [mean], [[mean - low], [high - mean]], color=LINES[number], linewidth=1, alpha=0.6
            )
            axes.scatter(
                [method.share], [mean], s=900 * method.kept / most, color=LINES[number], alpha=0.55, linewidth=0
            )
            axes.annotate(
                f"{spec.partition('[')[0]}, {method.kept / MIB:.0f} MiB", (method.share, mean), xytext=(0, 16),
                textcoords="offset points", ha="center", fontsize=8,
            )  # fmt: skip
        axes.scatter(
            [],
            [],
            s=60,
            color=LINES[number],
            alpha=0.55,
            linewidth=0,
            label="full fine-tuning" if composition == "all" else f"{composition} composition",
        )
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.16)
    axes.set(
        xlabel="trained parameters, % of the base",
        ylabel="accuracy, %, mean of two tasks",
        title="area: bytes kept for the backward pass",
    )
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
