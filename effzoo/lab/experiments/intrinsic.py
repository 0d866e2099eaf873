"""In how many random directions must a small network be trained: accuracy over the intrinsic dimension d."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import mean

import torch
from torch import nn

import effzoo
from effzoo.lab.analyses.intrinsic import crossing, d90
from effzoo.lab.analyses.small_nets import Convolutional, FullyConnected
from effzoo.lab.draw import LINES, band, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.fit import accuracy, fit
from effzoo.lab.images import DATA, Images, images

Net = Callable[[], nn.Module]
PROJECTIONS = {
    "dense": "intrinsic[dim={d}, projection=dense, seed={seed}, targets=*]",
    "Fastfood": "intrinsic[dim={d}, seed={seed}, targets=*]",
}
PROJECTIONS["SAID"] = "said[dim={d}, seed={seed}, targets=*]"
RATE, BASE_RATE = 0.3, 3e-3  # in the subspace a step must be larger: the columns of P have length 1
LARGE = 28  # height from which images are of MNIST's size
PUBLISHED = {
    "fully connected": "750 (MNIST, D 199,210)",
    "LeNet": "290 (MNIST, D 44,426)",
    "wider": "no number, nearly constant (figure 3)",
}


@experiment(
    "intrinsic", deck=(1, 0, 3), data=DATA,
    source="Li et al. 2018, Measuring the intrinsic dimension, arXiv:1804.08838, figures 1-3",
)  # fmt: skip
def intrinsic(run: Run) -> Findings:
    """In how many random directions must a small network be trained to reach 90 % of what it reaches in all?"""
    shape = images(run, train=1, test=1).size
    nets, dims, large = _nets(shape), _dims(shape, run.quick), shape[0] >= LARGE
    steps, batch = (run.choose(150, 300), 128) if large else (run.choose(300, 600), 64)
    ways = [(name, way) for name in nets for way in (PROJECTIONS if name == "fully connected" else ("dense",))]
    if large:  # a dense P of these sizes has more entries than are held
        ways = [(name, "Fastfood") for name in nets]
    bases: dict[str, list[float]] = {name: [] for name in nets}
    curves: dict[tuple[str, str], list[dict[int, float]]] = {way: [] for way in ways}
    for seed in run.seeds:
        data = images(run, train=run.choose(5_000, 10_000), test=2_000, seed=seed)
        for name in nets:
            bases[name].append(_reached(nets[name], data, None, steps, batch, seed))
        for name, way in ways:
            specs = {d: PROJECTIONS[way].format(d=d, seed=seed) for d in dims}
            curves[name, way].append(
                {d: _reached(nets[name], data, spec, steps, batch, seed) for d, spec in specs.items()}
            )
            run.say(
                f"seed {seed}, {name}, {way}: d90 = {d90(curves[name, way][-1], bases[name][-1])} of "
                f"{bases[name][-1]:.3f}"
            )

    nineties = {
        way: [d90(c, b) for c, b in zip(accuracies, bases[way[0]], strict=True)] for way, accuracies in curves.items()
    }
    crossings = {
        way: [crossing(c, b) for c, b in zip(accuracies, bases[way[0]], strict=True)]
        for way, accuracies in curves.items()
    }
    table = [
        [
            "network",
            "D",
            "projection",
            "all of D: accuracy",
            "d90 by seed",
            "crossing, mean",
            "d90 / D",
            "published d90",
        ]
    ]
    for name, way in ways:
        size = sum(p.numel() for p in nets[name]().parameters())
        known = [d for d in nineties[name, way] if d is not None]
        between = [x for x in crossings[name, way] if x is not None]
        table.append(
            [name, f"{size:,}", way, f"{mean(bases[name]):.3f}",
            ", ".join(f"{d or f'> {max(dims)}'}" for d in nineties[name, way]),
             f"{mean(between):.0f}" if between else "", f"{mean(known) / size:.2%}" if known else "",
             PUBLISHED[name] if way == ways[[n for n, _ in ways].index(name)][1] else ""]
        )  # fmt: skip
    known_curves = CURVES if large else {}
    by_d = [["d", *(f"{name}, {way}" for name, way in ways), *(f"published, {name}" for name in known_curves)]]
    for d in dims:
        shown = [f"{mean(c[d] for c in curves[pair]):.3f}" for pair in ways]
        published = [
            f"{known_curves[name][d]:.3f}" if d in known_curves[name] else "no number" for name in known_curves
        ]
        by_d.append([f"{d}", *shown, *published])

    figure, (left, right) = panels(2)
    for number, pair in enumerate(way for way in ways if known_curves or way[0] == "fully connected"):
        name, way = pair
        band(left, dims, [[c[d] for d in dims] for c in curves[pair]], name if known_curves else way, number)
        if known_curves:
            published_by_d = {d: known_curves[name][d] for d in dims if d in known_curves[name]}
            left.plot(
                list(published_by_d), list(published_by_d.values()), color=LINES[number], linestyle="--",
                label=f"{name}, published",
            )  # fmt: skip
    left.set(ylabel="accuracy", title="accuracy" if known_curves else "fully connected, by projection")
    for number, name in enumerate(nets):
        pair = next(way for way in ways if way[0] == name)
        share = [[c[d] / b for d in dims] for c, b in zip(curves[pair], bases[name], strict=True)]
        band(right, dims, share, ", ".join(pair), number)
    right.axhline(0.9, color="#888888", linewidth=1, linestyle=":")
    right.set(ylabel="share of the accuracy with all of D", title="by network")
    for axes in (left, right):
        axes.set(xlabel="d", xscale="log")
        axes.set_xticks(dims, [f"{d}" for d in dims], fontsize=8)
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    settings = {
        "data": data.about, "images": len(data.train), "test images": len(data.test), "steps": steps, "batch": batch,
        "learning rate": RATE, "rate of all": BASE_RATE,
    }  # fmt: skip
    return Findings(
        tables={"d90": table, "accuracy by d": by_d},
        figure=figure,
        claims=_claims(crossings, nets, dims),
        values={
            "baseline": bases,
            "accuracy": {f"{name}, {way}": accuracies for (name, way), accuracies in curves.items()},
            "d90": {f"{name}, {way}": accuracies for (name, way), accuracies in nineties.items()},
            "crossing": {f"{name}, {way}": dims for (name, way), dims in crossings.items()},
        },
        settings=settings,
        notes=[
            f"Data: {data.about}; networks of a size for its images. d90: the smallest d tried whose accuracy is 90 % "
            "of the same network's when all of it is trained. Published: MNIST, 100 epochs, threshold 0.90. The "
            "crossing lies between two d tried, on a straight line over log d; claims are of it. A seed draws the "
            "images to train and to test on, the start, the projection and the batches. The published column is of "
            "MNIST: --data with its folder shows its networks."
        ],
    )


CURVES = {  # of the authors' notebook, mean validation accuracy over 3 seeds
    "fully connected": {
        50: 0.451,
        100: 0.593,
        200: 0.758,
        300: 0.818,
        400: 0.839,
        500: 0.865,
        600: 0.880,
        750: 0.894,
        1000: 0.907,
        1500: 0.925,
    },
    "LeNet": {50: 0.570, 100: 0.763, 200: 0.864, 300: 0.903, 500: 0.939, 1000: 0.963, 2000: 0.975},
}


def _nets(size: tuple[int, int]) -> dict[str, Net]:
    height, width = size
    pixels = height * width
    if height >= LARGE:
        return {"fully connected": lambda: FullyConnected((pixels, 200, 200, 10)), "LeNet": lambda: Convolutional(size)}
    return {
        "fully connected": lambda: FullyConnected((pixels, 32, 32, 10)),
        "wider": lambda: FullyConnected((pixels, 128, 128, 10)),
        "LeNet": lambda: Convolutional(size, kernel=3, padding=1, hidden=(40, 28)),
    }


def _dims(size: tuple[int, int], quick: bool) -> list[int]:
    if size[0] >= LARGE:
        return [200, 500, 1000] if quick else [200, 300, 500, 1000]
    return [20, 40, 80, 120, 160, 240] if quick else [20, 40, 80, 100, 120, 140, 160, 240]


def _reached(net: Net, data: Images, spec: str | None, steps: int, batch: int, seed: int) -> float:
    """The accuracy of a network trained in all its parameters, or in those of a spec."""
    torch.manual_seed(seed)
    model = net() if spec is None else effzoo.attach(net(), spec)
    rate = BASE_RATE if spec is None else RATE
    fit(model, data.train.stream(batch, seed), steps, learning_rate=rate, weight_decay=0.0, bfloat16=False)
    return accuracy(model, data.test, 500)


def _claims(crossings: dict[tuple[str, str], list[float | None]], nets: dict[str, Net], dims: list[int]) -> list[Claim]:
    """Where no d tried reaches 90 %, all of D stands for the crossing; in the last claim the largest d does."""
    sizes = {name: sum(p.numel() for p in net().parameters()) for name, net in nets.items()}
    found = {
        (name, way): [sizes[name] if d is None else d for d in of_seeds] for (name, way), of_seeds in crossings.items()
    }
    shares = zip(*([d / sizes[name] for d in of_seeds] for (name, _), of_seeds in found.items()), strict=True)
    claims = [
        Claim.of_differences(
            "d90 is less than a tenth of the number of parameters, in every network and projection",
            [0.1 - max(of_seed) for of_seed in shares],
        )
    ]
    if "wider" in nets:
        times = sizes["wider"] / sizes["fully connected"]
        claims += [
            Claim.of_differences(
                f"with {times:.0f} times as many numbers a network has the same d90 within a factor of 1.5",
                _within(found["fully connected", "dense"], found["wider", "dense"], 1.5),
            ),
            Claim.of_differences(
                "Fastfood has the d90 of a dense projection within a factor of 1.25",
                _within(found["fully connected", "dense"], found["fully connected", "Fastfood"], 1.25),
            ),
        ]
    way = next(way for name, way in crossings if name == "LeNet")
    flat, convolutional = (
        [max(dims) if d is None else d for d in crossings[name, way]] for name in ("fully connected", "LeNet")
    )
    claims.append(
        Claim.of_differences(
            "the convolutional network has a smaller d90 than the fully connected one",
            [a - b for a, b in zip(flat, convolutional, strict=True)],
        )
    )
    return claims


def _within(a: Sequence[float], b: Sequence[float], factor: float) -> list[float]:
    """log(factor) - |log(a / b)| of each pair."""
    return [math.log(factor) - abs(math.log(x / y)) for x, y in zip(a, b, strict=True)]
