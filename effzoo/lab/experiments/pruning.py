"""Magnitude against movement pruning while a network is fine-tuned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effzoo import peft
from effzoo.lab.analyses.lenet import LeNet
from effzoo.lab.analyses.pruning import kept_by_size, pruned_weights
from effzoo.lab.analyses.seeds import judged, percent
from effzoo.lab.analyses.supermasks import task
from effzoo.lab.analyses.tuning import fast_accuracy, tune
from effzoo.lab.draw import band, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.fit import accuracy, fit
from effzoo.lab.images import images
from effzoo.lab.texts import DATA, minilm, texts

RATE, HEAD_RATE = 2e-4, 5e-3
SMALL_RATE = 1.2e-3
METHODS = ("magnitude", "movement")
PARTS = 10
LOW = 0.15  # the share below which the paper sees movement ahead
Scores = dict[str, dict[float, dict[str, float]]]  # method, share that is kept, seed


@experiment(
    "pruning",
    deck=(3, 0),
    source="Sanh, Wolf & Rush 2020, Movement pruning, arXiv:2005.07683, figures 2 and 3",
    data=DATA,
)
def pruning(run: Run) -> Findings:
    """Which weights should a fine-tuned network keep: the large ones, or those that training moves away from zero?"""
    length, steps, tests = run.choose((24, 24, 200), (128, 1500, 1000))
    keeps = run.choose((0.9, 0.5), (0.9, 0.5, 0.3, 0.15, 0.1, 0.05, 0.03))
    layers = run.choose((-3, -2, -1), (-6, -5, -4, -3, -2, -1))
    small_keeps, small_steps = (0.5, 0.2, 0.1, 0.05, 0.02), run.choose(400, 4000)
    data, digits = texts(run, length=length, train=run.choose(384, 1100), test=tests), images(Run())
    big: Scores = {method: {keep: {} for keep in keeps} for method in METHODS}
    small: Scores = {method: {keep: {} for keep in small_keeps} for method in METHODS}
    by_size: dict[str, dict[str, list[float]]] = {method: {} for method in METHODS}
    dense: dict[str, dict[str, float]] = {"before": {}, "minilm": {}, "digits": {}}
    before, after = [(task(name, digits.train), task(name, digits.test)) for name in ("digit", "upside down")]
    height, width = digits.size
    for seed in run.seeds:
        key = str(seed)
        model, network = minilm(len(data.names), seed=seed), LeNet(height * width, seed=seed)
        of_texts: dict[str, Any] = {"steps": steps, "seed": seed, "rate": RATE, "head_rate": HEAD_RATE}
        of_digits: dict[str, Any] = {"steps": small_steps, "batch": 60, "seed": seed, "rate": SMALL_RATE}
        tune(model, "full[targets=(attn.*,mlp.*)]", data.train, name="tried", **of_texts)
        dense["minilm"][key] = fast_accuracy(model, data.test)
        peft.detach(model, "tried")
        fit(
            network, before[0].stream(60, seed), small_steps, learning_rate=SMALL_RATE, weight_decay=0.0, bfloat16=False
        )
        dense["before"][key] = accuracy(network, after[1], 1024)
        tune(network, "full[targets=fc.*]", after[0], name="tried", bfloat16=False, **of_digits)
        dense["digits"][key] = accuracy(network, after[1], 1024)
        peft.detach(network, "tried")
        for method in METHODS:
            for keep in keeps:
                spec = f"{method}[keep={keep},layers={layers}]"
                tune(model, spec, data.train, name="tried", **of_texts)
                big[method][keep][key] = fast_accuracy(model, data.test)
                peft.detach(model, "tried")
            for keep in small_keeps:
                spec = f"{method}[keep={keep},targets=fc.*]"
                tune(network, spec, after[0], name="tried", bfloat16=False, **of_digits)
                small[method][keep][key] = accuracy(network, after[1], 1024)
                if keep == small_keeps[2]:
                    by_size[method][key] = kept_by_size(*pruned_weights(network), PARTS)
                peft.detach(network, "tried")
        run.say(
            f"seed {seed}: "
            + ", ".join(f"{m} {100 * keep:.0f} % {100 * by[key]:.1f}" for m in METHODS for keep, by in big[m].items())
        )
        run.say(
            "        digits: "
            + ", ".join(f"{m} {100 * keep:.0f} % {100 * by[key]:.1f}" for m in METHODS for keep, by in small[m].items())
        )
    seeds = [str(seed) for seed in run.seeds]

    figure, (first, second, third) = panels(3, width=4.2)
    for axes, scores, whole, title in (
        (first, big, dense["minilm"], "MiniLM on texts"),
        (second, small, dense["digits"], "small network, digits turned over"),
    ):
        for number, method in enumerate(METHODS):
            x = list(scores[method])
            band(
                axes,
                [100 * keep for keep in x],
                [[100 * scores[method][keep][s] for keep in x] for s in seeds],
                method,
                number,
            )
        axes.axhline(
            100 * sum(whole.values()) / len(whole),
            color="#888888",
            linewidth=0.9,
            linestyle=":",
            label="nothing pruned",
        )
        axes.set(xscale="log", xlabel="weights kept, %", title=title)
        ticks = [100 * keep for keep in scores[METHODS[0]]]
        axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
        axes.minorticks_off()
        axes.invert_xaxis()
        axes.legend(frameon=False, fontsize=8, loc="lower left")
    first.set_ylabel("accuracy, %")
    for number, method in enumerate(METHODS):
        band(
            third,
            [100 * (i + 0.5) / PARTS for i in range(PARTS)],
            [[100 * x for x in by_size[method][s]] for s in seeds],
            method,
            number,
        )
    third.axhline(100 * small_keeps[2], color="#888888", linewidth=0.9, linestyle=":", label="the same of every size")
    third.set(
        xlabel="rank of |w| before fine-tuning, % (100: largest)",
        ylabel="of these kept, %",
        title=f"which {100 * small_keeps[2]:.0f} % are kept",
    )
    third.legend(frameon=False, fontsize=8, loc="upper left")

    def of_few(method: str, s: str) -> float:
        return sum(small[method][keep][s] for keep in small_keeps[2:])

    claims = [
        Claim(
            "MiniLM: with half of the weights kept, magnitude is better",
            judged(seeds, lambda s: big["magnitude"][0.5][s] > big["movement"][0.5][s]),
        ),
        Claim(
            "small network: with half kept, magnitude is at least as good",
            judged(seeds, lambda s: small["magnitude"][0.5][s] >= small["movement"][0.5][s]),
        ),
        Claim(
            "small network: with 10 % kept, movement is better",
            judged(seeds, lambda s: small["movement"][small_keeps[2]][s] > small["magnitude"][small_keeps[2]][s]),
        ),
        Claim(
            "small network: with 10 % and fewer kept, movement is better in the mean",
            judged(seeds, lambda s: of_few("movement", s) > of_few("magnitude", s)),
        ),
        Claim(
            "movement keeps fewer of the largest weights than magnitude",
            judged(seeds, lambda s: by_size["movement"][s][-1] < by_size["magnitude"][s][-1]),
        ),
    ]
    if keeps[-1] <= LOW:  # the paper's claim is about few weights
        fewest = keeps[-1]
        claims.insert(
            1,
            Claim(
                f"MiniLM: with {100 * fewest:.0f} % kept, movement is better",
                judged(seeds, lambda s: big["movement"][fewest][s] > big["magnitude"][fewest][s]),
            ),
        )
    settings = {
        "model": "minilm", "pruned layers": f"{-min(layers)} last", "length": length, "steps": steps, "batch": 16,
        "test texts": len(data.test), "small network": "LeNet-300-100 without biases, digits, then digits upside down",
        "its steps": small_steps,
    }  # fmt: skip
    return Findings(
        tables={"MiniLM": _table(big, dense["minilm"], seeds), "small network": _table(small, dense["digits"], seeds)},
        figure=figure,
        claims=claims,
        values={
            "minilm": _plain(big),
            "digits": _plain(small),
            "nothing pruned": dense,
            "kept by size, tenths from the smallest": by_size,
        },
        settings=settings,
        notes=[
            "Published: BERT base on SQuAD, MNLI and QQP, every layer pruned over 6 to 12 epochs; movement is better "
            "from about 15 % downwards. In some dozens of steps scores have seen little, so on MiniLM the few steps "
            "decide, not the method; the small network is trained as long as it was before. Shares are of the pruned "
            "matrices; where all is kept, all layers are trained. A seed draws head or weights, and the order of the "
            "examples."
        ],
    )


def _table(scores: Scores, dense: dict[str, float], seeds: Sequence[str]) -> list[list[str]]:
    table = [["kept", *METHODS, "published"], ["all", *[percent([dense[s] for s in seeds])] * 2, ""]]
    for keep in scores[METHODS[0]]:
        expected = "magnitude better" if keep > LOW else "movement better (about)"
        table.append(
            [
                f"{100 * keep:.0f} %",
                *(percent([scores[method][keep][s] for s in seeds]) for method in METHODS),
                expected,
            ]
        )
    return table


def _plain(scores: Scores) -> dict[str, dict[str, dict[str, float]]]:
    return {method: {f"{keep}": by_seed for keep, by_seed in by.items()} for method, by in scores.items()}
