"""Freezing the first layers, and the last layers against adapters of as many parameters."""

from __future__ import annotations

from typing import Any

from effzoo import peft
from effzoo.lab.analyses.seeds import judged, mean, percent
from effzoo.lab.analyses.tuning import body_parameters, fast_accuracy, tune
from effzoo.lab.draw import LINES, MARKERS, band, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.texts import DATA, Texts, minilm, texts

# for some dozens of steps: four, two and five times what the methods take on their own
RATE, ADAPTER_RATE, HEAD_RATE = 2e-4, 2e-3, 5e-3
REACHED = 0.9


@experiment(
    "freezing", deck=4, data=DATA,
    source="Lee et al. 2019, What would Elsa do?, arXiv:1911.03090, section 4; Houlsby et al. 2019, "
    "arXiv:1902.00751, figures 1 and 4",
)  # fmt: skip
def freezing(run: Run) -> Findings:
    """How many of the first layers can stay frozen, and do adapters use the same number of parameters better than the
    last layers do?"""
    length, steps, tests = run.choose((24, 24, 200), (128, 300, 1000))
    data = texts(run, length=length, train=run.choose(384, 1100), test=tests)
    depth = len(minilm(len(data.names)).blocks)
    frozen = run.choose((0, 2, 4, 5, 6), tuple(range(depth + 1)))
    accuracies: dict[str, dict[str, float]] = {}  # by setting, by seed
    counts: dict[str, int] = {}
    specs: dict[str, str] = {}
    for seed in run.seeds:
        model = minilm(len(data.names), seed=seed)
        for first in frozen:
            name = f"first {first} frozen"
            _one(model, f"freeze[first={first}]", name, RATE, data, steps, seed, accuracies, counts, specs)
        layer = counts[f"first {depth - 1} frozen"]
        for name, method, budget in _adapters(layer, run.quick):
            spec = str(peft.within(model, method, budget))
            _one(model, spec, name, ADAPTER_RATE, data, steps, seed, accuracies, counts, specs)
        run.say(
            f"seed {seed}: "
            + ", ".join(f"{name} {100 * by_seed[str(seed)]:.1f}" for name, by_seed in accuracies.items())
        )

    seeds = [str(seed) for seed in run.seeds]
    every = [100 * value for by_seed in accuracies.values() for value in by_seed.values()]
    whole, top, two = (accuracies[f"first {first} frozen"] for first in (0, depth - 1, depth - 2))
    head, equal = accuracies[f"first {depth} frozen"], accuracies["houlsby, as many as the last layer"]
    small = accuracies["houlsby, a thirtieth of it"]
    published = {
        f"first {depth - 2} frozen": "90 % with a fourth of the layers trained",
        "houlsby, a thirtieth of it": "no number (curves)",
    }
    table = [["trained", "spec", "parameters", "accuracy", "of full fine-tuning", "published"]]
    for name, by_seed in accuracies.items():
        relative = mean([by_seed[s] / whole[s] for s in seeds])
        table.append(
            [
                name,
                f"`{specs[name]}`",
                f"{counts[name]:,}",
                percent([by_seed[s] for s in seeds]),
                f"{100 * relative:.1f} %",
                published.get(name, ""),
            ]
        )

    figure, (left, right) = panels(2, sharey=True)
    band(
        left,
        list(frozen),
        [[100 * accuracies[f"first {first} frozen"][s] for first in frozen] for s in seeds],
        "freeze the first X",
        0,
    )
    left.axhline(
        100 * REACHED * mean(list(whole.values())),
        color="#888888",
        linewidth=0.9,
        linestyle=":",
        label="90 % of full fine-tuning",
    )
    left.set(xlabel=f"frozen layers of {depth} (embeddings too)", ylabel="accuracy, %", title="freezing from below")
    left.set_ylim(min(every) - 0.5 * (max(every) - min(every)), max(every) + 1)  # room for the legends
    left.set_xticks(list(frozen))
    left.legend(frameon=False, fontsize=8, loc="lower left")
    lines = [("last layers", [f"first {first} frozen" for first in frozen if first < depth])]
    lines += [
        (kind, [name for name, *_ in _adapters(layer, run.quick) if name.startswith(kind)])
        for kind in ("houlsby", "pfeiffer")
    ]
    for number, (label, names) in enumerate(lines):
        names = sorted(names, key=lambda name: counts[name])
        x, runs = [counts[name] for name in names], [[100 * accuracies[name][s] for name in names] for s in seeds]
        if len(names) > 1:
            band(right, x, runs, label, number)
        else:
            means, low, high = (100 * f(list(accuracies[names[0]].values())) for f in (mean, min, max))
            style: dict[str, Any] = {"color": LINES[number], "marker": MARKERS[number], "linestyle": "", "label": label}
            right.errorbar(x, [means], [[means - low], [high - means]], **style)
    right.axvline(layer, color="#888888", linewidth=0.9, linestyle=":", label="one layer")
    right.set(xscale="log", xlabel="trained parameters (without the head)", title="at the same number of parameters")
    right.legend(frameon=False, fontsize=8, loc="lower right")

    settings = {
        "model": "minilm", "length": length, "steps": steps, "batch": 16, "train texts": len(data.train),
        "test texts": len(data.test), "learning rates": f"layers {RATE}, adapters {ADAPTER_RATE}, head {HEAD_RATE}",
    }  # fmt: skip
    return Findings(
        tables={"accuracy": table},
        figure=figure,
        claims=[
            Claim(
                f"with {depth - 2} of {depth} layers frozen, 90 % of full fine-tuning is reached",
                judged(seeds, lambda s: two[s] >= REACHED * whole[s]),
            ),
            Claim(
                f"with {depth - 1} of {depth} layers frozen, less than a fourth trained, it is too",
                judged(seeds, lambda s: top[s] >= REACHED * whole[s]),
            ),
            Claim(
                "with all of them frozen, the head alone trained, it is not",
                judged(seeds, lambda s: head[s] < REACHED * whole[s]),
            ),
            Claim(
                "adapters (houlsby) with as many parameters as the last layer are better than the last layer",
                judged(seeds, lambda s: equal[s] > top[s]),
            ),
            Claim(
                "with a thirtieth of them they are at least as good as the last layer",
                judged(seeds, lambda s: small[s] >= top[s]),
            ),
        ],
        values={"accuracy": accuracies, "parameters": counts, "specs": specs},
        settings=settings,
        notes=[
            "Published: BERT and RoBERTa on GLUE and IMDb, trained for epochs; in Houlsby's figure, over nine GLUE "
            "tasks, adapters hold their accuracy over two orders of magnitude while the last layers lose much. A seed "
            "draws the head and the order of the texts. Embeddings are frozen throughout. Parameters are those without "
            "the task head, which every setting trains."
        ],
    )


