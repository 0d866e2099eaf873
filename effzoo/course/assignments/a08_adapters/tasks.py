"""What is right: the zoo's adapter after the feed-forward, counts of listed shapes, and names split at their dots."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from effzoo.course.entries import Method
from effzoo.course.task import Draw, Function, Task

ADAPTER = "pfeiffer[bottleneck=5]"
PARTS = ("embeddings.token", "embeddings.norm", "blocks.0.attn.q", "blocks.0.attn.o", "blocks.1.mlp.up",
         "blocks.1.mlp_norm", "blocks.1.attn.bias_table", "head.out")  # fmt: skip


def numbers(dim: int, bottleneck: int, blocks: int) -> int:
    """Every tensor of Houlsby's method, one after the other."""
    adapter = [(bottleneck, dim), (bottleneck, 1), (dim, bottleneck), (dim, 1)]
    norm = [(dim, 1), (dim, 1)]
    return sum(rows * columns for _ in range(blocks) for rows, columns in 2 * adapter + 2 * norm)


def without(biases: int, adapters: int, norms: int) -> Any:
    """A count with one thing left out."""

    def count(dim: int, bottleneck: int, blocks: int) -> int:
        adapter = 2 * dim * bottleneck + biases * (dim + bottleneck)
        return blocks * (adapters * adapter + norms * 2 * dim)

    return count


def biases(names: list[str]) -> list[str]:
    return [name for name in names if name.split(".")[-1] == "bias"]


def sizes(draw: Draw) -> dict[str, Any]:
    return {"dim": draw.whole(2, 900), "bottleneck": draw.whole(1, 64), "blocks": draw.whole(1, 24)}


def some_names(draw: Draw) -> dict[str, Any]:
    """Names of parameters in a drawn order, some of them with "bias" in another place."""
    every = [
        f"{part}.{kind}" for part in PARTS for kind in ("weight", "bias") if f"{part}.{kind}" != PARTS[-2] + ".bias"
    ]
    return {"names": [every[i] for i in draw.order(len(every)).tolist()[: draw.whole(1, len(every))]]}


TASKS: dict[str, Task] = {
    "start": Method(ADAPTER, way="start"),
    "trained": Method(ADAPTER, way="trained"),
    "adapter": Method(
        ADAPTER,
        wrong={
            "sigma is left out: without it the two matrices are one, of rank m": lambda a, x, y: y + a.up(a.down(y)),
            "it reads x, the input of the feed-forward: an adapter reads y, its output": lambda a, x, y: (
                y + a.up(torch.relu(a.down(x)))
            ),
            "the skip-connection is left out: y' = y + W_up sigma(W_down y)": lambda a, x, y: a.up(
                torch.relu(a.down(y))
            ),
            "sigma stands behind W_up: it belongs between the two matrices": lambda a, x, y: (
                y + torch.relu(a.up(a.down(y)))
            ),
            "sigma is gelu, and relu is asked for": lambda a, x, y: y + a.up(F.gelu(a.down(y))),
            "x is added in place of y": lambda a, x, y: x + a.up(torch.relu(a.down(y))),
        },
    ),
    "gradients": Method(ADAPTER, way="gradients"),
    "saved": Method(ADAPTER, way="saved"),
    "numbers": Function(
        "houlsby_numbers",
        right=numbers,
        arguments=sizes,
        wrong={
            "the biases of the adapters are left out: one of bottleneck and one of dim numbers": without(0, 2, 2),
            "there is one adapter in a block, and Houlsby et al. have two": without(1, 1, 2),
            "the norms of a block are trained too: two, with a weight and a bias each": without(1, 2, 0),
            "a block has two norms, and each has a weight and a bias: one norm is counted": without(1, 2, 1),
        },
    ),
    "bitfit": Function(
        "bitfit",
        right=biases,
        arguments=some_names,
        wrong={
            "'bias' is looked for anywhere in the name: bias_table.weight is a weight": lambda names: [
                name for name in names if "bias" in name
            ],
            "the weights are chosen in place of the biases": lambda names: [
                name for name in names if name.endswith("weight")
            ],
            "the biases of the norms are left out: they are trained too": lambda names: [
                name for name in biases(names) if "norm" not in name
            ],
            "the order of the names is changed: keep that of the model": lambda names: sorted(biases(names)),
        },
        draws=12,
    ),
}
