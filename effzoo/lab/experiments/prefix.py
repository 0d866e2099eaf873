"""Prefix tuning: how long, from what start, with or without the network, and how much of its attention each head gives
to the prefix."""

from __future__ import annotations

import torch
from torch import Tensor

from effzoo import peft
from effzoo.lab.analyses.prefix_gate import prefix_gates
from effzoo.lab.analyses.tuning import body_parameters, fast_accuracy, tune
from effzoo.lab.draw import LINES, MARKERS, band, heat, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.texts import DATA, minilm, texts
from effzoo.lab.word_order import word_order

LENGTHS = (1, 8, 32)
LAYERS = 3  # of MiniLM, the lower ones
MIDDLE = 8  # the length at which starts and forms are compared
START, FORM = f"prefix[length={MIDDLE}, init=normal]", f"prefix[length={MIDDLE}, form=mlp]"
PUBLISHED = {
    1: "short: worse (figure 4)", 8: "rises up to a threshold (10 to 200)", 32: "no number",
    START: "random: worse, varies more (figure 5)", FORM: "better, more stable than direct",
}  # fmt: skip


@experiment(
    "prefix", deck=1, data=DATA,
    source="Li & Liang 2021, arXiv:2101.00190, sections 4.3 and 7; He et al. 2022, arXiv:2110.04366, equation 5",
)  # fmt: skip
def prefix(run: Run) -> Findings:
    """What do a prefix's length, start and reparametrisation change, and what share of attention does it take?"""
    length, steps, batch, looked = 16, run.choose(30, 80), 16, 64
    specs: dict[int | str, str] = {size: f"prefix[length={size}]" for size in LENGTHS} | {START: START, FORM: FORM}
    accuracy: dict[int | str, list[float]] = {key: [] for key in specs}
    gates: dict[int | str, list[Tensor]] = {key: [] for key in specs}
    spread: dict[int | str, list[float]] = {key: [] for key in specs}
    trained: dict[int | str, float] = {}
    for seed in run.seeds:
        data = texts(run, length=length, train=run.choose(480, 1300), test=run.choose(200, 800), seed=seed)
        train, test = word_order(data.train, seed=2 * seed), word_order(data.test, seed=2 * seed + 1)
        model = minilm(2, seed=seed, layers=LAYERS)
        for key, spec in specs.items():
            torch.manual_seed(seed)
            peft.attach(model, spec, name="counted")
            trained[key] = 100 * body_parameters(model) / peft.account(model).total
            peft.detach(model, "counted")
            torch.manual_seed(seed)
            tune(model, spec, train, name="task", steps=steps, batch=batch, seed=seed)
            accuracy[key].append(100 * fast_accuracy(model, test))
            inputs = {name: x[:looked] for name, x in test.inputs.items()}
            by_layer = torch.stack(prefix_gates(model, **inputs))  # [layers, texts, heads, tokens]
            # [layers, tokens of all texts, heads]
            tokens = by_layer.transpose(2, 3)[:, inputs["attention_mask"].bool()]
            gates[key].append(tokens.mean(dim=1))
            spread[key].append(float(tokens.std(dim=1).mean()))
            peft.detach(model, "task")
            run.say(f"seed {seed}: {spec} {accuracy[key][-1]:.1f} %, gate {float(gates[key][-1].mean()):.3f}")

    share = {key: [float(gate.mean()) for gate in by_seed] for key, by_seed in gates.items()}
    figure, (left, middle, right) = panels(3, width=4.2)
    for axes, values, label in ((left, accuracy, "from activations"), (middle, share, "from activations")):
        band(
            axes,
            LENGTHS,
            [list(of_seed) for of_seed in zip(*(values[size] for size in LENGTHS), strict=True)],
            label,
            0,
        )
        for number, (key, name) in enumerate(((START, "normal start"), (FORM, "through the MLP")), start=1):
            place = MIDDLE * (0.86, 1.16)[number - 1]  # side by side
            low, mean, high = min(values[key]), sum(values[key]) / len(values[key]), max(values[key])
            axes.errorbar(
                [place], [mean], [[mean - low], [high - mean]], label=name, color=LINES[number], marker=MARKERS[number],
                markersize=6, capsize=3, linestyle="",
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(LENGTHS, [f"{size}" for size in LENGTHS])
        axes.set_xlabel("length of the prefix")
    left.set(ylabel="accuracy, %", title="mean and range over seeds")
    left.legend(frameon=False, fontsize=8)
    middle.set(
        ylabel=r"$\lambda(x)$, mean over tokens and heads", title="attention that falls on the prefix", ylim=(0, None)
    )
    by_head = torch.stack(gates[MIDDLE]).mean(dim=0)
    layers, heads = by_head.shape
    heat(
        right,
        by_head.tolist(),
        [f"{i}" for i in range(layers)],
        [f"{i}" for i in range(heads)],
        form="{:.2f}",
        vmin=0,
        vmax=1,
    )
    for text in right.texts:
        text.set_fontsize(6.5)
    right.set(xlabel="head", ylabel="layer", title=rf"$\lambda$ by head, length {MIDDLE}")

    table = [["prefix", "trained", "accuracy", "lowest to highest", "gate, mean", "gate, std over tokens", "published"]]
    for key, spec in specs.items():
        percents = accuracy[key]
        table.append(
            [f"`{spec}`", f"{trained[key]:.2f} %", f"{sum(percents) / len(percents):.1f} %",
            f"{min(percents):.1f} to {max(percents):.1f}",
             f"{sum(share[key]) / len(percents):.3f}", f"{sum(spread[key]) / len(percents):.3f}", PUBLISHED[key]]
        )  # fmt: skip
    settings = {
        "model": f"minilm, {LAYERS} layers", "task": "word order", "data": data.about, "tokens": length,
        "texts": len(train), "test texts": len(test),
        "texts for the gate": looked, "steps": steps, "batch": batch,
    }  # fmt: skip
    return Findings(
        tables={"Prefixes": table},
        figure=figure,
        claims=[
            Claim.of_differences(f"a prefix of {MIDDLE} is better than one of 1", _less(accuracy[MIDDLE], accuracy[1])),
            Claim.of_differences(
                "keys and values of real tokens are a better start than a normal distribution",
                _less(accuracy[MIDDLE], accuracy[START]),
            ),
            Claim.of_differences(
                "the MLP reparametrisation is better than training keys and values themselves",
                _less(accuracy[FORM], accuracy[MIDDLE]),
            ),
            Claim.of_differences(
                "the longer the prefix, the larger its share of attention",
                [min(b - a, c - b) for a, b, c in zip(*(share[size] for size in LENGTHS), strict=True)],
            ),
            Claim.of_differences(
                "the gate depends on the token (its standard deviation over tokens is above 0.01)",
                [deviation - 0.01 for deviation in spread[MIDDLE]],
            ),
        ],
        values={
            "accuracy": {specs[key]: percents for key, percents in accuracy.items()},
            "trained percent": {specs[key]: percents for key, percents in trained.items()},
            "gate": {
                specs[key]: {str(seed): gate.tolist() for seed, gate in zip(run.seeds, by_seed, strict=True)}
                for key, by_seed in gates.items()
            },
            "gate spread": {specs[key]: deviations for key, deviations in spread.items()},
        },
        settings=settings,
        notes=[
            "Published: GPT-2 and BART on table-to-text and summarisation, in figures and sentences without a number "
            "for a length of ours. The trained share of the MLP is that during training; afterwards keys and values "
            "alone are stored. The method offers no start from the vocabulary: activations are what the layer makes of "
            "real tokens, as the paper's real words are. Task: do the words of a text stand in their order, or "
            "shuffled? A head alone would tell topics apart. Seeds draw the texts, their orders and the weights.",
            "Neither seeds 0 to 4 nor these, which judge alone, tell a prefix of 8 from one of 1 (both means are 1.2 "
            "points): texts that a few directions cannot answer, or forty seeds, would.",
        ],
    )


def _less(a: list[float], b: list[float]) -> list[float]:
    """Of each pair, a - b."""
    return [x - y for x, y in zip(a, b, strict=True)]
