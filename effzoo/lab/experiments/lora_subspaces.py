"""What LoRA has learned: do runs of different ranks share their directions, and does the change amplify what the weight
holds?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

import effzoo
from effzoo.lab.analyses.lora_factors import Factors, attached_factors, read_factors
from effzoo.lab.analyses.subspaces import (
    Amplification,
    amplification,
    factored,
    participation,
    rank_for_variance,
    subspace_similarity,
)
from effzoo.lab.draw import LINES, MARKERS, heat, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.fit import Examples, fit
from effzoo.lab.score import Score, score
from effzoo.lab.texts import minilm, texts
from effzoo.lab.word_order import word_order

SMALL, LARGE = 8, 64
ALPHA, RATE, LAYERS = 8, 2e-3, 3  # one alpha for every rank, as in the paper (section 4.1)
ROLES = ("q", "v")
PLACES = ((1, 1), (1, 8), (2, 2), (4, 4), (8, 8))  # i, j in the table
DATA = (
    "an .npz file of LoRA factors, keys ending in lora_A and lora_B (default: LoRA trained here, on texts of BBC News)"
)


@experiment(
    "lora_subspaces", deck=1, data=DATA,
    source="Hu et al. 2021, LoRA, arXiv:2106.09685, sections 7.2 and 7.3, figures 3 and 4, table 7",
)  # fmt: skip
def lora_subspaces(run: Run) -> Findings:
    """Do LoRA's of different ranks and seeds find the same directions, and does their change amplify what the weight
    holds?"""
    if run.data is not None:
        return _of_file(run.data)
    steps, length = run.choose(50, 200), 16
    drawn = {}
    for seed in run.seeds:
        data = texts(
            Run(quick=run.quick), length=length, train=run.choose(800, 1300), test=run.choose(200, 400), seed=seed
        )
        drawn[seed] = word_order(data.train, seed=2 * seed), word_order(data.test, seed=2 * seed + 1)
    partners = dict(zip(run.seeds, (*run.seeds[1:], run.seeds[0]), strict=True))
    small = {seed: _trained(SMALL, *drawn[seed], steps, seed, run) for seed in drawn}
    large = {seed: _trained(LARGE, *drawn[seed], steps, seed, run) for seed in drawn}
    paths = list(small[run.seeds[0]][0])
    base = {key: value.double() for key, value in minilm(2, layers=LAYERS).state_dict().items()}

    phi: dict[str, dict[str, list[Tensor]]] = {}  # what is compared -> role -> one mean over layers for each seed
    for role in ROLES:
        of_role = [path for path in paths if path.endswith(f".{role}")]
        for seed in run.seeds:
            draw = torch.Generator().manual_seed(seed)
            for path in of_role:
                A8, A64, other = (factors[0][path][0] for factors in (small[seed], large[seed], large[partners[seed]]))
                pairs = {
                    f"r = {SMALL} and r = {LARGE}": (A8, A64),
                    f"r = {LARGE}, two seeds": (A64, other),
                    "random, 8 and 64": (torch.randn(A8.shape, generator=draw), torch.randn(A64.shape, generator=draw)),
                }
                for name, (one, two) in pairs.items():
                    phi.setdefault(name, {}).setdefault(role, []).append(subspace_similarity(one, two)[:SMALL, :SMALL])
    layers = len(paths) // len(ROLES)
    by_seed = {
        name: {
            role: torch.stack(values).view(len(run.seeds), layers, SMALL, SMALL).mean(dim=1)
            for role, values in by_role.items()
        }
        for name, by_role in phi.items()
    }

    table = [["compared", "matrix", *(f"phi({i}, {j})" for i, j in PLACES), "published"]]
    for name, by_role in by_seed.items():
        for role, values in by_role.items():
            average = values.mean(dim=0).tolist()
            said = "phi(1, 1) > 0.5, others small (figure)" if name.startswith(f"r = {SMALL}") else "no number"
            table.append([name, role, *(f"{average[i - 1][j - 1]:.3f}" for i, j in PLACES), said])
    amplified = {rank: _amplified(base, trained, rank) for rank, trained in ((SMALL, small), (LARGE, large))}
    top = max(float(values.mean(dim=0).max()) for by_role in by_seed.values() for values in by_role.values())
    figure, axes = panels(3, rows=2)
    for row, role in enumerate(ROLES):
        for axis, (name, by_role) in zip(axes[3 * row :], by_seed.items(), strict=False):
            ticks = [f"{i}" for i in range(1, SMALL + 1)]
            heat(axis, by_role[role].mean(dim=0).tolist(), ticks, ticks, form="{:.2f}", vmin=0, vmax=top)
            axis.set(xlabel="j", ylabel="i", title=f"{role}: {name}")
    pair, seeds = by_seed[f"r = {SMALL} and r = {LARGE}"], by_seed[f"r = {LARGE}, two seeds"]
    randoms = by_seed["random, 8 and 64"]
    count = range(len(run.seeds))
    settings = {
        "model": f"minilm, {LAYERS} layers", "task": "word order", "data": data.about, "tokens": length,
        "steps": steps, "batch": 16, "alpha": ALPHA, "learning rate": RATE,
    }  # fmt: skip
    factor = {
        rank: [mean(a.factor for a in of_seeds[seed]) for seed in run.seeds] for rank, of_seeds in amplified.items()
    }
    return Findings(
        tables={
            "subspace similarity, mean over layers": table,
            "amplification, dW of q": _amplification_table(amplified),
        },
        figure=figure,
        claims=[
            Claim.of_differences(
                "the top directions of r = 8 and r = 64 are shared: phi(1, 1) > 0.5, for q and v in the mean over "
                "layers",
                [min(float(pair[role][i, 0, 0]) for role in ROLES) - 0.5 for i in count],
            ),
            Claim.of_differences(
                "the further directions are shared less: phi(8, 8) < phi(1, 1), for q and v",
                [min(float(pair[role][i, 0, 0] - pair[role][i, -1, -1]) for role in ROLES) for i in count],
            ),
            Claim.of_differences(
                "two seeds of r = 64 share more than two random matrices: phi(8, 8) above twice theirs, for q and v",
                [min(float(seeds[r][i, -1, -1] - 2 * randoms[r][i, -1, -1]) for r in ROLES) for i in count],
            ),
            Claim.of_differences(
                "the change amplifies what the weight holds but does not stress: ||U^T W V|| is above that of random "
                "directions, below that of W's, in every layer",
                [
                    min(min(a.of_change - a.of_random, a.of_weight - a.of_change) for a in amplified[SMALL][seed])
                    for seed in run.seeds
                ],
            ),
            Claim.of_differences(
                "the amplification factor is larger at r = 8 than at r = 64, in the mean over layers",
                [a - b for a, b in zip(factor[SMALL], factor[LARGE], strict=True)],
            ),
        ],
        values={
            "phi": {
                name: {role: values.tolist() for role, values in by_role.items()} for name, by_role in by_seed.items()
            },
            "amplification": {
                str(r): {str(seed): list(map(asdict, layers)) for seed, layers in of_seeds.items()}
                for r, of_seeds in amplified.items()
            },
            "accuracy": {
                str(r): {str(seed): t[1].accuracy for seed, t in of_seeds.items()}
                for r, of_seeds in ((SMALL, small), (LARGE, large))
            },
        },
        settings=settings,
        notes=[
            "Right singular vectors of A, as published for GPT-3 175B, layer 48 of 96. A starts random and B at 0; "
            "what the runs share they have learned. Of two random subspaces phi(i, j) is max(i, j) / in on average. "
            "Table 7 is published for r = 4 and r = 64. Claims for q and v are of the worse one. Seeds draw texts, "
            "orders and weights; r = 8 and r = 64 of a seed see the same batches, two seeds other ones."
        ],
    )


def _trained(rank: int, train: Examples, test: Examples, steps: int, seed: int, run: Run) -> tuple[Factors, Score]:
    """The factors of every adapted matrix after training, and how well the model does."""
    model = minilm(2, seed=seed, layers=LAYERS)
    torch.manual_seed(1000 * rank + seed)  # the first rows of A would be the same for every rank
    effzoo.attach(model, {"name": "lora", "rank": rank, "alpha": ALPHA, "targets": ("attn.q", "attn.v")})
    fit(model, train.stream(16, seed), steps, learning_rate=RATE)
    reached = score(model, test)
    run.say(f"seed {seed}, r = {rank}: accuracy {reached.accuracy:.3f}")
    return attached_factors(model), reached


def _amplified(
    base: dict[str, Tensor], trained: dict[int, tuple[Factors, Score]], rank: int
) -> dict[int, list[Amplification]]:
    """Of the queries of every layer, by seed."""
    by_seed: dict[int, list[Amplification]] = {}
    for seed, (factors, _) in trained.items():
        of_q = [(path, pair) for path, pair in factors.items() if path.endswith(".q")]
        by_seed[seed] = [
            amplification(base[f"{path}.weight"], B.double() @ A.double(), rank, seed=seed) for path, (A, B) in of_q
        ]
    return by_seed


def _amplification_table(amplified: dict[int, dict[int, list[Amplification]]]) -> list[list[str]]:
    published = {
        "||U^T W V||, directions of dW": ("of_change", "0.32", "about 1.90"),
        "directions of W": ("of_weight", "21.67", "about 37.71"),
        "random directions": ("of_random", "0.02", "about 0.33"), "||W||": ("weight", "61.95", "61.95"),
        "||dW||": ("change", "6.91", "about 3.57"), "factor": ("factor", "21.5", "about 1.9"),
    }  # fmt: skip
    ranks = list(amplified)
    table = [["mean over layers and seeds", *(f"r = {r}" for r in ranks), "published r = 4", "published r = 64"]]
    for name, (which, four, sixty_four) in published.items():
        means = [
            mean(getattr(a, which) for amplifications in amplified[r].values() for a in amplifications) for r in ranks
        ]
        table.append([name, *(f"{value:.2f}" for value in means), four, sixty_four])
    return table


def _of_file(path: Path) -> Findings:
    """Spectra and subspaces of somebody's trained factors, without the weights that they change."""
    factors = read_factors(path)
    names = list(factors)
    table = [
        [
            "matrix",
            "r",
            "||B A||",
            "largest value",
            "values in effect",
            "values for 90 %",
            "phi(1, 1) with the next",
            "published",
        ]
    ]
    spectra, effective, nineties, next_one = {}, {}, {}, {}
    for i, name in enumerate(names):
        A, B = factors[name]
        values, right = factored(B, A)
        effective[name], nineties[name] = participation(torch.diag(values)), rank_for_variance(torch.diag(values))
        spectra[name] = values.tolist()
        following = next(
            (
                other
                for other in names[i + 1 :]
                if _role(other) == _role(name) and factors[other][0].shape[1] == A.shape[1]
            ),
            None,
        )
        next_one[name] = (
            None if following is None else float((right[0] @ factored(*factors[following][::-1])[1][0]).square())
        )
        said = "no number"
        shown = "" if next_one[name] is None else f"{next_one[name]:.3f}"
        table.append(
            [
                _short(name),
                f"{len(A)}",
                f"{values.norm():.2f}",
                f"{values[0]:.2f}",
                f"{effective[name]:.2f}",
                f"{nineties[name]}",
                shown,
                said,
            ]
        )
    figure, (left, right_axes) = panels(2, width=5.2)
    roles = list(dict.fromkeys(_role(name) for name in names))
    for number, role in enumerate(roles):
        of_role = [name for name in names if _role(name) == role]
        left.plot(
            range(len(of_role)),
            [effective[name] for name in of_role],
            marker=MARKERS[number % len(MARKERS)],
            label=role,
            color=LINES[number % len(LINES)],
        )
    left.set(
        xlabel="layer",
        ylabel="singular values in effect",
        title=f"of at most {max(len(factors[n][0]) for n in names)}",
        ylim=(0, None),
    )
    left.legend(frameon=False, fontsize=8)
    first = [name for name in names if _role(name) == roles[0]]
    squares = [[value**2 for value in spectra[name]] for name in first]
    share = [[square / sum(of_layer) for square in of_layer] for of_layer in squares]
    heat(
        right_axes,
        share,
        [f"{i}" for i in range(len(first))],
        [f"{i}" for i in range(1, len(share[0]) + 1)],
        form="{:.2f}",
        vmin=0,
        vmax=1,
    )
    right_axes.set(xlabel="singular value", ylabel="layer", title=f"{roles[0]}: share of ||B A||^2")
    half = len(first) // 2
    by_role = [[effective[name] for name in names if _role(name) == role] for role in roles]
    falls = tuple(mean(of_role[half:]) < mean(of_role[:half]) for of_role in by_role)
    small = sum(count <= (len(factors[n][0]) + 1) // 2 for n, count in nineties.items())
    return Findings(
        tables={"trained factors": table},
        figure=figure,
        claims=[
            Claim.law(
                "in every role the upper half of the layers has fewer singular values in effect than the lower half",
                all(falls),
            ),
            Claim.law("half of the rank holds 90 % of ||B A||^2 in most of the matrices", small > len(names) / 2),
        ],
        values={
            "singular values": spectra,
            "in effect": effective,
            "for 90 %": nineties,
            "phi(1, 1) with the next": next_one,
        },
        settings={"file": path.name, "matrices": len(names)},
        notes=[
            "Spectra of B A without its scale. Without the weights nothing can be said of amplification (table 7), and "
            "with one run nothing of other ranks or seeds (figures 3 and 4); neighbouring layers of one role stand in: "
            "two random directions of 768 share 0.001."
        ],
    )


def _role(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _short(name: str) -> str:
    """The last number in a path, which counts the layers, and its role."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    return " ".join([*(f"layer {number}" for number in numbers[-1:]), _role(name)])
