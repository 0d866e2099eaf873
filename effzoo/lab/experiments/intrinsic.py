"""In how many random directions must a small network be trained: accuracy over the intrinsic dimension d."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

import torch
from torch import nn

import effzoo
from effzoo.lab.analyses.intrinsic import crossing, d90
from effzoo.lab.analyses.small_nets import Convolutional, FullyConnected
from effzoo.lab.draw import band, panels
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
    data = images(run, train=run.choose(10_000, None), test=run.choose(2_000, None))
    nets = _nets(data)
    dims = _dims(data, run.quick)
    steps, batch = (run.choose(400, 4000), 128) if run.data is not None else (run.choose(300, 2000), 64)
    ways = [(name, way) for name in nets for way in (PROJECTIONS if name == "fully connected" else ("dense",))]
    if run.data is not None:  # a dense P of these sizes has more entries than are held
        ways = [("fully connected", "Fastfood"), ("fully connected", "SAID"), ("LeNet", "Fastfood")]
    bases: dict[str, list[float]] = {name: [] for name in nets}
    curves: dict[tuple[str, str], list[dict[int, float]]] = {way: [] for way in ways}
    for seed in run.seeds:
        for name in dict.fromkeys(name for name, _ in ways):
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
    known_curves = CURVES if run.data is not None else {}
    by_d = [["d", *(f"{name}, {way}" for name, way in ways), *(f"published, {name}" for name in known_curves)]]
    for d in dims:
        shown = [f"{mean(c[d] for c in curves[pair]):.3f}" for pair in ways]
        published = [
            f"{known_curves[name][d]:.3f}" if d in known_curves[name] else "no number" for name in known_curves
        ]
        by_d.append([f"{d}", *shown, *published])

    figure, (left, right) = panels(2, sharey=True)
    firsts = [way for way in ways if way[0] == "fully connected"]
    seconds = [next(pair for pair in ways if pair[0] == name) for name in nets if name in dict(ways)]
    for axes, chosen, title in ((left, firsts, "fully connected, by projection"), (right, seconds, "by network")):
        for number, pair in enumerate(chosen):
            share = [[c[d] / b for d in dims] for c, b in zip(curves[pair], bases[pair[0]], strict=True)]
            band(axes, dims, share, pair[1] if axes is left else ", ".join(pair), number)
        axes.axhline(0.9, color="#888888", linewidth=1, linestyle=":")
        axes.set(xlabel="d", xscale="log", title=title, ylim=(0, 1.05))
        axes.set_xticks(dims, [f"{d}" for d in dims], fontsize=8)
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    left.set_ylabel("share of the accuracy with all of D")
    settings = {
        "data": data.about, "images": len(data.train), "steps": steps, "batch": batch, "learning rate": RATE,
        "rate of all": BASE_RATE,
    }  # fmt: skip
    return Findings(
        tables={"d90": table, "accuracy by d": by_d},
        figure=figure,
        claims=_claims(nineties, crossings, len(run.seeds), nets),
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
            "crossing lies between two d tried, on a straight line over log d. A seed draws the start, the projection "
            "and the batches. The published column is of MNIST: --data with its folder shows its networks."
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


def _nets(data: Images) -> dict[str, Net]:
    height, width = data.size
    pixels = height * width
    if height >= 28:
        return {
            "fully connected": lambda: FullyConnected((pixels, 200, 200, 10)),
            "LeNet": lambda: Convolutional(data.size),
        }
    return {
        "fully connected": lambda: FullyConnected((pixels, 32, 32, 10)),
        "wider": lambda: FullyConnected((pixels, 128, 128, 10)),
        "LeNet": lambda: Convolutional(data.size, kernel=3, padding=1, hidden=(40, 28)),
    }


def _dims(data: Images, quick: bool) -> list[int]:
    if data.size[0] >= 28:
        return [50, 100, 200, 300, 500, 750, 1000, 1500] if not quick else [100, 200, 300, 500, 750, 1000, 1500]
    return [20, 40, 80, 120, 160, 240] if quick else [10, 20, 40, 60, 80, 100, 120, 140, 160, 200, 240, 320, 640]


def _reached(net: Net, data: Images, spec: str | None, steps: int, batch: int, seed: int) -> float:
    """The accuracy of a network trained in all its parameters, or in those of a spec."""
    torch.manual_seed(seed)
    model = net() if spec is None else effzoo.attach(net(), spec)
    rate = BASE_RATE if spec is None else RATE
    fit(model, data.train.stream(batch, seed), steps, learning_rate=rate, weight_decay=0.0, bfloat16=False)
    return accuracy(model, data.test, 500)


def _claims(
    nineties: dict[tuple[str, str], list[int | None]],
    crossings: dict[tuple[str, str], list[float | None]],
    seeds: int,
    nets: dict[str, Net],
) -> list[Claim]:
    sizes = {name: sum(p.numel() for p in net().parameters()) for name, net in nets.items()}
    claims = [
        Claim(
            "d90 is less than a tenth of the number of parameters, in every network and projection",
            tuple(
                all((d := dims[i]) is not None and d < sizes[name] / 10 for (name, _), dims in nineties.items())
                for i in range(seeds)
            ),
        )
    ]
    if "wider" in nets:
        pairs = zip(crossings["fully connected", "dense"], crossings["wider", "dense"], strict=True)
        times = sizes["wider"] / sizes["fully connected"]
        claims.append(
            Claim(
                f"with {times:.0f} times as many numbers a network has the same d90 within a factor of 1.5",
                tuple(_near(a, b, 1.5) for a, b in pairs),
            )
        )
        pairs = zip(crossings["fully connected", "dense"], crossings["fully connected", "Fastfood"], strict=True)
        claims.append(
            Claim(
                "Fastfood has the d90 of a dense projection within a factor of 1.25",
                tuple(_near(a, b, 1.25) for a, b in pairs),
            )
        )
    first = next(way for name, way in nineties if name == "LeNet")
    reference = crossings["fully connected", first]
    pairs = zip(reference, crossings["LeNet", first], strict=True)
    claims.append(
        Claim(
            "the convolutional network has a smaller d90 than the fully connected one",
            tuple(_below(b, a) for a, b in pairs),
        )
    )
    return claims


def _near(a: float | None, b: float | None, factor: float) -> bool:
    return a is not None and b is not None and max(a, b) <= factor * min(a, b)


def _below(a: float | None, b: float | None) -> bool:
    return a is not None and (b is None or a < b)
