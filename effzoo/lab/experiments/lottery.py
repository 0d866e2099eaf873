"""Lottery tickets: sparse networks from where they started against the same sparse networks drawn anew."""

from __future__ import annotations

import math
from collections.abc import Sequence

from effzoo.lab.analyses.lenet import LeNet
from effzoo.lab.analyses.lottery import Learned, iterative, masked, reshuffled
from effzoo.lab.analyses.seeds import judged, percent
from effzoo.lab.draw import band, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.images import DATA, images

FAST, SMALL = 7, 15  # prunings of a fifth each: 21 % and 3.6 % are left
ANEW = 1000  # added to a seed for the weights that are drawn anew
PUBLISHED = {  # Frankle & Carbin 2019, section 2 and figures 3 and 4
    0: "original, just over 98 %",
    3: "51.3 %: faster and better than the original",
    FAST: "21.1 %: learns fastest; drawn anew 2.51 times slower (about)",
    9: "13.5 %: best, about 0.3 points above the original",
    SMALL: "3.6 %: back at the original",
}


@experiment(
    "lottery", deck=(3, 0), data=DATA,
    source="Frankle & Carbin 2019, The lottery ticket hypothesis, arXiv:1803.03635, figures 3 and 4",
)  # fmt: skip
def lottery(run: Run) -> Findings:
    """Does a sparse network learn as well as the whole one from where it started, and worse from a new start?"""
    data = images(run)
    on_mnist = len(data.train) > 5000
    rounds, steps, every, batch = (
        (20, 200, 10, 60) if run.quick else (20, 20000 if on_mnist else 2000, 100 if on_mnist else 20, 60)
    )
    if run.quick and on_mnist:
        steps, every = 600, 30
    height, width = data.size
    levels = tuple(level for level in (1, 3, 5, FAST, 9, 12, SMALL, 18, 20) if level <= rounds)
    tickets: dict[str, list[Learned]] = {}
    anew: dict[str, dict[int, Learned]] = {}
    places: dict[str, dict[int, Learned]] = {}
    for seed in run.seeds:
        options = {"steps": steps, "every": every, "batch": batch, "seed": seed}
        trainings = iterative(LeNet(height * width, seed=seed), data.train, data.test, rounds=rounds, **options)
        tickets[str(seed)] = trainings
        anew[str(seed)] = {
            level: masked(
                LeNet(height * width, seed=seed + ANEW), trainings[level].masks, data.train, data.test, **options
            )
            for level in levels
        }
        places[str(seed)] = {
            level: masked(
                LeNet(height * width, seed=seed),
                reshuffled(trainings[level].masks, seed),
                data.train,
                data.test,
                **options,
            )
            for level in levels
        }
        run.say(
            f"seed {seed}: whole {100 * trainings[0].last:.1f}, 21 % left {100 * trainings[FAST].last:.1f}, drawn anew "
            f"{100 * anew[str(seed)][FAST].last:.1f}"
        )
    seeds = [str(seed) for seed in run.seeds]
    left = [tickets[seeds[0]][level].left for level in range(rounds + 1)]
    # an accuracy on the way, of which it is counted when it is reached
    goal = {s: 0.95 * tickets[s][0].last for s in seeds}

    table = [
        [
            "weights left",
            "ticket",
            "drawn anew",
            "same start, other places",
            "steps to 95 % of the whole: ticket",
            "drawn anew",
            "published",
        ]
    ]
    for level in (0, *levels):
        cells = [f"{100 * left[level]:.1f} %", percent([tickets[s][level].last for s in seeds])]
        cells += ["", ""] if not level else [percent([by[s][level].last for s in seeds]) for by in (anew, places)]
        cells.append(_steps([tickets[s][level].reached(goal[s]) for s in seeds]))
        cells.append("" if not level else _steps([anew[s][level].reached(goal[s]) for s in seeds]))
        table.append([*cells, PUBLISHED.get(level, "")])

    figure, (first, second) = panels(2)
    shares = [100 * left[level] for level in levels]
    band(
        first,
        [100 * x for x in left],
        [[100 * learned.last for learned in tickets[s]] for s in seeds],
        "ticket: rewound to its start",
        0,
    )
    band(first, shares, [[100 * anew[s][level].last for level in levels] for s in seeds], "same mask, drawn anew", 1)
    band(
        first, shares, [[100 * places[s][level].last for level in levels] for s in seeds], "same start, other places", 2
    )
    ticks = [100, 50, 20, 10, 5, 2]
    first.set(xscale="log", xlabel="weights left, %", ylabel="accuracy, %", title="at the end of training")
    first.invert_xaxis()
    first.set_xticks(ticks, [f"{tick}" for tick in ticks])
    first.minorticks_off()
    first.legend(frameon=False, fontsize=8, loc="lower left")
    at = [every * (i + 1) for i in range(steps // every)]
    band(second, at, [[100 * x for x in tickets[s][0].accuracies] for s in seeds], "whole network", 6)
    for number, (name, runs) in enumerate(
        (
            (f"ticket, {100 * left[FAST]:.0f} % left", [tickets[s][FAST] for s in seeds]),
            ("the same, drawn anew", [anew[s][FAST] for s in seeds]),
        )
    ):
        band(second, at, [[100 * x for x in learned.accuracies] for learned in runs], name, number)
    second.set(xlabel="step", ylabel="accuracy, %", title="on the way", ylim=(50, 100))
    second.legend(frameon=False, fontsize=8, loc="lower right")

    sparse = [level for level in levels if level >= FAST]
    claims = [
        Claim(
            "with 21 % of the weights the ticket is at least as accurate as the whole network",
            judged(seeds, lambda s: tickets[s][FAST].last >= tickets[s][0].last),
        ),
        Claim(
            "and gets to 95 % of the whole network's accuracy in fewer steps than that",
            judged(seeds, lambda s: _number(tickets[s][FAST], goal[s]) < _number(tickets[s][0], goal[s])),
        ),
        Claim(
            "the same sparse network drawn anew gets there later than the ticket",
            judged(seeds, lambda s: _number(anew[s][FAST], goal[s]) > _number(tickets[s][FAST], goal[s])),
        ),
        Claim(
            "at 21 % and below, drawn anew is worse at every level",
            judged(seeds, lambda s: all(anew[s][level].last < tickets[s][level].last for level in sparse)),
        ),
        Claim(
            "with the start of the ticket and other places kept it is worse too, at every level",
            judged(seeds, lambda s: all(places[s][level].last < tickets[s][level].last for level in sparse)),
        ),
    ]
    settings = {
        "network": "LeNet-300-100 without biases", "weights": sum(mask.numel() for mask in tickets[seeds[0]][0].masks),
        "images": data.about, "steps of each training": steps, "prunings": rounds, "batch": batch,
        "learning rate": "1.2e-3, falling to 0",
    }  # fmt: skip
    return Findings(
        tables={"accuracy": table},
        figure=figure,
        claims=claims,
        values={
            "left": left,
            "tickets": {s: [learned.accuracies for learned in tickets[s]] for s in seeds},
            "drawn anew": {s: {str(level): anew[s][level].accuracies for level in levels} for s in seeds},
            "other places": {s: {str(level): places[s][level].accuracies for level in levels} for s in seeds},
        },
        settings=settings,
        notes=[
            "Published: MNIST, 50,000 steps, a constant learning rate, biases; accuracy where the loss on held-out "
            "images is least. Here a fifth of what is left goes in each round, a tenth in the last matrix, and "
            "accuracy is that of the last step on test images. A seed draws weights and batches. Drawn anew: the "
            "ticket's mask on other initial weights; other places: the ticket's initial weights, as many kept at "
            "random."
        ],
    )


def _number(learned: Learned, goal: float) -> float:
    step = learned.reached(goal)
    return math.inf if step is None else float(step)


def _steps(values: Sequence[int | None]) -> str:
    return ", ".join("never" if value is None else f"{value}" for value in values)
