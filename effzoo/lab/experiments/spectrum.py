"""Self-attention is low rank: the cumulative spectrum of attention matrices, by layer and head."""

from __future__ import annotations

import torch
from torch import Tensor

from effzoo.architectures import Transformer
from effzoo.lab.analyses.spectrum import attention_matrices, cumulative
from effzoo.lab.draw import depth, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.texts import DATA, minilm, texts

N = 512


@experiment("spectrum", deck=4, source="Wang et al. 2020, Linformer, arXiv:2006.04768, figure 1", data=DATA)
def spectrum(run: Run) -> Findings:
    """How much of an attention matrix do its largest singular values hold, at which layer?"""
    count = run.choose(2, 3)
    model = minilm(2, max_length=N)
    by_seed = []
    for seed in run.seeds:
        drawn = texts(run, length=N, train=200, test=400, seed=seed).test
        whole = drawn.at(drawn.inputs["attention_mask"].sum(dim=1) == N).at(slice(0, count))
        curves = torch.stack([_curves(model, ids[None]) for ids in whole.inputs["input_ids"]]).mean(dim=0)
        by_seed.append(curves)
        run.say(
            f"seed {seed}: {len(whole)} texts of {N} tokens, mean at {N // 4} of {N}: "
            f"{float(curves[..., N // 4 - 1].mean()):.3f}"
        )
    mean = torch.stack(by_seed).mean(dim=0)
    at = mean[..., N // 4 - 1]
    layers, heads = at.shape
    normal = torch.randn(N, N, generator=torch.Generator().manual_seed(0))
    random = float(cumulative(normal.softmax(dim=-1))[N // 4 - 1])

    figure, (left, right) = panels(2, sharey=True)
    for layer, curve in enumerate(mean.mean(dim=1).tolist()):
        colour = depth(layer / max(1, layers - 1))
        left.plot(range(1, N + 1), curve, label=f"layer {layer}", linewidth=1.6, color=colour)
        right.scatter([layer] * heads, at[layer], color=[colour], s=16, alpha=0.7)
        right.scatter([layer], [at[layer].mean()], color=[colour], marker="_", s=500, linewidth=2)
    left.plot([1, N], [1 / N, 1], color="#888888", linewidth=1.0, linestyle=":", label="all alike")
    left.axvline(N // 4, color="#888888", linewidth=0.8)
    left.set(
        xlabel=f"largest singular values counted, of {N}",
        ylabel="share of their sum",
        title="mean over heads",
        ylim=(0, 1.02),
    )
    left.legend(frameon=False, fontsize=8, loc="lower right")
    for height, label in ((random, "softmax of normal numbers"), (0.25, "all alike")):
        right.axhline(height, color="#888888", linewidth=1.0, linestyle=":")
        right.text(layers - 0.6, height + 0.01, label, ha="right", va="bottom", fontsize=8, color="#555555")
    right.set(xlabel="layer (dots: heads; bar: their mean)", title=f"share of the first {N // 4}")

    table = [["layer", f"share at {N // 4} of {N}", "lowest head", "highest head", "published"]]
    table += [
        [f"{layer}", f"{row.mean():.3f}", f"{row.min():.3f}", f"{row.max():.3f}", "no number"]
        for layer, row in enumerate(at)
    ]
    table += [
        ["softmax of standard normal numbers", f"{random:.3f}", "", "", ""],
        ["singular values all alike", "0.250", "", "", ""],
    ]
    by_layer = [c[..., N // 4 - 1].mean(dim=1) for c in by_seed]
    return Findings(
        tables={f"{N // 4} of {N} singular values": table},
        figure=figure,
        claims=[
            Claim.of_differences(
                f"in every layer the first {N // 4} of {N} singular values hold most of their sum",
                [float(of.min()) - 0.5 for of in by_layer],
            ),
            Claim.of_differences(
                "the upper half of the layers is lower in rank than the lower half",
                [float(of[layers // 2 :].mean() - of[: layers // 2].mean()) for of in by_layer],
            ),
        ],
        values={
            "share": {str(seed): c[..., N // 4 - 1].tolist() for seed, c in zip(run.seeds, by_seed, strict=True)},
            "softmax of standard normal numbers": random,
        },
        settings={"model": "minilm", "n": N, "texts": count},
        notes=[
            "Published: RoBERTa on WikiText-103 and IMDb; a figure without numbers, in which the spectra have a long "
            "tail and higher layers are more skewed. Halves of the layers are compared: from one layer to the next the "
            "share falls here too, from the first to the second. A seed draws the texts."
        ],
    )


def _curves(model: Transformer, ids: Tensor) -> Tensor:
    """[layers, heads, n] of one text."""
    return torch.stack([cumulative(matrices[0]) for matrices in attention_matrices(model, ids)])
