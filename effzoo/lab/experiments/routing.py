"""Routing: whether a router collapses without balance, and at which level it should choose."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import effzoo
from effzoo.architectures import Transformer
from effzoo.lab.draw import LINES, panels
from effzoo.lab.experiment import Claim, Findings, Run, Table, experiment
from effzoo.lab.fit import Batch, fit
from effzoo.routing import Watch, watch
from effzoo.tasks import domains

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SYMBOLS, DOMAINS, LENGTH, BATCH, EXPERTS, RATE = 16, 8, 15, 32, 8, 3e-2
BALANCE = {  # feed-forwards as experts
    "switch, no loss": "switch[balance=0, capacity=8]",
    "switch, balance 0.1": "switch[balance=0.1, capacity=8]",
    "switch, balance and capacity": "switch[balance=0.1]",
    "top 2, no loss": "top_k[k=2, importance=0, load=0]",
    "top 2, importance and load": "top_k[k=2]",
    "expert choice": "expert_choice[capacity=1]",
    "BASE": "base",
}
LEVELS = {  # adapters as experts
    "one adapter": "pfeiffer[bottleneck=64]",
    "mean of experts": "router=uniform",
    "by token, soft": "router=soft",
    "by token, top 1": "router='switch[balance=0.1, capacity=8]'",
    "by example, soft": "router=soft, level=example",
    "by example, top 1": "router='switch[balance=0.1, capacity=8]', level=example",
    "by task, skills": "router='skills[tasks=8]'",
    "by task, fixed": "router=fixed",
}
COLLAPSING = {
    "switch": ("switch, no loss", "switch, balance 0.1"),
    "top 2": ("top 2, no loss", "top 2, importance and load"),
}


@experiment(
    "routing", deck=3,
    source="Shazeer et al. 2017, arXiv:1701.06538, section 4; Fedus et al. 2021, "
    "arXiv:2101.03961, section 2.2; Ponti et al. 2022",
)  # fmt: skip
def routing(run: Run) -> Findings:
    """Does a router collapse without a balancing loss, and should it choose for a token, an example or a task?"""
    steps, depth = run.choose(60, 100), 2
    series: dict[str, list[Watch]] = {name: [] for name in BALANCE}
    right: dict[str, list[float]] = {name: [] for name in (*BALANCE, *LEVELS)}
    for seed in run.seeds:
        for name, router in BALANCE.items():
            torch.manual_seed(seed)
            model = _model(depth, experts=EXPERTS, router=router, mlp=32)
            with watch(model) as watched:
                fit(model, _stream(seed), steps, learning_rate=RATE, bfloat16=False)
            series[name].append(watched)
            right[name].append(_accuracy(model, seed))
        torch.manual_seed(seed)
        base = _model(depth, mlp=64)
        fit(base, _stream(seed, variant=1), 2 * steps, learning_rate=3e-3, bfloat16=False)
        for name, spec in LEVELS.items():
            torch.manual_seed(seed)
            model = _model(depth, mlp=64)
            model.load_state_dict(base.state_dict())
            whole = (
                spec
                if spec.startswith("pfeiffer")
                else (f"routed[of='pfeiffer[bottleneck=8]', experts={DOMAINS}, {spec}]")
            )
            effzoo.attach(model, whole)
            fit(model, _stream(seed + 1000), steps + steps // 4, learning_rate=5e-3, bfloat16=False)
            right[name].append(_accuracy(model, seed))
        run.say(f"seed {seed}: " + ", ".join(f"{name} {values[-1]:.2f}" for name, values in right.items()))

    used = {name: [_late(watched, "entropy") for watched in watches] for name, watches in series.items()}
    idle = {name: [_late(watched, "unused") for watched in watches] for name, watches in series.items()}
    dropped = {name: [_late(watched, "dropped") for watched in watches] for name, watches in series.items()}
    first: Table = [["feed-forwards as experts", "entropy of use", "unused of 8", "dropped", "accuracy", "published"]]
    for name in BALANCE:
        numbers = (
            f"{mean(used[name]):.2f}",
            f"{mean(idle[name]):.1f}",
            f"{100 * mean(dropped[name]):.1f} %",
            f"{100 * mean(right[name]):.1f} %",
        )
        first.append([name, *numbers, "collapse" if "no loss" in name else "balanced"])
    second: Table = [["adapters as experts", "accuracy", *(f"seed {seed}" for seed in run.seeds), "published"]]
    second += [
        [name, f"{100 * mean(right[name]):.1f} %", *(f"{100 * x:.1f}" for x in right[name]), "no number"]
        for name in LEVELS
    ]
    claims = [
        Claim.of_differences(
            f"at a learning rate of {RATE} and without a loss the use of experts is less even than with one ({kind})",
            [b - a for a, b in zip(used[no], used[yes], strict=True)],
        )
        for kind, (no, yes) in COLLAPSING.items()
    ]
    claims += [
        Claim.of_differences(
            "there at least one of eight experts is as good as unused without a loss (switch)",
            [x - 1 for x in idle["switch, no loss"]],
        ),
        Claim.of_differences(
            "with the loss no expert is unused (switch; less than one in the mean)",
            [1 - x for x in idle["switch, balance 0.1"]],
        ),
        _better(
            right, "by task, fixed", "one adapter",
            "experts chosen by the task do better than one adapter of their size together",
        ),
        _better(
            right, "by example, top 1", "by token, top 1",
            "where an example is of one domain, choosing by example does better than by token (balanced top 1)",
        ),
        _better(
            right, "by task, skills", "mean of experts", "the table of skills does better than the mean of the experts"
        ),
    ]  # fmt: skip
    settings = {
        "domains": DOMAINS, "symbols": SYMBOLS, "length": LENGTH, "batch": BATCH, "steps": steps, "layers": depth,
        "dim": 64, "experts": EXPERTS,
    }  # fmt: skip
    return Findings(
        tables={"balance: the last quarter of the training": first, "level": second},
        figure=_figure(used, right),
        claims=claims,
        values={
            "accuracy": {name: dict(zip(map(str, run.seeds), values, strict=True)) for name, values in right.items()},
            "entropy": {name: [_rounded(_curve(watched, "entropy")) for watched in of] for name, of in series.items()},
            "unused": idle,
            "dropped": dropped,
        },
        settings=settings,
        notes=[
            "Feed-forwards are trained at a learning rate of 0.03: at 0.01 and below all routers stay even here, "
            "with a loss or without. So collapse is seen where the training is barely stable, and that it is the rule "
            "without a loss is not shown: with the loss of Switch some seeds are uneven too. Some thousand "
            "steps at a rate at which both are stable would settle it.",
            "Choosing by example or by token is compared for one expert each with a balancing loss, as the lecture "
            "does; a soft gate by token sees all that a gate by example sees.",
            "Every sequence begins with a mark of its domain, and each domain maps symbols to labels by a permutation "
            "of its own; chance is 1 in 16. Entropy of use is 1 where all experts carry the same and 0 where one "
            "carries all, in the mean over layers; unused: less than a tenth of an equal share. Adapters are trained "
            "on a base that knows other permutations; eight adapters of 8 units are as large as the one of 64.",
            "Seeds 5 to 14 had not told whether experts stay unused with the loss, and whether examples or tokens "
            "choose better; these are others, and judge alone.",
        ],
    )


def _model(depth: int, **options: Any) -> Transformer:
    model: Transformer = effzoo.build(
        "bert", task="token_classification", num_labels=SYMBOLS, layers=depth, dim=64, heads=4,
        vocab=1 + DOMAINS + SYMBOLS, max_length=LENGTH + 1,
        dropout=0.0, attention_dropout=0.0, norm="pre", types=0, **options,
    )  # fmt: skip
    return model


def _stream(seed: int, variant: int = 0) -> Iterator[Batch]:
    """Batches without end."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        ids, labels, domain = domains(BATCH, LENGTH, SYMBOLS, DOMAINS, draw, variant=variant)
        yield {"input_ids": ids, "labels": labels, "task_ids": domain}


