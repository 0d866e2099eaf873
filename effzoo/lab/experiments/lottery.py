"""Lottery tickets: sparse networks from where they started against the same sparse networks drawn anew."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from effzoo.lab.analyses.lenet import LeNet
from effzoo.lab.analyses.lottery import Learned, iterative, masked, reshuffled
from effzoo.lab.analyses.seeds import percent
from effzoo.lab.draw import band, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.images import DATA, images

HALF, FAST, BEST = 3, 7, 9  # prunings of a fifth each: 51, 21 and 13 % are left
LEVELS = (HALF, FAST, BEST)
ANEW = 1000  # added to a seed for the weights that are drawn anew
MARGIN = 0.005  # by which "at least as accurate" may miss
PUBLISHED = {  # Frankle & Carbin 2019, section 2 and figures 3 and 4
    0: "original, just over 98 %",
    HALF: "51.3 %: faster and better than the original",
    FAST: "21.1 %: learns fastest; drawn anew 2.51 times slower (about)",
    BEST: "13.5 %: best, about 0.3 points above the original",
}


@experiment(
    "lottery", deck=(3, 0), data=DATA,
    source="Frankle & Carbin 2019, The lottery ticket hypothesis, arXiv:1803.03635, figures 3 and 4",
)  # fmt: skip
def lottery(run: Run) -> Findings:
    """Does a sparse network learn as well as the whole one from where it started, and worse from a new start?"""
    (steps, every), batch = run.choose((160, 10), (300, 20)), 60
    tickets: dict[str, dict[int, Learned]] = {}
    anew: dict[str, dict[int, Learned]] = {}
    places: dict[str, dict[int, Learned]] = {}
    for seed in run.seeds:
        data = images(run, train=10000, test=2000, seed=seed)
        height, width = data.size
        options = {"steps": steps, "every": every, "batch": batch, "seed": seed}
        start, other = (LeNet(height * width, seed=seed + added) for added in (0, ANEW))
        trainings = iterative(copy.deepcopy(start), data.train, data.test, rounds=BEST, **options)
        tickets[str(seed)] = dict(enumerate(trainings))
        anew[str(seed)], places[str(seed)] = {}, {}
        for level in LEVELS:
            chosen = trainings[level].masks
            moved = reshuffled(chosen, seed)
            anew[str(seed)][level] = masked(copy.deepcopy(other), chosen, data.train, data.test, **options)
            places[str(seed)][level] = masked(copy.deepcopy(start), moved, data.train, data.test, **options)
        run.say(
            f"seed {seed}: whole {100 * trainings[0].last:.1f}, 21 % left {100 * trainings[FAST].last:.1f}, drawn anew "
            f"{100 * anew[str(seed)][FAST].last:.1f}"
        )
    seeds = [str(seed) for seed in run.seeds]
    left = [tickets[seeds[0]][level].left for level in range(BEST + 1)]
    goal = {s: 0.95 * tickets[s][0].last for s in seeds}

    table = [
        [
            "weights left",
            "ticket",
            "drawn anew",
            "same start, other places",
            "steps to 95 % of the whole: ticket",
            "drawn anew: steps",
            "published",
        ]
    ]
    for level in (0, *LEVELS):
        cells = [f"{100 * left[level]:.1f} %", percent([tickets[s][level].last for s in seeds])]
        cells += ["", ""] if not level else [percent([by[s][level].last for s in seeds]) for by in (anew, places)]
        cells.append(_steps([tickets[s][level].reached(goal[s]) for s in seeds]))
        cells.append("" if not level else _steps([anew[s][level].reached(goal[s]) for s in seeds]))
        table.append([*cells, PUBLISHED.get(level, "")])

    figure, (first, second) = panels(2)
    curves = (
        ("rewound to its start", tickets),
        ("same mask, weights drawn anew", anew),
        ("same start, other places", places),
    )
    for number, (label, by) in enumerate(curves):
        at = range(BEST + 1) if by is tickets else LEVELS
        runs = [[100 * by[s][level].last for level in at] for s in seeds]
        band(first, [100 * left[level] for level in at], runs, label, number)
    ticks = [100, 50, 35, 25, 15]
    first.set(xscale="log", xlabel="weights left, %", ylabel="accuracy, %", title="at the end of training")
    first.invert_xaxis()
    first.set_xticks(ticks, [f"{tick}" for tick in ticks])
    first.minorticks_off()
    first.legend(frameon=False, fontsize=8, loc="lower left")
    steps_at = [every * (i + 1) for i in range(steps // every)]
    share = f"{100 * left[FAST]:.0f} % left"
    ways = (
        ("whole network", 6, [tickets[s][0] for s in seeds]),
        (f"{share}, rewound", 0, [tickets[s][FAST] for s in seeds]),
        (f"{share}, drawn anew", 1, [anew[s][FAST] for s in seeds]),
    )
    for label, number, learned in ways:
        band(second, steps_at, [[100 * x for x in one.accuracies] for one in learned], label, number)
    second.set(xlabel="step", ylabel="accuracy, %", title="on the way", ylim=(50, 100))
    second.legend(frameon=False, fontsize=8, loc="lower right")

    def needs(one: Learned, s: str) -> float:
        """Steps to the goal, all of them where it is never reached, as a share of all."""
        return (one.reached(goal[s]) or steps) / steps

    def ahead(by: Mapping[str, dict[int, Learned]], s: str) -> float:
        """By how much the ticket is more accurate than others as sparse, at the level where it is least."""
        return min(tickets[s][level].last - by[s][level].last for level in (FAST, BEST))

    claims = [
        Claim.of_differences(
            "with 51 % of the weights the ticket is more accurate than the whole network",
            [tickets[s][HALF].last - tickets[s][0].last for s in seeds],
        ),
        Claim.of_differences(
            "with 21 % it is at least as accurate, to within half a point",
            [MARGIN + tickets[s][FAST].last - tickets[s][0].last for s in seeds],
        ),
        Claim.of_differences(
            "with 21 % it gets to 95 % of the whole network's accuracy in fewer steps than that (share of the steps)",
            [needs(tickets[s][0], s) - needs(tickets[s][FAST], s) for s in seeds],
        ),
        Claim.of_differences(
            "the same sparse network drawn anew gets there later than the ticket (share of the steps)",
            [needs(anew[s][FAST], s) - needs(tickets[s][FAST], s) for s in seeds],
        ),
        Claim.of_differences(
            "with 21 % and with 13 %, drawn anew is less accurate than the ticket", [ahead(anew, s) for s in seeds]
        ),
        Claim.of_differences(
            "with the start of the ticket and other places kept it is less accurate too, at both",
            [ahead(places, s) for s in seeds],
        ),
    ]
    settings = {
        "network": "LeNet-300-100 without biases", "weights": sum(mask.numel() for mask in tickets[seeds[0]][0].masks),
        "images": data.about, "trained on": len(data.train), "counted on": len(data.test),
        "steps of each training": steps, "prunings": BEST, "batch": batch,
        "learning rate": "1.2e-3, falling to 0",
    }  # fmt: skip
    return Findings(
        tables={"accuracy": table},
        figure=figure,
        claims=claims,
        values={
            "left": left,
            "tickets": {s: [learned.accuracies for learned in tickets[s].values()] for s in seeds},
            "drawn anew": {s: {str(level): anew[s][level].accuracies for level in LEVELS} for s in seeds},
            "other places": {s: {str(level): places[s][level].accuracies for level in LEVELS} for s in seeds},
        },
        settings=settings,
        notes=[
            "Published: MNIST, 50,000 steps, a constant learning rate, biases; accuracy where the loss on held-out "
            "images is least. Here a fifth of what is left goes in each round, a tenth in the last matrix, and "
            "accuracy is that of the last step on test images. A seed draws the images, weights and batches. Drawn "
            "anew: the ticket's mask on other initial weights; other places: the ticket's initial weights, as many "
            "kept at random. At least as accurate is read as at most half a point less, since no number of images "
            "shows that two are the same."
        ],
    )


def _steps(values: Sequence[int | None]) -> str:
    return ", ".join("never" if value is None else f"{value}" for value in values)
