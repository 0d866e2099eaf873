"""Parameter, input and function composition along five criteria, each of them measured."""

from __future__ import annotations

import copy
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

DOORS = {
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
    """One method. Percent trained; a step, its kept bytes and a pass in times of full fine-tuning's or the base's;
    accuracies in percent, by seed."""

    door: str
    share: float = 0.0
    kept: int = 0
    step: float = 0.0
    passed: float = 0.0
    merged: float | None = None
    alone: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)


@experiment(
    "comparison", deck=(0, 3), data=DATA,
    source="Ruder, Pfeiffer & Vulic 2022, Modular and parameter-efficient fine-tuning, EMNLP tutorial; Pfeiffer et "
        "al. 2023, arXiv:2302.11529",
)  # fmt: skip
def comparison(run: Run) -> Findings:
    """What do methods behind the three doors cost and give, by the tutorial's five criteria?"""
    length, steps, batch = run.choose(32, 64), run.choose(12, 200), run.choose(8, 16)
    data = texts(run, length=length, train=run.choose(480, 1200), test=run.choose(240, 1000))
    groups = [list(range(start, len(data.names), 2)) for start in (0, 1)]
    train, test = divided(data.train, groups), divided(data.test, groups)
    labels = max(map(len, groups))
    found = {spec: Measured(door) for door, specs in DOORS.items() for spec in specs}
    _count(minilm(labels), found, train[0].batch(slice(0, batch)), run)
    for seed in run.seeds:
        model = minilm(labels, seed=seed)
        for spec, own in found.items():
            _train(model, spec, own, train, test, steps, batch, seed)
        run.say(f"seed {seed}: " + ", ".join(f"{spec} {own.alone[-1]:.1f}" for spec, own in found.items()))

    figure, (axes,) = panels(1, width=7.2, height=4.4)
    _draw(axes, found)
    by_door = {door: [found[spec] for spec in DOORS[door]] for door in COMPARED}
    shares = {door: _mean([own.share for own in each]) for door, each in by_door.items()}
    steps_of = {door: _mean([own.step for own in each]) for door, each in by_door.items()}
    passes = {
        door: _mean([own.passed if own.merged is None else own.merged for own in each])
        for door, each in by_door.items()
    }
    alone = {
        door: [_mean(list(each)) for each in zip(*(own.alone for own in owns), strict=True)]
        for door, owns in by_door.items()
    }
    lost = {
        door: [_mean([own.alone[i] - own.together[i] for own in owns]) for i in range(len(run.seeds))] for door,
        owns in by_door.items()
    }  # fmt: skip
    seeds = range(len(run.seeds))
    merged = [own.merged for each in by_door.values() for own in each if own.merged is not None]
    return Findings(
        tables={"Methods": _methods(found), "Doors": _doors(shares, steps_of, passes, alone, lost)},
        figure=figure,
        claims=[
            Claim(
                "input composition trains the fewest parameters, function composition the most",
                (shares["input"] < shares["parameter"] < shares["function"],),
            ),
            Claim(
                "a training step is dearest with input composition",
                (steps_of["input"] > max(steps_of["parameter"], steps_of["function"]),)
            ),
            Claim("merged, a method costs nothing in inference (within a tenth of the base)",
            (all(abs(each - 1) < 0.1 for each in merged),)), Claim(
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
                f"behind each door the mean of two adapters does both tasks (less than {KEPT:g} points lost)",
                tuple(max(each[i] for each in lost.values()) < KEPT for i in seeds),
            ),
        ],
        values={spec: {name: value for name, value in vars(own).items()} for spec, own in found.items()},
        settings={"model": "minilm", "tokens": length, "texts": [len(each) for each in train],
        "test texts": [len(each) for each in test],
                  "steps": steps, "batch": batch, "learning rate of the head": HEAD_RATE},
        notes=[
            "Two tasks: every second label, and the others. Accuracy is the mean over both, each with its own "
            "adapter; together is that with the "
            "mean of the two adapters' outputs at every site and each task's own head. Times are medians of turns on "
            "one machine. Published marks "
            "(from ++ to --) compare the families in general and are quoted from memory; they are judgements, not "
            "numbers."
        ],
    )  # fmt: skip


