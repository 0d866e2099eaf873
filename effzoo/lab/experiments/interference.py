"""Interference: one module for several tasks against a module for each, trained jointly and in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean

import torch

import effzoo
from effzoo.architectures import Transformer
from effzoo.lab.analyses.tagger import right, tagger
from effzoo.lab.draw import LINES, panels
from effzoo.lab.experiment import Claim, Findings, Run, Table, experiment
from effzoo.lab.fit import Batch, Examples, fit
from effzoo.tasks import domains

SYMBOLS, TASKS, LENGTH, BATCH, UNITS = 16, 6, 15, 32, 8
WAYS = {
    "shared, of the size of one": f"pfeiffer[bottleneck={UNITS}]",
    "shared, of the size of all": f"pfeiffer[bottleneck={TASKS * UNITS}]",
    "a module for each task": f"routed[of='pfeiffer[bottleneck={UNITS}]', experts={TASKS}, router=fixed]",
}
SMALL, LARGE, MODULES = WAYS
JOINTLY, IN_TURN = "jointly", "in turn"


@experiment(
    "interference", deck=3,
    source="Pfeiffer et al. 2023, Modular deep learning, arXiv:2302.11529, section 1; McCloskey & Cohen 1989",
)  # fmt: skip
def interference(run: Run) -> Findings:
    """What do tasks take from each other in one shared module, trained jointly or in turn?

    Six tasks, each a permutation of the symbols of its own, marked at the beginning of a sequence. Jointly: batches
    of all of them; in turn: one task after the other, with twice as many batches for each.
    """
    steps = {JOINTLY: run.choose(60, 120), IN_TURN: run.choose(120, 240)}
    after: dict[str, dict[str, list[list[float]]]] = {order: {way: [] for way in WAYS} for order in (JOINTLY, IN_TURN)}
    learned: dict[str, list[list[float]]] = {way: [] for way in WAYS}  # of each task when its turn was over
    for seed in run.seeds:
        torch.manual_seed(seed)
        base = _model()
        fit(base, _stream(seed, range(TASKS), variant=1), 200, learning_rate=3e-3, bfloat16=False)
        tests = [_only(task, 10**6 + seed) for task in range(TASKS)]
        for way, spec in WAYS.items():
            for order in (JOINTLY, IN_TURN):
                torch.manual_seed(seed)
                model = _model()
                model.load_state_dict(base.state_dict())
                effzoo.attach(model, spec)
                model.head.requires_grad_(False)
                turns: list[Sequence[int]] = [range(TASKS)] if order == JOINTLY else [[task] for task in range(TASKS)]
                then = []
                for turn in turns:
                    batches = _stream(seed + 1000, turn)
                    fit(
                        model, batches, steps[order] // len(turns), learning_rate=1e-2, weight_decay=0.0, bfloat16=False
                    )
                    then.append(_right(model, tests[turn[-1]]))
                after[order][way].append([_right(model, test) for test in tests])
                if order == IN_TURN:
                    learned[way].append(then)
        run.say(f"seed {seed}: " + "; ".join(
            f"{order} " + ", ".join(f"{mean(of[way][-1]):.2f}" for way in WAYS) for order, of in after.items()
        ))  # fmt: skip
    scores = {order: {way: [mean(of) for of in ways[way]] for way in WAYS} for order, ways in after.items()}
    forgot = {
        way: [mean(a - b for a, b in zip(then[:-1], now[:-1], strict=True))
              for then, now in zip(learned[way], after[IN_TURN][way], strict=True)]
        for way in WAYS
    }  # fmt: skip
    table: Table = [["module", "jointly, %", "in turn, %", "when its turn was over, %", "forgotten, points"]]
    table += [
        [way, *(f"{100 * mean(scores[order][way]):.1f}" for order in scores),
         f"{100 * mean(map(mean, learned[way])):.1f}", f"{100 * mean(forgot[way]):.1f}"]
        for way in WAYS
    ]  # fmt: skip
    claims = [
        Claim.of_differences(
            f"trained jointly, a module for each task is better than one shared module {size}",
            [a - b for a, b in zip(scores[JOINTLY][MODULES], scores[JOINTLY][way], strict=True)],
        )
        for way, size in ((SMALL, "of the size of one"), (LARGE, "of the size of all of them"))
    ] + [
        Claim.of_differences(
            "trained in turn, the shared module of that size forgets the tasks before", forgot[LARGE]
        ),
        Claim.of_differences(
            "it is better when it is trained jointly than in turn, with half the batches",
            [a - b for a, b in zip(scores[JOINTLY][LARGE], scores[IN_TURN][LARGE], strict=True)],
        ),
        Claim.law(
            "modules for each task forget nothing: every task is solved as it was when its turn was over",
            [then == now for then, now in zip(learned[MODULES], after[IN_TURN][MODULES], strict=True)],
        ),
    ]  # fmt: skip
    figure, (axes,) = panels(1, width=7.2, height=3.6)
    for number, order in enumerate(scores):
        for place, way in enumerate(WAYS):
            values, at = [100 * x for x in scores[order][way]], place + 0.38 * (number - 0.5)
            axes.barh(at, mean(values), height=0.36, color=LINES[number], alpha=0.75, label=None if place else order)
            axes.scatter(values, [at] * len(values), color="black", s=8, zorder=3)
    axes.axvline(100 / SYMBOLS, color="#666666", linewidth=1, linestyle="--", label="chance")
    axes.set_yticks(range(len(WAYS)), list(WAYS))
    axes.invert_yaxis()
    axes.set(xlabel="labels found at the end, %, mean over six tasks (dots: seeds)", xlim=(0, 100))
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=9, ncols=3, loc="outside lower center")
    return Findings(
        tables={"Accuracy on new sequences at the end of the training": table},
        figure=figure,
        claims=claims,
        values={
            "accuracy at the end, by seed and task": after, "when the task's turn was over": learned,
            "forgotten": forgot,
        },
        settings={
            "tasks": TASKS, "symbols": SYMBOLS, "length": LENGTH, "batch": BATCH,
            "steps": f"{steps[JOINTLY]} jointly, {steps[IN_TURN]} in turn", "layers": 2,
            "dim": 64, "units of a module": UNITS,
        },
        notes=[
            "The base is trained on other permutations, then frozen, and so is its head; a module is an adapter behind "
            "the feed-forward of each layer. In one order all ways see as many sequences of each task. Forgotten: "
            "what all tasks but the last lose from the end of their turn to the end of the training. Seeds draw "
            "weights and the sequences to train and to test on; the permutations are the same.",
        ],
    )  # fmt: skip


def _model() -> Transformer:
    return tagger(SYMBOLS, TASKS, LENGTH + 1)


def _stream(seed: int, tasks: Sequence[int], variant: int = 0) -> Iterator[Batch]:
    """Batches of some of the tasks without end."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        ids, labels, drawn = domains(BATCH * TASKS, LENGTH, SYMBOLS, TASKS, draw, variant=variant)
        kept = torch.isin(drawn, torch.tensor(list(tasks))).nonzero().flatten()[:BATCH]
        yield {"input_ids": ids[kept], "labels": labels[kept], "task_ids": drawn[kept]}


def _only(task: int, seed: int) -> Examples:
    """Sequences of one task that training never saw."""
    ids, labels, drawn = domains(800, LENGTH, SYMBOLS, TASKS, torch.Generator().manual_seed(seed))
    return Examples({"input_ids": ids, "task_ids": drawn}, labels).at(drawn == task)


def _right(model: Transformer, test: Examples) -> float:
    return right(model, test.inputs["input_ids"], test.labels, test.inputs["task_ids"])
