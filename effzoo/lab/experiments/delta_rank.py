"""LoRA learns less and forgets less: the rank of what full fine-tuning changes, and what either costs in what the model
knew before."""

from __future__ import annotations

from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import effzoo
from effzoo import peft
from effzoo.architectures import Transformer
from effzoo.lab.analyses.subspaces import intruder_dimensions, rank_for_variance
from effzoo.lab.draw import LINES, band, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.fit import Examples, fit
from effzoo.lab.score import score
from effzoo.lab.texts import DATA, minilm, texts
from effzoo.lab.word_order import word_order

ALL = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
WAYS: dict[str, tuple[Any, float]] = {  # spec and learning rate
    "full": (None, 1e-4),
    "LoRA r = 16, all matrices": ({"name": "lora", "rank": 16, "targets": ALL}, 1e-3),
    "LoRA r = 4, q and v": ({"name": "lora", "rank": 4, "targets": ("attn.q", "attn.v")}, 3e-3),
}
SHARE, RIDGE, LAYERS = 0.9, 10.0, 2


@experiment(
    "delta_rank",
    deck=(2, 3),
    source="Biderman et al. 2024, LoRA learns less and forgets less, arXiv:2405.09673",
    data=DATA,
)
def delta_rank(run: Run) -> Findings:
    """Of what rank is the change that full fine-tuning makes, and does LoRA learn less and forget less?"""
    steps, length = run.choose(36, 200), 16
    marks = [round(steps * part) for part in (0.2, 0.5, 1)]
    start = minilm(2, layers=LAYERS)
    base = {key: value.double() for key, value in start.state_dict().items()}
    paths: dict[str, dict[int, list[tuple[float, float]]]] = {name: {} for name in WAYS}  # (learned, kept) at the marks
    changes: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in WAYS}
    before: dict[int, float] = {}
    for seed in run.seeds:
        topics = texts(run, length=length, train=run.choose(500, 1300), test=run.choose(200, 800), seed=seed)
        train, test = word_order(topics.train, seed=2 * seed), word_order(topics.test, seed=2 * seed + 1)
        probe = _probe(_features(start, topics.train), topics.train.labels, len(topics.names))
        before[seed] = _right(start, topics.test, probe)
        look = partial(_look, marks=marks, test=test, topics=topics.test, probe=probe)
        for name, (spec, rate) in WAYS.items():
            model = minilm(2, seed=seed, layers=LAYERS)
            if spec is not None:
                effzoo.attach(model, spec)
            seen: list[tuple[float, float]] = []
            after = partial(look, model=model, seen=seen)
            fit(model, train.stream(16, seed), steps, learning_rate=rate, after=after)
            paths[name][seed], changes[name][seed] = seen, _changes(model, base, spec is not None)
            run.say(
                f"seed {seed}, {name}: word order {seen[-1][0]:.3f}, topics {before[seed]:.3f} -> {seen[-1][1]:.3f}"
            )

    of_base = {key: rank_for_variance(base[key], SHARE) for key in changes["full"][run.seeds[0]]}
    ranks = {name: {seed: _ranks(of_seed) for seed, of_seed in by_seed.items()} for name, by_seed in changes.items()}
    after_ranks, intruders = _afterwards(base, changes, run.seeds[0])
    rank_table = [["matrix", "full rank", "W", *(f"dW, {name}" for name in WAYS), "W + dW, full", "published"]]
    for role in ALL:
        keys = [key for key in of_base if key.endswith(f"{role}.weight")]
        shown = []
        for name in WAYS:
            counts = [of_seed[key] for of_seed in ranks[name].values() for key in keys if key in of_seed]
            shown.append(f"{mean(counts):.0f}" if counts else "not changed")
        published = f"dW, full: about {'1000-2000' if role.startswith('attn') else '2000-2800'} of 4096"
        both = [f"{mean(counted[key] for key in keys):.0f}" for counted in (of_base, after_ranks)]
        rank_table.append([role, f"{min(base[keys[0]].shape)}", both[0], *shown, both[1], published])
    table = [["trained", "learned: word order", "kept: topics", "topics before", "intruders, per matrix", "published"]]
    for name, by_seed in paths.items():
        learned, kept = (mean(seen[-1][i] for seen in by_seed.values()) for i in range(2))
        said = "full learns and forgets more than LoRA" if name == "full" else "no number"
        table.append(
            [
                name,
                f"{learned:.3f}",
                f"{kept:.3f}",
                f"{mean(before.values()):.3f}",
                f"{mean(intruders[name].values()):.2f}",
                said,
            ]
        )

    figure, (left, middle, right) = panels(3, width=4.4)
    _draw_spectra(left, base, {name: by_seed[run.seeds[0]] for name, by_seed in changes.items()})
    for place, (axes, title) in enumerate(((middle, "learned: word order"), (right, "kept: topics"))):
        for number, (name, by_seed) in enumerate(paths.items()):
            band(axes, marks, [[seen[place] for seen in of_seed] for of_seed in by_seed.values()], name, number)
        axes.set(xlabel="steps", ylabel="accuracy", title=title)
        axes.set_xticks(marks)
    right.axhline(mean(before.values()), color="#888888", linewidth=1, linestyle=":", label="before training")
    right.legend(frameon=False, fontsize=8)
    last = {name: {seed: seen[-1] for seed, seen in by_seed.items()} for name, by_seed in paths.items()}
    loras = [name for name in WAYS if name != "full"]
    settings = {
        "model": f"minilm, {LAYERS} layers", "data": topics.about, "tokens": length, "steps": steps, "batch": 16,
        "texts": len(topics.train), "test texts": len(topics.test),
        "learning rates": {name: rate for name, (_, rate) in WAYS.items()},
    }  # fmt: skip
    return Findings(
        tables={"learning and forgetting": table, f"singular values for {SHARE:.0%} of the squares": rank_table},
        figure=figure,
        claims=[
            Claim.of_differences(
                "LoRA learns less: full fine-tuning is best in the new task",
                [min(last["full"][s][0] - last[name][s][0] for name in loras) for s in run.seeds],
            ),
            Claim.of_differences(
                "LoRA forgets less: full fine-tuning keeps least of the old task",
                [min(last[name][s][1] - last["full"][s][1] for name in loras) for s in run.seeds],
            ),
            Claim.of_differences(
                "the change of full fine-tuning has more than 10 times the rank of LoRA r = 4, in the mean over q "
                "and v",
                [_mean_rank(ranks["full"][s]) - 10 * _mean_rank(ranks[loras[1]][s]) for s in run.seeds],
            ),
            Claim.of_differences(
                "the change of full fine-tuning is of high rank: more than half of what W needs, in the mean over q "
                "and v",
                [_mean_rank(ranks["full"][s]) - 0.5 * _mean_rank(of_base) for s in run.seeds],
            ),
        ],
        values={
            "learned and kept": {
                name: {str(s): seen for s, seen in by_seed.items()} for name, by_seed in paths.items()
            },
            "topics before": {str(seed): accuracy for seed, accuracy in before.items()},
            "rank of W": of_base,
            "rank of W + dW, full": after_ranks,
            "intruders": intruders,
            "rank of dW": {
                name: {str(s): of_seed for s, of_seed in by_seed.items()} for name, by_seed in ranks.items()
            },
        },
        settings=settings,
        notes=[
            "New task: are the words of a text in their order, or shuffled. Old task: its topic, from the mean of the "
            "last hidden states by a linear map that is fitted before training. Published: Llama-2-7B on code and "
            "mathematics, forgetting measured on HellaSwag, ARC-challenge and WinoGrande. Intruders (Shuttleworth et "
            "al. 2024, arXiv:2410.21228): of the first 10 left singular vectors of W + dW those with no cosine of 0.5 "
            "or more to one of W, of the first seed. Learning rates matter: with three times as high ones full "
            "fine-tuning and LoRA r = 16 both lost the topics altogether (two seeds: 0.23 to 0.26, 0.20 to 0.22)."
            " Here full fine-tuning learns less than LoRA, and its change needs few directions, after 200 steps from a "
            "good start at one rate. Some thousand steps, at a rate chosen for each method on held-out texts, would "
            "settle both."
        ],
    )


