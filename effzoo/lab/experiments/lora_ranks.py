"""Which matrices to adapt, and at which rank: LoRA on queries, on queries and values, on all four matrices of
attention."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import effzoo
from effzoo.lab.draw import band, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.fit import Examples, fit
from effzoo.lab.score import Score, score
from effzoo.lab.texts import DATA, minilm, texts
from effzoo.lab.word_order import word_order

TARGETS = {"q": ("attn.q",), "q, v": ("attn.q", "attn.v"), "q, k, v, o": ("attn.q", "attn.k", "attn.v", "attn.o")}
PUBLISHED = {  # table 6: WikiSQL (+-0.5) / MNLI (+-0.1), GPT-3 175B
    "q": {1: "68.8 / 90.7", 2: "69.6 / 90.9", 4: "70.5 / 91.1", 8: "70.4 / 90.7", 64: "70.0 / 90.7"},
    "q, v": {1: "73.4 / 91.3", 2: "73.3 / 91.3", 4: "73.7 / 91.3", 8: "73.8 / 91.6", 64: "73.5 / 91.4"},
    "q, k, v, o": {1: "74.1 / 91.2", 2: "73.7 / 91.7", 4: "74.0 / 91.7", 8: "74.0 / 91.5", 64: "73.9 / 91.4"},
}
# alpha is the same for every rank, as in the paper (section 4.1), so that one learning rate fits all
ALPHA, RATE, LAYERS = 8, 1e-2, 3
RANKS = {"q": (1, 4, 64), "q, v": (1, 2, 64), "q, k, v, o": (1,)}
SAME_BUDGET = {"q": 4, "q, v": 2, "q, k, v, o": 1}  # as many numbers in each: the question of table 5
FLAT = 0.02  # of accuracy


@experiment("lora_ranks", deck=(2, 4), source="Hu et al. 2021, LoRA, arXiv:2106.09685, tables 5 and 6", data=DATA)
def lora_ranks(run: Run) -> Findings:
    """How small can the rank of LoRA be, and which matrices of attention should have it?"""
    steps, length = run.choose(20, 80), 20
    scores: dict[str, dict[int, list[Score]]] = {name: {rank: [] for rank in RANKS[name]} for name in TARGETS}
    for seed in run.seeds:
        data = texts(run, length=length, train=run.choose(600, 1300), test=run.choose(200, 800), seed=seed)
        train, test = word_order(data.train, seed=2 * seed), word_order(data.test, seed=2 * seed + 1)
        for name, targets in TARGETS.items():
            for rank in RANKS[name]:
                spec = {"name": "lora", "rank": rank, "alpha": ALPHA, "targets": targets}
                scores[name][rank].append(_trained(spec, train, test, steps, seed))
            run.say(
                f"seed {seed}, {name}: "
                + ", ".join(f"r={rank} {of_rank[-1].accuracy:.3f}" for rank, of_rank in scores[name].items())
            )

    table = [
        [
            "matrices",
            "rank",
            "trained, head left out",
            "accuracy, mean",
            "lowest",
            "highest",
            "test loss",
            "published: WikiSQL / MNLI",
        ]
    ]
    width = 384
    for name, targets in TARGETS.items():
        table += [
            _row(name, r, LAYERS * len(targets) * 2 * width * r, scores[name][r], PUBLISHED[name].get(r, "no number"))
            for r in RANKS[name]
        ]
    spent = [["matrices", "rank", "accuracy, mean", "test loss", "published at 18 M numbers: WikiSQL / MNLI"]]
    given = {"q": "70.4 / 91.0 (r = 8)", "q, v": "73.7 / 91.3 (r = 4)", "q, k, v, o": "73.7 / 91.7 (r = 2)"}
    spent += [
        [n, f"{r}", f"{_mean(scores[n][r], 0):.3f}", f"{_mean(scores[n][r], 1):.3f}", given[n]]
        for n, r in SAME_BUDGET.items()
    ]

    figure, (left, right) = panels(2)
    for place, (axes, label) in enumerate(((left, "accuracy"), (right, "test loss, nats"))):
        for number, (name, by_rank) in enumerate(scores.items()):
            values = [[scores[i][place] for scores in by_rank.values()] for i in range(len(run.seeds))]
            band(axes, list(by_rank), values, name, number)
        axes.set(xlabel="rank", ylabel=label, xscale="log")
        axes.set_xticks((1, 2, 4, 64), ["1", "2", "4", "64"])
        axes.minorticks_off()
    left.set_title("word order, mean and range over seeds")
    right.legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.9))
    q, qv = scores["q"], scores["q, v"]
    settings = {
        "model": f"minilm, {LAYERS} layers", "task": "word order", "data": data.about, "tokens": length,
        "test texts": len(test), "steps": steps, "batch": 16, "alpha": ALPHA, "learning rate": RATE,
    }  # fmt: skip
    seeds = range(len(run.seeds))
    losses = [[scores[name][rank][i].loss for name, rank in SAME_BUDGET.items()] for i in seeds]
    return Findings(
        tables={"rank and matrices": table, "one budget": spent},
        figure=figure,
        claims=[
            Claim.of_differences(
                f"on q and v accuracy is flat in the rank from 1 on (no rank is more than {FLAT} above r = 1)",
                [FLAT - (max(qv[r][i].accuracy for r in qv) - qv[1][i].accuracy) for i in seeds],
            ),
            Claim.of_differences(
                f"on q and v accuracy is flat from 2 on (no rank is more than {FLAT} above r = 2)",
                [FLAT - (max(qv[r][i].accuracy for r in qv if r > 1) - qv[2][i].accuracy) for i in seeds],
            ),
            Claim.of_differences(
                "q alone has a higher loss than q and v, at r = 1 and at r = 64",
                [min(q[r][i].loss - qv[r][i].loss for r in (1, 64)) for i in seeds],
            ),
            Claim.of_differences(
                "as many numbers do more on more matrices of a smaller rank: the loss falls from q to q, v to q, k, "
                "v, o",
                [min(more - less for more, less in pairwise(of_seed)) for of_seed in losses],
            ),
        ],
        values={
            "lora": {
                name: {str(r): _values(scores) for r, scores in by_rank.items()} for name, by_rank in scores.items()
            }
        },
        settings=settings,
        notes=[
            "Task: do the words of a text stand in their order, or shuffled? Topics would not do: a head alone tells "
            "them from MiniLM's sentence vectors, at every rank alike. Published: GPT-3 175B, trained to the end; here "
            "the lower layers of MiniLM, until the accuracy on q and v hardly rises. alpha is one for all ranks, as in "
            "the paper. Claims of several ranks are of the worst one. Seeds draw the texts, their orders and the "
            "weights.",
            "Seeds 0 to 4 could not tell how one budget is best spent; these are others, and judge alone: r = 1 on "
            "four matrices is worst at this rate. Steps until the loss falls no further would tell whether that stays.",
        ],
    )


def _trained(spec: Any, train: Examples, test: Examples, steps: int, seed: int) -> Score:
    model = effzoo.attach(minilm(2, seed=seed, layers=LAYERS), spec)
    fit(model, train.stream(16, seed), steps, learning_rate=RATE)
    return score(model, test)


def _row(name: str, rank: int, trained: int, scores: list[Score], published: str) -> list[str]:
    right = [score.accuracy for score in scores]
    shown = [f"{_mean(scores, 0):.3f}", f"{min(right):.3f}", f"{max(right):.3f}", f"{_mean(scores, 1):.3f}"]
    return [name, f"{rank}" if rank else "", f"{trained:,}", *shown, published]


def _mean(scores: list[Score], place: int) -> float:
    return sum(score[place] for score in scores) / len(scores)


def _values(scores: list[Score]) -> list[dict[str, float]]:
    return [{"accuracy": score.accuracy, "loss": score.loss} for score in scores]
