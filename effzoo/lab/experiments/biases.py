"""Which biases matter: groups of them trained alone, their gradients, and how far they move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from effzoo import peft
from effzoo.lab.analyses.biases import ByPlace, bias_changes, bias_gradients, mean_of
from effzoo.lab.analyses.seeds import mean, percent
from effzoo.lab.analyses.tuning import body_parameters, tune
from effzoo.lab.draw import LINES, heat, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.fit import logits
from effzoo.lab.texts import DATA, minilm, texts
from effzoo.lab.word_order import word_order

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATE = 5e-3  # five times what the method takes on its own: training is short
GROUPS = {
    "all biases": "bitfit",
    "query and middle": "bitfit[group=strong]",
    "middle": "bitfit[group=intermediate]",
    "query": "bitfit[group=query]",
    "key": "bitfit[group=key]",
    "value": "bitfit[group=value]",
    "none: the head alone": "head",
}
PUBLISHED = {
    "all biases": "GLUE test 80.9 against 81.8 of full fine-tuning (about)",
    "query and middle": "a small loss against all",
    "key": "unchanged by training",
}
ROLES = {
    "attn.q": "query", "attn.k": "key", "attn.v": "value", "attn.o": "attention output", "attn.norm": "attention norm",
    "mlp.up": "middle", "mlp.down": "feed-forward output", "mlp.norm": "feed-forward norm",
}  # fmt: skip
WITHIN = 0.02
LOWER = 3  # layers


@experiment(
    "biases",
    deck=(3, 0, 2, 4),
    source="Ben Zaken et al. 2022, BitFit, arXiv:2106.10199, section 4 and figure 1",
    data=DATA,
)
def biases(run: Run) -> Findings:
    """Which biases matter: how good is each group of them alone, and how far does each move?"""
    length, steps = 10, run.choose(16, 60)
    accuracies: dict[str, dict[str, float]] = {name: {} for name in GROUPS}
    counts: dict[str, int] = {}
    same: dict[str, float] = {}
    moved: dict[str, ByPlace] = {}
    gradients: dict[str, ByPlace] = {}
    for seed in run.seeds:
        key = str(seed)
        data = texts(run, length=length, train=run.choose(300, 1280), test=run.choose(200, 800), seed=seed)
        train, test = word_order(data.train, seed=2 * seed), word_order(data.test, seed=2 * seed + 1)
        model = minilm(2, seed=seed, layers=LOWER)
        said = {}
        for name, spec in GROUPS.items():
            # float32: under bfloat16 AdamW would turn the rounding of gradients that are 0 into steps of full length
            tune(model, spec, train, name="tried", steps=steps, seed=seed, rate=RATE, head_rate=RATE, bfloat16=False)
            counts[name] = body_parameters(model)
            said[name] = logits(model, test).argmax(dim=-1)
            accuracies[name][key] = float((said[name] == test.labels).float().mean())
            if name == "all biases":
                moved[key] = bias_changes(model, "tried")
            peft.detach(model, "tried")
        same[key] = float((said["key"] == said["none: the head alone"]).float().mean())
        gradients[key] = bias_gradients(model.double(), train.batch(slice(0, 8)))
        run.say(
            f"seed {seed}: " + ", ".join(f"{name} {100 * by_seed[key]:.1f}" for name, by_seed in accuracies.items())
        )
    seeds = [str(seed) for seed in run.seeds]

    table = [["trained biases", "spec", "parameters", "accuracy", "published"]]
    for name, spec in GROUPS.items():
        table.append(
            [
                name,
                f"`{spec}`",
                f"{counts[name]:,}",
                percent(list(accuracies[name].values())),
                PUBLISHED.get(name, "no number"),
            ]
        )
    second = [["bias", "mean change", "largest gradient, float64", "published"]]
    for role, name in ROLES.items():
        change = mean(mean_of(moved[s], role) for s in seeds)
        largest = max(max(gradients[s][role].values()) for s in seeds)
        second.append(
            [
                name,
                f"{change:.4f}",
                f"{largest:.1e}",
                {"attn.k": "0", "attn.q": "most, with middle", "mlp.up": "most, with query"}.get(role, ""),
            ]
        )

    means = {s: {role: mean_of(moved[s], role) for role in ROLES} for s in seeds}
    whole, strong, head = (accuracies[name] for name in ("all biases", "query and middle", "none: the head alone"))
    others = [role for role in ROLES if role != "attn.k"]
    weak = [role for role in others if role not in ("attn.q", "mlp.up")]
    settings = {
        "model": f"minilm, its {LOWER} lower layers", "task": "word order", "length": length, "steps": steps,
        "batch": 16, "train texts": len(train), "test texts": len(test), "rate": RATE,
    }  # fmt: skip
    return Findings(
        tables={"accuracy": table, "all biases trained: how far each moves": second},
        figure=_figure(accuracies, counts, moved, seeds),
        claims=[
            Claim.law(
                "the gradient of key biases is 0 (float64: below 1e-10 of the queries')",
                [max(gradients[s]["attn.k"].values()) < 1e-10 * max(gradients[s]["attn.q"].values()) for s in seeds],
            ),
            Claim.law(
                "key biases alone say what the head alone says, on at least 99 % of the texts",
                [same[s] >= 0.99 for s in seeds],
            ),
            Claim.of_differences(
                "of all biases, those of keys move least",
                [min(means[s][role] for role in others) - means[s]["attn.k"] for s in seeds],
            ),
            Claim.of_differences(
                "and those of queries and of the middle of the feed-forward most",
                [min(means[s]["attn.q"], means[s]["mlp.up"]) - max(means[s][role] for role in weak) for s in seeds],
            ),
            Claim.of_differences(
                "these two alone are within 2 points of all biases", [WITHIN - (whole[s] - strong[s]) for s in seeds]
            ),
            Claim.of_differences("all biases are better than the head alone", [whole[s] - head[s] for s in seeds]),
        ],
        values={
            "accuracy": accuracies,
            "parameters": counts,
            "key says what the head alone says": same,
            "change": {s: _by_layer(moved[s]) for s in seeds},
            "largest gradient": {s: _by_layer(gradients[s]) for s in seeds},
        },
        settings=settings,
        notes=[
            "The task is whether the words of a text stand in their order: topics a head alone reads off the frozen "
            "base. Published: BERT base and large on GLUE; change is that of the paper's figure, "
            "||b_0 - b_F||_1 / dim(b), "
            "there on RTE. Trained in float32, because AdamW divides a gradient by its own size: what is 0 but for "
            "rounding would move too. A seed draws the texts to train and to test on, and the head.",
            "Whether query and middle alone lose less than 2 points would be told by several hundred steps, after "
            "which accuracy varies less with the draw.",
        ],
    )


def _by_layer(places: ByPlace) -> dict[str, dict[str, float]]:
    return {role: {str(layer): value for layer, value in values.items()} for role, values in places.items()}


def _figure(
    accuracies: dict[str, dict[str, float]], counts: dict[str, int], moved: dict[str, ByPlace], seeds: Sequence[str]
) -> Figure:
    """Left: the accuracy of each group, a point for each seed and their mean. Right: how far each bias moves, by role
    and layer."""
    figure, (left, right) = panels(2, width=5.2)
    for place, (name, by_seed) in enumerate(accuracies.items()):
        values = [100 * by_seed[s] for s in seeds]
        colour = LINES[1] if name == "key" else "#888888" if not counts[name] else LINES[0]
        left.plot(values, [place] * len(values), marker="o", markersize=4, linestyle="", color=colour, alpha=0.5)
        left.plot([mean(values)], [place], marker="|", markersize=10, markeredgewidth=2.5, color=colour)
        left.text(mean(values), place - 0.42, f"{mean(values):.1f}", ha="center", va="center", fontsize=7, color=colour)
    left.set_yticks(range(len(accuracies)), [f"{name} ({counts[name]:,})" for name in accuracies])
    left.set(xlabel="accuracy, %", ylim=(len(accuracies) - 0.5, -0.8), title="one group trained, with the head")
    layers = sorted(layer for layer in moved[seeds[0]]["attn.q"] if layer is not None)

    def change(role: str, layer: int) -> float:
        return 1000 * mean(moved[s][role][layer] for s in seeds)

    cells = [[change(role, layer) for layer in layers] for role in ROLES]
    heat(right, cells, list(ROLES.values()), [f"{layer}" for layer in layers], form="{:.1f}", vmin=0)
    right.set(xlabel="layer", title="mean change, thousandths")
    return figure