def _count(model: Transformer, found: dict[str, Measured], batch: Batch, run: Run) -> None:
    """Shares, kept bytes and times, which depend on no seed; all methods are attached to one model, and act in
    turns."""
    steps: dict[str, Callable[[], object]] = {}
    passes: dict[str, Callable[[], object]] = {"base": _on(model, (), forward(model, batch))}
    for number, (spec, own) in enumerate(found.items()):
        name = f"method_{number}"
        peft.attach(model, spec, name=name)
        own.share, own.kept = 100 * body_parameters(model) / peft.account(model).total, kept_bytes(model, batch)
        steps[spec] = _on(model, (name,), step(model, batch))
        passes[spec] = _on(model, (name,), forward(model, batch))
        if mergeable(model, name):
            passes[f"{spec} merged"] = forward(peft.merge(_alone(model, name), name, undo=False), batch)
    rounds = run.choose(5, 21)
    timed = interleaved(steps, rounds=rounds, least=3, seconds=run.choose(10.0, 60.0))
    passed = interleaved(passes, rounds=rounds, least=3, seconds=run.choose(10.0, 60.0))
    for spec, own in found.items():
        own.step = ratio(timed[spec], timed["full"]).median
        own.passed = ratio(passed[spec], passed["base"]).median
        own.merged = ratio(passed[f"{spec} merged"], passed["base"]).median if f"{spec} merged" in passed else None
    run.say(
        "steps in times of full fine-tuning's: " + ", ".join(f"{spec} {own.step:.2f}" for spec, own in found.items())
    )


def _alone(model: Transformer, name: str) -> Transformer:
    """A copy of the model with one of its adapters."""
    twin = copy.deepcopy(model)
    for other in [other for other in peft.attached(twin) if other != name]:
        peft.detach(twin, other)
    return peft.activate(twin, name)


def _on(model: Transformer, names: tuple[str, ...], what: Callable[[], object]) -> Callable[[], object]:
    """`what` with these adapters active."""

    def run() -> None:
        peft.activate(model, *names)
        what()

    return run


def _train(
    model: Transformer,
    spec: str,
    own: Measured,
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
    own.alone.append(_mean(alone))
    own.together.append(_mean(together))
    for name in names:
        peft.detach(model, name)


def _methods(found: dict[str, Measured]) -> Table:
    full = found["full"]
    table = [
        [
            "method",
            "door",
            "trained",
            "step / full",
            "kept / full",
            "pass / base",
            "merged",
            "accuracy",
            "lowest to highest",
            "together",
        ]
    ]
    for spec, own in found.items():
        table.append(
            [f"`{spec}`", own.door, f"{own.share:.2f} %", f"{own.step:.2f}", f"{own.kept / full.kept:.2f}",
            f"{own.passed:.2f}",
             "no" if own.merged is None else f"{own.merged:.2f}", f"{_mean(own.alone):.1f} %",
             f"{min(own.alone):.1f} to {max(own.alone):.1f}", f"{_mean(own.together):.1f} %"]
        )  # fmt: skip
    return table


def _doors(
    shares: dict[str, float],
    steps: dict[str, float],
    passes: dict[str, float],
    alone: dict[str, list[float]],
    lost: dict[str, list[float]],
) -> Table:
    """The tutorial's table: what was measured, and its mark, by door and criterion."""
    measured = {
        door: (
            f"{shares[door]:.2f} % trained", f"{steps[door]:.2f} of a full step",
            f"{passes[door]:.2f} of a pass, merged if it can be",
            f"{_mean(alone[door]):.1f} %", f"{_mean(lost[door]):.1f} points lost together",
        )
        for door in COMPARED
    }  # fmt: skip
    head = ["criterion"] + [cell for door in COMPARED for cell in (door, "published")]
    return [head] + [
        [criterion, *(cell for door in COMPARED for cell in (measured[door][i], f"about {MARKS[door][i]}"))]
        for i, criterion in enumerate(CRITERIA)
    ]


def _draw(axes: Axes, found: dict[str, Measured]) -> None:
    """Accuracy against the share that is trained; the area of a marker is what is kept for the backward pass."""
    most = max(own.kept for own in found.values())
    for number, (door, specs) in enumerate(DOORS.items()):
        for spec in specs:
            own = found[spec]
            mean, low, high = _mean(own.alone), min(own.alone), max(own.alone)
            axes.errorbar(
                [own.share], [mean], [[mean - low], [high - mean]], color=LINES[number], linewidth=1, alpha=0.6
            )
            axes.scatter([own.share], [mean], s=900 * own.kept / most, color=LINES[number], alpha=0.55, linewidth=0)
            axes.annotate(
                f"{spec.partition('[')[0]}, {own.kept / MIB:.0f} MiB", (own.share, mean), xytext=(0, 16),
                textcoords="offset points", ha="center", fontsize=8,
            )  # fmt: skip
        axes.scatter(
            [],
            [],
            s=60,
            color=LINES[number],
            alpha=0.55,
            linewidth=0,
            label="full fine-tuning" if door == "all" else f"{door} composition",
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
