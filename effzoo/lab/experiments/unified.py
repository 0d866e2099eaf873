"""The unified view: six methods as rows of one table, each row computed and held against the method itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes

from effzoo import peft
from effzoo.architectures import Transformer
from effzoo.lab.analyses.unified import TABLE, Place, Row, attached, difference
from effzoo.lab.draw import heat, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.texts import DATA, minilm, texts

SPECS = {
    "prefix": "prefix[length=4, init=normal]", "houlsby": "houlsby[bottleneck=16, activation=relu]",
    "lora": "lora[rank=8, alpha=16]",
    "parallel": "parallel[bottleneck=16]", "multihead_parallel": "multihead_parallel[bottleneck=4]",
    "scaled_parallel": "scaled_parallel[bottleneck=16]",
}  # fmt: skip
FORMULAS = {"softmax": "softmax(z W_down) W_up", "relu": "ReLU(z W_down) W_up", "identity": "z W_down W_up"}
COMPOSITIONS = {"gated": "(1 - λ) h + λ Δh", "scaled": "h + s Δh", "added": "h + Δh"}
EXACT, APART = 1e-10, 1e-3


@experiment(
    "unified", deck=1, data=DATA,
    source="He et al. 2022, Towards a unified view, arXiv:2110.04366, section 3, equation 5 and table 1",
)  # fmt: skip
def unified(run: Run) -> Findings:
    """Does one function of a table's row compute what each method computes?"""
    count, length = run.choose(8, 16), run.choose(32, 64)
    data = texts(run, length=length, train=200, test=400)
    model = minilm(len(data.names)).double()
    differences: list[list[list[float | None]]] = []  # by seed, row and method
    for seed in run.seeds:
        chosen = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(seed))[:count]
        inputs = {name: x[chosen] for name, x in data.test.inputs.items()}
        places = {method: _places(model, spec, seed, inputs) for method, spec in SPECS.items()}
        differences.append([[difference(row, places[method.method]) for method in TABLE] for row in TABLE])
        run.say(
            f"seed {seed}: " + ", ".join(f"{row.method} {_said(differences[-1][i][i])}" for i, row in enumerate(TABLE))
        )

    kinds = range(len(TABLE))
    largest = [[_largest(differences, i, j) for j in kinds] for i in kinds]
    names = [row.method.replace("_", " ") for row in TABLE]
    figure, (left, right) = panels(2, width=6.4, height=4.0)
    _schema(left, names)
    exponents = [[None if value is None else math.log10(max(value, 1e-16)) for value in of_seed] for of_seed in largest]
    heat(right, exponents, [""] * len(names), [name.replace(" ", "\n") for name in names], vmin=-16, vmax=1)
    right.tick_params(length=0)
    right.set(xlabel="method that runs", title=r"$\log_{10}$ of the largest difference (empty: undefined)")

    head = "row of the table, form, modified, insertion, composition, places, largest difference, published"
    table = [head.split(", ")]
    for i, row in enumerate(TABLE):
        table.append(
            [row.method, FORMULAS[row.form], row.modified, "z = x" if row.insertion == "parallel" else "z = h",
            COMPOSITIONS[row.composition],
             f"{len(places[row.method])}", _said(largest[i][i]), "an identity"]
        )  # fmt: skip
    claims = [
        Claim.law(
            f"every row computes what its method computes, to {EXACT:g} in float64",
            tuple(all(_exact(of_seed[i][i]) for i in range(len(TABLE))) for of_seed in differences),
        ),
        Claim.law(
            "a prefix is a parallel adapter of each head with a softmax and a gate: (1 - λ) h + λ softmax(q P_k) P_v",
            tuple(_exact(of_seed[0][0]) for of_seed in differences),
        ),
        Claim.law(
            f"a row that differs in form, insertion or composition computes something else (above {APART:g}), or "
            "nothing",
            tuple(_apart(of_seed) for of_seed in differences),
        ),
    ]
    return Findings(
        tables={"Rows of the unified view": table},
        figure=figure,
        claims=claims,
        values={
            "difference": {
                str(seed): {row.method: dict(zip(SPECS, of_seed[i], strict=True)) for i, row in enumerate(TABLE)}
                for seed, of_seed in zip(run.seeds, differences, strict=True)
            }
        },
        settings={"model": "minilm, float64", "tokens": length, "texts": count},
        notes=[
            "The adapters' tensors are drawn at random, so that none is 0. Places are all layers (and both sub-layers, "
            "or both projections) that the method modifies; those of heads are compared after the output projection. "
            "Rows for parallel and multi-head parallel adapters agree with each other's methods: they differ in what "
            "is modified, not in what is computed; and s = 1 is no scale."
        ],
    )


def _places(model: Transformer, spec: str, seed: int, inputs: dict[str, torch.Tensor]) -> list[Place]:
    torch.manual_seed(seed)
    peft.attach(model, spec, name="row")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    places = attached(model, **inputs)
    peft.detach(model, "row")
    return places


def _apart(differences: list[list[float | None]]) -> bool:
    """Whether rows that differ in more than the place are told from each other; a scale of 1 is none."""
    for i, row in enumerate(TABLE):
        for j, method in enumerate(TABLE):
            value = differences[i][j]
            if value is not None and _computed(row, method) != _computed(method, method) and value <= APART:
                return False
    return True


def _computed(row: Row, method: Row) -> tuple[str, str, str]:
    """What a row computes where another method is: its scale counts only where that method has one."""
    scaled = row.composition == "scaled" and method.composition == "scaled"
    return row.form, row.insertion, "gated" if row.composition == "gated" else "scaled" if scaled else "added"


def _exact(value: float | None) -> bool:
    return value is not None and value <= EXACT


def _largest(differences: Sequence[Sequence[Sequence[float | None]]], row: int, method: int) -> float | None:
    """Of all seeds; None where none is defined."""
    numbers = [value for of_seed in differences if (value := of_seed[row][method]) is not None]
    return max(numbers, default=None)


def _said(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _schema(axes: Axes, names: list[str]) -> None:
    """The table as coloured words: one colour for each choice in a column."""
    columns: dict[str, list[str]] = {
        "form": [str(row.form) for row in TABLE], "modified": [row.modified.replace(" or ", " or\n") for row in TABLE],
        "insertion": [str(row.insertion) for row in TABLE],
        "composition": [COMPOSITIONS[row.composition] for row in TABLE],
    }  # fmt: skip
    codes = [[list(dict.fromkeys(words)).index(words[i]) for words in columns.values()] for i in range(len(TABLE))]
    axes.imshow(codes, aspect="auto", cmap="Pastel1", vmin=0, vmax=8)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xticks(range(len(columns)), list(columns))
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.set_title("row: what is computed")
    for x, words in enumerate(columns.values()):
        for y, word in enumerate(words):
            axes.text(x, y, word, ha="center", va="center", fontsize=8)
