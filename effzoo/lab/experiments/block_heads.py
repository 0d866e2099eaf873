"""Blockwise attention: which permutation of blocks should get more heads."""

from __future__ import annotations

from statistics import mean

import torch

from effzoo.lab.analyses.blocks import caught
from effzoo.lab.analyses.spectrum import attention_matrices
from effzoo.lab.draw import LINES, panels
from effzoo.lab.experiment import Claim, Findings, Run, Table, experiment
from effzoo.lab.texts import DATA, minilm, texts

N = 512
MASKS = ((1, 2), (2, 1), (1, 2, 3), (2, 3, 1), (3, 1, 2))  # of the lecture: query block i sees key block p(i)


@experiment("block_heads", deck=4, source="Qiu et al. 2020, BlockBERT, arXiv:1911.02972, sections 3 and 4.4", data=DATA)
def block_heads(run: Run) -> Findings:
    """Which permutation of blocks should get more heads in blockwise attention?

    Each mask is laid on the attention matrices of MiniLM: it catches a share of the weights, and the more it catches,
    the less is lost. The paper gives the identity 10 of 12 heads, or 8.
    """
    count = run.choose(4, 32)
    model = minilm(2, max_length=N)
    shares: dict[str, list[torch.Tensor]] = {_name(mask): [] for mask in MASKS}  # each [layers, heads], by seed
    for seed in run.seeds:
        drawn = texts(run, length=N, train=200, test=400, seed=seed).test
        whole = drawn.at(drawn.inputs["attention_mask"].sum(dim=1) == N)
        matrices = torch.stack(attention_matrices(model, whole.inputs["input_ids"][:count]))
        for mask in MASKS:
            shares[_name(mask)].append(caught(matrices, mask).mean(dim=1))
        run.say(f"seed {seed}: " + ", ".join(f"{name} {float(of[-1].mean()):.2f}" for name, of in shares.items()))
    means = {name: torch.stack(of).mean(dim=0) for name, of in shares.items()}
    table: Table = [["permutation", "of the pairs, %", "of the weights, %", "heads that it serves best", "the paper"]]
    for size, paper in ((2, ("10 of 12", "2")), (3, ("8 of 12", "2", "2"))):
        names = [_name(mask) for mask in MASKS if len(mask) == size]
        best = torch.stack([means[name] for name in names]).argmax(dim=0)
        for place, name in enumerate(names):
            heads = int((best == place).sum())
            table.append(
                [name, f"{100 / size:.0f}", f"{100 * float(means[name].mean()):.1f}", f"{heads} of {best.numel()}",
                 paper[place]]
            )  # fmt: skip
    claims = [
        Claim.of_differences(
            f"the identity catches more of the weights than the other permutation{'s' * (size > 2)} of {size} blocks "
            f"do",
            [
                float(shares[_name(same)][i].mean() - mean(float(shares[_name(other)][i].mean()) for other in others))
                for i in range(len(run.seeds))
            ],
        )
        for size, same, *others in ((2, MASKS[0], MASKS[1]), (3, MASKS[2], MASKS[3], MASKS[4]))
    ]
    figure, axes = panels(2, sharey=True)
    for panel, size in zip(axes, (2, 3), strict=True):
        for number, name in enumerate(_name(mask) for mask in MASKS if len(mask) == size):
            by_layer = 100 * means[name].mean(dim=1)
            panel.plot(range(len(by_layer)), by_layer, color=LINES[number], marker="o", label=name)
        panel.axhline(100 / size, color="#888888", linewidth=0.9, linestyle="--", label="share of the pairs")
        panel.set(xlabel="layer", ylabel="% of the attention weights", title=f"{size} blocks", ylim=(0, 100))
        panel.legend(frameon=False, fontsize=8)
    return Findings(
        tables={"What a mask catches of full attention": table},
        figure=figure,
        claims=claims,
        values={name: [of.tolist() for of in by_seed] for name, by_seed in shares.items()},
        settings={"n": N, "texts": count, "model": "MiniLM, 6 layers of 12 heads"},
        notes=[
            "The identity should get most heads: a query's weights are mostly near it, so that its own block catches "
            "far "
            "more than its share of the pairs, and every shift less. Some heads go to shifts all the same, as without "
            "them no token would ever see another block.",
            "Seeds draw other texts. The weights are those of a model that was trained with full attention.",
        ],
    )  # fmt: skip


def _name(mask: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, mask))})"
