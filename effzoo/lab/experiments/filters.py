"""Structured pruning of a convolutional network: which filters can go."""

from __future__ import annotations

from statistics import mean

import torch

from effzoo.lab.analyses.filters import accuracy_without, order
from effzoo.lab.analyses.small_nets import Convolutional
from effzoo.lab.draw import LINES, band, panels
from effzoo.lab.experiment import Claim, Findings, Run, Table, experiment
from effzoo.lab.fit import Examples, accuracy, fit
from effzoo.lab.images import DATA, images

SHARES = (0.0, 0.25, 0.5, 0.625, 0.75, 0.875)
CHANNELS = (16, 32)
ORDERS = ("smallest first", "random", "largest first")


@experiment("filters", deck=3, source="Li et al. 2017, Pruning filters for efficient ConvNets, arXiv:1608.08710, "
"section 3",
            data=DATA)  # fmt: skip
def filters(run: Run) -> Findings:
    """How many filters of a convolutional network can go, and does their size say which?

    A filter is all weights of one output channel of a convolution; its size is the sum of their absolute values.
    """
    whole = images(run)
    pixels = torch.cat([whole.train.inputs["pixels"], whole.test.inputs["pixels"]])
    every = Examples({"pixels": pixels}, torch.cat([whole.train.labels, whole.test.labels]))
    steps, networks = run.choose((300, 1), (600, 6))
    test = len(every) // 3
    found: dict[str, list[list[float]]] = {name: [] for name in ORDERS}
    singles: list[list[float]] = []
    for seed in run.seeds:
        places = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
        training, testing = every.at(places[test:]), every.at(places[:test])
        curves: dict[str, list[list[float]]] = {name: [] for name in ORDERS}
        alone: list[float] = []
        for number in range(networks):
            torch.manual_seed(100 * seed + number)
            net = Convolutional(whole.size, channels=CHANNELS, kernel=3, padding=1, hidden=(64, 32))
            fit(net, training.stream(64, 100 * seed + number), steps, learning_rate=3e-3, bfloat16=False)
            base = accuracy(net, testing)
            for name in ORDERS:
                draws = range(5) if name == "random" else range(1)
                curves[name] += [_curve(net, name, 1000 * seed + 10 * number + draw, testing) for draw in draws]
            alone += [
                base - accuracy_without(net, [[i] if place == which else [] for which in range(2)], testing)
                for place, size in enumerate(CHANNELS) for i in range(size)
            ]  # fmt: skip
        for name in ORDERS:
            found[name].append([mean(at) for at in zip(*curves[name], strict=True)])
        singles.append(alone)
        run.say(
            f"seed {seed}: {found[ORDERS[0]][-1][0]:.3f}, without half: "
            + ", ".join(f"{n} {found[n][-1][2]:.3f}" for n in ORDERS)
        )
    table: Table = [["filters taken out", *(f"{100 * share:g} %" for share in SHARES)]]
    table += [[name, *(f"{100 * mean(at):.1f}" for at in zip(*found[name], strict=True))] for name in ORDERS]
    half = SHARES.index(0.5)
    small, drawn, large = (found[name] for name in ORDERS)
    lost = [[100 * x for x in of] for of in singles]
    claims = [
        Claim.of_differences(
            "with half of the filters gone, the smallest first is better than at random",
            [a[half] - b[half] for a, b in zip(small, drawn, strict=True)],
        ),
        Claim.of_differences(
            "with half of the filters gone, at random is better than the largest first",
            [a[half] - b[half] for a, b in zip(drawn, large, strict=True)],
        ),
        Claim.of_differences(
            "most filters alone are worth less than a point: above half of them",
            [mean(x < 1 for x in of) - 0.5 for of in lost],
        ),
    ]
    figure, (left, right) = panels(2)
    for number, name in enumerate(ORDERS):
        band(left, [100 * s for s in SHARES], [[100 * x for x in row] for row in found[name]], name, number)
    left.set(xlabel="filters taken out of each convolution, %", ylabel="accuracy, %", ylim=(0, 100))
    left.legend(frameon=False, fontsize=8)
    right.hist([x for of in lost for x in of], bins=24, color=LINES[0], edgecolor="white", linewidth=0.4)
    right.set(xlabel="points lost without one filter", ylabel="filters, all seeds", title="one taken out at a time")
    return Findings(
        tables={"Accuracy, %, without further training": table},
        figure=figure,
        claims=claims,
        values={"accuracy": found, "points lost without one filter": lost},
        settings={"channels": list(CHANNELS), "networks for each seed": networks, "steps": steps, "test": test,
                  "images": whole.about},
        notes=[
            "A filter that is taken out gives 0 at every place; nothing is trained afterwards, where the paper trains "
            "on. Seeds draw the split of the images, the weights of every network and five random orders for each; "
            "networks differ so much that a seed is the mean of several; with one for each of five seeds what the "
            "orders differ by cannot be told."
        ],
    )  # fmt: skip


def _curve(net: Convolutional, name: str, seed: int, testing: Examples) -> list[float]:
    """The accuracy without each share of the filters, in an order."""
    ranked = [order(convolution.weight, name, seed) for convolution in net.filters()]
    return [accuracy_without(net, [r[: round(share * len(r))] for r in ranked], testing) for share in SHARES]
