"""Residual adapters with batch norm: a network for digits learns another domain."""

from __future__ import annotations

import copy
from statistics import mean

import torch

from effzoo.lab.analyses.resnet import WAYS, ResNet, specialise, train
from effzoo.lab.analyses.supermasks import task
from effzoo.lab.draw import LINES, panels
from effzoo.lab.experiment import Claim, Findings, Run, Table, experiment
from effzoo.lab.fit import Examples, accuracy
from effzoo.lab.images import DATA, images

DOMAINS = ("upside down", "inverted")


@experiment(
    "residual", deck=3, source="Rebuffi et al. 2017, Learning multiple visual domains, arXiv:1705.08045, section 3",
    data=DATA,
)  # fmt: skip
def residual(run: Run) -> Findings:
    """What must a residual network train for another domain: batch norms, 1 x 1 adapters, or all of it?

    The network is trained on digits; the other domains are digits upside down, and dark on light.
    """
    whole, steps = images(run), run.choose(80, 120)
    every = Examples(
        {"pixels": torch.cat([part.inputs["pixels"] for part in (whole.train, whole.test)])},
        torch.cat([whole.train.labels, whole.test.labels]),
    )
    test = len(every) // 3
    right: dict[str, dict[str, list[float]]] = {domain: {way: [] for way in WAYS} for domain in DOMAINS}
    trained = {}
    for seed in run.seeds:
        places = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
        training, testing = every.at(places[test:]), every.at(places[:test])
        torch.manual_seed(seed)
        base = ResNet()
        train(base, training.stream(64, seed), 2 * steps, 3e-3)
        for domain in DOMAINS:
            few, new = _domain(domain, training.at(slice(0, 200))), _domain(domain, testing)
            for way in WAYS:
                torch.manual_seed(seed)
                net = copy.deepcopy(base)
                trained[way] = specialise(net, way)
                train(net, few.stream(32, seed), steps, 3e-3)
                right[domain][way].append(accuracy(net, new, size=512))
        run.say(f"seed {seed}: {accuracy(base, testing):.3f}; " + ", ".join(
            f"{domain}: " + " ".join(f"{of[way][-1]:.2f}" for way in WAYS) for domain, of in right.items()
        ))  # fmt: skip
    table: Table = [["trained", "numbers", *(f"{domain}, %" for domain in DOMAINS)]]
    table += [
        [way, f"{trained[way]:,}", *(f"{100 * mean(right[domain][way]):.1f}" for domain in DOMAINS)] for way in WAYS
    ]
    both = {way: [mean(right[d][way][i] for d in DOMAINS) for i in range(len(run.seeds))] for way in WAYS}
    pairs = (
        ("norms", "head", "batch norms and head are better than the head alone"),
        ("adapters and norms", "norms", "with 1 x 1 adapters it is better still"),
        ("full", "adapters and norms", "training everything is better than adapters and norms"),
    )
    claims = [
        Claim.of_differences(text, [a - b for a, b in zip(both[more], both[less], strict=True)])
        for more, less, text in pairs
    ]
    figure, (axes,) = panels(1, width=6.4)
    for number, domain in enumerate(DOMAINS):
        for place, way in enumerate(WAYS):
            values = [100 * x for x in right[domain][way]]
            at = place + 0.36 * (number - 0.5)
            axes.barh(
                at, mean(values), height=0.34, color=LINES[number], alpha=0.75, label=domain if not place else None
            )
            axes.scatter(values, [at] * len(values), color="black", s=8, zorder=3)
    axes.set_yticks(range(len(WAYS)), [f"{way}, {trained[way]:,}" for way in WAYS])
    axes.invert_yaxis()
    axes.set(xlabel="accuracy, %", title="200 images of the other domain", xlim=(0, 100))
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 0.62))
    return Findings(
        tables={"Accuracy on the other domain": table},
        figure=figure,
        claims=claims,
        values={"accuracy": right, "trained": trained},
        settings={"steps": steps, "channels": 16, "blocks": 2, "images of the domain": 200, "images": whole.about},
        notes=[
            "An adapter is BN(y + M y) behind each convolution y, M a 1 x 1 convolution that starts at 0; the norm is "
            "the network's own, trained for the domain as in the paper. The running means and variances follow the "
            "domain in every row, the head's too. Claims are of the mean over both domains; seeds draw the split, the "
            "weights and the 200 images.",
        ],
    )  # fmt: skip


def _domain(name: str, examples: Examples) -> Examples:
    if name == "inverted":
        return Examples({"pixels": -examples.inputs["pixels"]}, examples.labels)
    return task(name, examples)
