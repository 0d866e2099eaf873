"""Self-attention is low rank: the cumulative spectrum of attention matrices, by layer and head."""

from __future__ import annotations

import torch
from torch import Tensor

from effzoo.architectures import Transformer
from effzoo.lab.analyses.spectrum import attention_matrices, cumulative
from effzoo.lab.draw import depth, heat, panels
from effzoo.lab.experiment import Claim, Findings, Run, experiment
from effzoo.lab.texts import DATA, minilm, texts

N = 512


@experiment("spectrum", deck=4, source="Wang et al. 2020, Linformer, arXiv:2006.04768, figure 1", data=DATA)
def spectrum(run: Run) -> Findings:
    """How much of an attention matrix do its largest singular values hold, at which layer?"""
    count = run.choose(2, 64)
    data = texts(run, length=N, train=200, test=400)
    whole = data.test.at(data.test.inputs["attention_mask"].sum(dim=1) == N)
    model = minilm(len(data.names), max_length=N)
    by_seed = []
    for seed in run.seeds:
        chosen = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[:count]
        curves = torch.stack([_curves(model, whole.inputs["input_ids"][row][None]) for row in chosen]).mean(dim=0)
        by_seed.append(curves)
        run.say(
            f"seed {seed}: {len(chosen)} texts of {N} tokens, mean at {N // 4} of {N}: "
            f"{float(curves[..., N // 4 - 1].mean()):.3f}"
        )
    mean = torch.stack(by_seed).mean(dim=0)
    at = mean[..., N // 4 - 1]
    layers, heads = at.shape
    drawn = torch.randn(N, N, generator=torch.Generator().manual_seed(0))
    random = float(cumulative(drawn.softmax(dim=-1))[N // 4 - 1])

    figure, (left, right) = panels(2)
    for layer, curve in enumerate(mean.mean(dim=1).tolist()):
        left.plot(
            range(1, N + 1), curve, label=f"layer {layer}", linewidth=1.6, color=depth(layer / max(1, layers - 1))
        )
    left.plot([1, N], [1 / N, 1], color="#888888", linewidth=1.0, linestyle=":", label="all alike")
    left.axvline(N // 4, color="#888888", linewidth=0.8)
    left.set(
        xlabel=f"largest singular values counted, of {N}",
        ylabel="share of their sum",
        title="mean over heads",
        ylim=(0, 1.02),
    )
    left.legend(frameon=False, fontsize=8, loc="lower right")
    numbers = [[f"{i}" for i in range(size)] for size in (layers, heads)]
    heat(right, at.tolist(), *numbers, form="{:.2f}", vmin=0.25, vmax=1)
    right.set(xlabel="head", ylabel="layer", title=f"share at {N // 4} of {N}")

    table = [["layer", f"share at {N // 4} of {N}", "lowest head", "highest head", "published"]]
    table += [
        [f"{layer}", f"{row.mean():.3f}", f"{row.min():.3f}", f"{row.max():.3f}", "no number"]
        for layer, row in enumerate(at)
    ]
    table += [
        ["softmax of standard normal numbers", f"{random:.3f}", "", "", ""],
        ["singular values all alike", "0.250", "", "", ""],
    ]
    upper = tuple(
        float(c[layers // 2 :, :, N // 4 - 1].mean()) > float(c[: layers // 2, :, N // 4 - 1].mean()) for c in by_seed
    )
    tail = tuple(bool((c[..., N // 4 - 1].mean(dim=1) > 0.5).all()) for c in by_seed)
    return Findings(
        tables={f"{N // 4} of {N} singular values": table},
        figure=figure,
        claims=[
            Claim(f"in every layer the first {N // 4} of {N} singular values hold most of their sum", tail),
            Claim("the upper half of the layers is lower in rank than the lower half", upper),
        ],
        values={
            "share": {str(seed): c[..., N // 4 - 1].tolist() for seed, c in zip(run.seeds, by_seed, strict=True)},
            "softmax of standard normal numbers": random,
        },
        settings={"model": "minilm", "n": N, "texts": count},
        notes=[
            "Published: RoBERTa on WikiText-103 and IMDb; a figure without numbers, in which the spectra have a long "
            "tail and higher layers are more skewed. A seed draws the texts."
        ],
    )


def _curves(model: Transformer, ids: Tensor) -> Tensor:
    """[layers, heads, n] of one text."""
    return torch.stack([cumulative(matrices[0]) for matrices in attention_matrices(model, ids)])
