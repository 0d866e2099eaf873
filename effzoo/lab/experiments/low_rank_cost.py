"""What low rank costs and saves: x A B in two orders, and the share of an adapter in a transformer."""

from __future__ import annotations

from typing import Any

import torch

import effzoo
from effzoo.lab.analyses.products import in_turn, product_first
from effzoo.lab.draw import LINES, MARKERS, panels
from effzoo.lab.experiment import Claim, Findings, Run, Table, experiment

WIDTHS = ((768, 12, 12), (1024, 24, 16), (4096, 32, 32), (12288, 96, 96))  # d, layers, heads
RANKS, LENGTH = (1, 8, 64, 512), 512
LECTURE = 12  # the lecture's inner width of an adapter, a


@experiment(
    "low_rank_cost", deck=2, source="Hu et al. 2021, LoRA, arXiv:2106.09685, section 4; Houlsby et al. 2019, "
    "arXiv:1902.00751, section 2.1",
)  # fmt: skip
def low_rank_cost(run: Run) -> Findings:
    """Is it (x A) B or x (A B) that one should compute, and which share of a transformer is an adapter?"""
    orders: list[dict[str, Any]] = []
    for dim, *_ in WIDTHS:
        for rank in RANKS:
            one, other = in_turn(LENGTH, dim, rank), product_first(LENGTH, dim, rank)
            orders.append({"d": dim, "r": rank, "(x A) B": one, "x (A B)": other})
    shares = [_share(*sizes) for sizes in WIDTHS]
    formulas = all(
        row["(x A) B"] == 4 * LENGTH * row["d"] * row["r"]
        and row["x (A B)"] == 2 * row["r"] * row["d"] ** 2 + 2 * LENGTH * row["d"] ** 2
        for row in orders
    )
    first: Table = [["d", "r", "(x A) B", "x (A B)", "ratio", "numbers of A, B", "of A B"]]
    first += [
        [f"{row['d']:,}", f"{row['r']}", f"{row['(x A) B']:.2e}", f"{row['x (A B)']:.2e}",
         f"{row['x (A B)'] / row['(x A) B']:.1f}", f"{2 * row['d'] * row['r']:,}", f"{row['d'] ** 2:,}"]
        for row in orders
    ]  # fmt: skip
    second: Table = [
        ["d", "layers", "12 L d^2", "one a layer, %", "a / 6d", "two a layer, %", "a / d"]
    ]  # fmt: skip
    second += [
        [f"{row['d']:,}", f"{row['layers']}", f"{row['matrices']:,}",
         f"{100 * row['one']:.4f}", f"{100 * LECTURE / (6 * row['d']):.4f}", f"{100 * row['two']:.4f}",
         f"{100 * LECTURE / row['d']:.4f}"]
        for row in shares
    ]  # fmt: skip
    figure, (left, right) = panels(2)
    for number, (dim, *_) in enumerate(WIDTHS):
        of_width = [row for row in orders if row["d"] == dim]
        times = [row["x (A B)"] / row["(x A) B"] for row in of_width]
        left.plot(RANKS, times, color=LINES[number], marker=MARKERS[number], linewidth=1.6, label=f"d = {dim:,}")
    left.axhline(1, color="#888888", linewidth=0.8)
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set(xlabel="rank r", ylabel="operations of x (A B) / of (x A) B", title=f"{LENGTH} tokens")
    left.legend(frameon=False, fontsize=8)
    dims = [row["d"] for row in shares]
    right.plot(dims, [100 * row["one"] for row in shares], color=LINES[0], marker="o", label="one adapter a layer")
    right.plot(dims, [100 * row["two"] for row in shares], color=LINES[1], marker="s", label="two (Houlsby)")
    right.plot(dims, [100 * LECTURE / d for d in dims], color="#888888", linestyle="--", label="a / d, as on the slide")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set(xlabel="d", ylabel="% of the matrices", title=f"inner width a = {LECTURE}")
    right.legend(frameon=False, fontsize=8)
    return Findings(
        tables={"Operations of x A B": first, f"The share of adapters with a = {LECTURE}": second},
        figure=figure,
        claims=[
            Claim.law("the operations are 4 n d r in one order and 2 r d^2 + 2 n d^2 in the other", formulas),
            Claim.law(
                "(x A) B takes fewer operations for every r below d / 2",
                all(row["x (A B)"] > row["(x A) B"] for row in orders if 2 * row["r"] < row["d"]),
            ),
            Claim.law(
                "the matrices of a transformer are 12 L d^2 numbers",
                all(row["matrices"] == 12 * row["layers"] * row["d"] ** 2 for row in shares),
            ),
            Claim.law(
                "an adapter of inner width a adds the share a / d, as the lecture says",
                all(abs(row["one"] * row["d"] / LECTURE - 1) < 0.1 for row in shares),
            ),
            Claim.law(
                "one adapter a layer adds a / 6d, two add a / 3d (within 10 %, for biases)",
                all(abs(row[name] * row["d"] / (part * LECTURE) - 1) < 0.1
                     for row in shares for name, part in (("one", 1 / 6), ("two", 1 / 3))),
            ),
        ],
        values={"orders": orders, "shares": shares},
        settings={"n": LENGTH, "a": LECTURE, "trained": "nothing"},
        notes=[
            "Operations are those that torch counts when the products run on tensors without memory. LoRA here "
            "computes "
            "(x A) B while it trains; merged, W + A B is one matrix and costs what W costs.",
            "An adapter has 2 d a + a + d numbers and a layer's matrices 12 d^2, so one adapter is a / 6d of it. The "
            "lecture's r = a / d with a = 12 and d = 12,288 gives 0.1 %; counted it is 0.017 % for one adapter a "
            "layer, "
            "0.034 % for two, a sixth and a third of that.",
        ],
    )  # fmt: skip


def _share(dim: int, layers: int, heads: int) -> dict[str, Any]:
    """Matrices of the blocks, and the share of them that one and two adapters a layer add."""
    found: dict[str, Any] = {"d": dim, "layers": layers}
    for name, targets in (("one", "mlp.branch"), ("two", "(attn.branch, mlp.branch)")):
        with torch.device("meta"):
            model = effzoo.build("gpt2", layers=layers, dim=dim, heads=heads, mlp=4 * dim)
            found["matrices"] = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
            effzoo.attach(model, f"houlsby[bottleneck={LECTURE}, targets={targets}]")
        found[name] = effzoo.account(model).trainable / found["matrices"]
    return found