@torch.no_grad()
def _accuracy(model: Transformer, seed: int) -> float:
    """The share of symbols whose label is found, over 512 sequences that training never saw."""
    ids, labels, domain = domains(512, LENGTH, SYMBOLS, DOMAINS, torch.Generator().manual_seed(10**6 + seed))
    predicted: Tensor = model(input_ids=ids, task_ids=domain).logits.argmax(dim=-1)
    counted = labels >= 0
    return float((predicted == labels)[counted].float().mean())


def _curve(watched: Watch, what: str) -> list[float]:
    """One number for every step, the mean over the routers of the model."""
    curves = [[float(getattr(usage, what)) for usage in watched.of(router)] for router in watched.routers]
    return [mean(values) for values in zip(*curves, strict=True)]


def _rounded(curve: list[float]) -> list[float]:
    return [round(x, 4) for x in curve]


def _late(watched: Watch, what: str) -> float:
    """The mean over the last quarter of the training."""
    curve = _curve(watched, what)
    return mean(curve[-max(1, len(curve) // 4) :])


def _better(right: dict[str, list[float]], better: str, worse: str, text: str) -> Claim:
    return Claim.of_differences(text, [a - b for a, b in zip(right[better], right[worse], strict=True)])


def _figure(used: dict[str, list[float]], right: dict[str, list[float]]) -> Figure:
    figure, (left, bars) = panels(2, width=5.2, height=3.9)
    for place, (name, values) in enumerate(used.items()):
        left.barh(place, mean(values), color=LINES[1 if "no loss" in name else 0], alpha=0.75)
        left.scatter(values, [place] * len(values), color="black", s=10, zorder=3)
    left.set_yticks(range(len(used)), list(used))
    left.invert_yaxis()
    left.set(xlabel="entropy of use (1: even, 0: one expert; dots: seeds)", title="feed-forwards as experts")
    left.set_xlim(0, 1)
    names = list(LEVELS)
    for place, name in enumerate(names):
        bars.barh(place, 100 * mean(right[name]), color=LINES[0] if "task" not in name else LINES[2], alpha=0.75)
        bars.scatter([100 * x for x in right[name]], [place] * len(right[name]), color="black", s=10, zorder=3)
    bars.set_yticks(range(len(names)), names)
    bars.invert_yaxis()
    bars.set(xlabel="labels found, % (green: the task is given)", title="adapters as experts", xlim=(0, 100))
    return figure