def _adapters(layer: int, quick: bool) -> list[tuple[str, str, int]]:
    """Name, method and budget: as many parameters as a layer, a thirtieth, and in the full size what lies between."""
    settings = [
        ("houlsby, as many as the last layer", "houlsby", layer),
        ("pfeiffer, as many as the last layer", "pfeiffer", layer),
    ]
    settings += (
        []
        if quick
        else [("houlsby, a sixth of it", "houlsby", layer // 6), ("pfeiffer, a sixth of it", "pfeiffer", layer // 6)]
    )
    settings += [("houlsby, a thirtieth of it", "houlsby", layer // 30)]
    return settings + ([] if quick else [("pfeiffer, a thirtieth of it", "pfeiffer", layer // 30)])


def _one(
    model: Any,
    spec: str,
    name: str,
    rate: float,
    data: Texts,
    steps: int,
    seed: int,
    accuracies: dict[str, dict[str, float]],
    counts: dict[str, int],
    specs: dict[str, str],
) -> None:
    tune(model, spec, data.train, name="tried", steps=steps, seed=seed, rate=rate, head_rate=HEAD_RATE)
    counts[name], specs[name] = body_parameters(model), spec
    accuracies.setdefault(name, {})[str(seed)] = fast_accuracy(model, data.test)
    peft.detach(model, "tried")