def _look(
    step: int,
    _: float,
    *,
    marks: list[int],
    test: Examples,
    topics: Examples,
    probe: Tensor,
    model: Transformer,
    seen: list[tuple[float, float]],
) -> None:
    """Note at the marked steps what the model has learned and kept."""
    if step in marks:
        seen.append((score(model, test).accuracy, _right(model, topics, probe)))


@torch.no_grad()
def _features(model: Transformer, examples: Examples) -> Tensor:
    """The mean of the last hidden states of each text, with a 1 beside it, float64."""
    mode, means = model.training, []
    model.eval()
    for batch in examples.batches(64):
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state.double()
        kept = batch["attention_mask"].double()
        means.append((hidden * kept[..., None]).sum(dim=1) / kept.sum(dim=1, keepdim=True))
    model.train(mode)
    return F.pad(torch.cat(means), (0, 1), value=1.0)


def _probe(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Ridge regression to the labels as unit vectors, [dim + 1, classes]."""
    gram = features.T @ features + RIDGE * torch.eye(features.shape[1], dtype=torch.float64)
    return torch.linalg.solve(gram, features.T @ F.one_hot(labels, classes).double())


def _right(model: Transformer, examples: Examples, probe: Tensor) -> float:
    return float(((_features(model, examples) @ probe).argmax(dim=-1) == examples.labels).double().mean())


def _changes(model: Transformer, base: dict[str, Tensor], adapted: bool) -> dict[str, Tensor]:
    """What training has added to each matrix of attention and feed-forward, by its key, float64."""
    wanted = tuple(f"{role}.weight" for role in ALL)
    now = (
        peft.delta(model)
        if adapted
        else {key: value.double() - base[key] for key, value in model.state_dict().items() if key in base}
    )
    return {key: change for key, change in now.items() if key.endswith(wanted)}


def _afterwards(
    base: dict[str, Tensor], changes: dict[str, dict[int, dict[str, Tensor]]], seed: int
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """The ranks of W + dW after full fine-tuning, and the intruders of q and v of every way."""
    ranks = {key: rank_for_variance(base[key] + change, SHARE) for key, change in changes["full"][seed].items()}
    of_q_and_v = ("attn.q.weight", "attn.v.weight")
    return ranks, {
        name: {
            key: intruder_dimensions(base[key], base[key] + change)
            for key, change in by_seed[seed].items()
            if key.endswith(of_q_and_v)
        }
        for name, by_seed in changes.items()
    }


def _draw_spectra(axes: Any, base: dict[str, Tensor], changes: dict[str, dict[str, Tensor]]) -> None:
    """Share of the squares that the first singular values hold, of the query matrix of the last layer."""
    key = max(key for key in changes["full"] if key.endswith("attn.q.weight"))
    for number, (name, matrix) in enumerate(
        [("W", base[key]), *((name, of_matrix[key]) for name, of_matrix in changes.items())]
    ):
        energy = torch.linalg.svdvals(matrix).square()
        share = (energy.cumsum(dim=0) / energy.sum()).tolist()
        axes.plot(
            range(1, len(share) + 1),
            share,
            label=name,
            linewidth=1.6,
            color="#000000" if name == "W" else LINES[number - 1],
        )
    axes.axhline(SHARE, color="#888888", linewidth=1, linestyle=":")
    title = f"W and its change, {key.removesuffix('.weight')}"
    axes.set(xlabel="singular values", ylabel="share of the sum of squares", xscale="log", ylim=(0, 1.02), title=title)
    axes.legend(frameon=False, fontsize=7.5, loc="lower right")


def _ranks(matrices: dict[str, Tensor]) -> dict[str, int]:
    return {key: rank_for_variance(matrix, SHARE) for key, matrix in matrices.items()}


def _mean_rank(counts: dict[str, int]) -> float:
    return mean(count for key, count in counts.items() if key.endswith(("attn.q.weight", "attn.v.weight")))
