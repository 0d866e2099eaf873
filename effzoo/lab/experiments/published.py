"""Published tables of LoRA with our counts of parameters beside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from effzoo.lab.analyses.published import E2E, GLUE, OF_GPT3, TABLES, Published, Row, agrees, counted
from effzoo.lab.draw import LINES, MARKERS, panels
from effzoo.lab.experiment import Claim, Findings, Run, Table, experiment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAME = ("yes", "in 2^20")


@experiment("published", deck=(1, 2), source="Hu et al. 2021, LoRA, arXiv:2106.09685, tables 2, 3 and 4")
def published(run: Run) -> Findings:
    """How good are LoRA and others in the published tables, and do their counts of parameters come out?

    Nothing is trained: scores are the paper's; the counts are of our methods on models of these sizes.
    """
    counts: dict[str, list[int | None]] = {}
    for table in TABLES:
        counts[table.title] = [counted(row) for row in table.rows]
        run.say(f"{table.title}: {sum(count is not None for count in counts[table.title])} counts")
    named = {
        "LoRA and adapters on GPT-3": (OF_GPT3, ("LoRA", "Adapter H", "PreEmbed")),
        "BitFit and PreLayer on GPT-3": (OF_GPT3, ("BitFit", "PreLayer")),
        "every method on RoBERTa and DeBERTa": (GLUE, ("BitFit", "Adapter D", "LoRA", "Adapter P", "Adapter H")),
        "LoRA on GPT-2": (E2E, ("LoRA",)),
        "the last two layers of GPT-2": (E2E, ("last two layers",)),
    }
    claims = [
        Claim.law(f"{what}: the count is the published one", _same(table, counts[table.title], methods))
        for what, (table, methods) in named.items()
    ]
    figure, axes = panels(3, width=4.6, height=3.8)
    _scatter(axes[0], OF_GPT3, OF_GPT3.rows[1:], OF_GPT3.rows[0], 0, "GPT-3, WikiSQL", "accuracy, %")
    _scatter(axes[1], E2E, E2E.rows[1:7], E2E.rows[0], 0, "GPT-2 medium, E2E", "BLEU")
    _scatter(axes[2], GLUE, GLUE.rows[1:5], GLUE.rows[0], 8, "RoBERTa base, GLUE", "mean of the tasks")
    return Findings(
        tables={
            name: made
            for table in TABLES
            for name, made in (
                (f"{table.title}: trained parameters, published and counted", _counts(table, counts[table.title])),
                (f"{table.title}: published scores", _scores(table)),
            )
        },
        figure=figure,
        claims=claims,
        values={
            table.title: [
                {"method": row.method, "spec": row.spec, "counted": count, "published, millions": float(row.millions)}
                for row, count in zip(table.rows, counts[table.title], strict=True)
            ]
            for table in TABLES
        },
        settings={"trained": "nothing", "models": "without memory"},
        notes=[
            "agrees: the count is the printed number of millions to its last figure; in 2^20: it is, if a million is "
            "taken as 2^20, as in the rows with 3.0 and 6.0. Empty: the paper does not say of which size the method "
            "is.",
            "BitFit: 11 d a layer and d at the end (four projections, 4 d + d of the feed-forward, two norms) are "
            "13.0 "
            "million; the published 14.2 are 12 d a layer. PreLayer: L d (8 + 8), the formula of the paper's "
            "appendix, is "
            "18.9 million, not 20.2. LoRA on GPT-2: q and v at rank 4 are 2 L 2 d r, 0.39 and 0.74 million, where 0.35 "
            "and 0.77 are printed; the authors' file of the medium model has 1.5 MB, which is 0.39 million floats.",
            "GPT-3 is built with a vocabulary of 50,257 and 2,048 positions. Adapter P, H, D: Pfeiffer, Houlsby, "
            "AdapterDrop; those of Houlsby are counted with frozen norms, as the published counts are.",
            "Scores of SAMSum are R1, R2, R-L. A difference of a point or two in these tables is within what seeds do "
            "(the paper's own intervals for E2E: 0.1 to 0.6 BLEU).",
        ],
    )  # fmt: skip


def _same(table: Published, counts: list[int | None], methods: tuple[str, ...]) -> bool:
    """Whether all counts of these methods are the published ones."""
    found = [
        agrees(count, row.millions)
        for row, count in zip(table.rows, counts, strict=True)
        if row.method in methods and count is not None
    ]
    return all(each in SAME for each in found)


def _counts(table: Published, counts: list[int | None]) -> Table:
    rows = [
        [
            row.method, row.millions, row.spec.partition(", targets=")[0] + "]" * (", targets=" in row.spec)
            if row.spec else "all" if row.spec is None else "",
            "" if count is None else f"{count:,}", "" if count is None else agrees(count, row.millions),
        ]
        for row, count in zip(table.rows, counts, strict=True)
    ]  # fmt: skip
    return [["method", "millions", "ours", "counted here", "agrees"], *rows]


def _scores(table: Published) -> Table:
    rows = [[row.method, *(f"{score:g}" for score in row.scores)] for row in table.rows]
    return [["method", *table.scores], *rows]


def _scatter(axes: Axes, table: Published, rows: Sequence[Row], full: Row, score: int, title: str, unit: str) -> None:
    """The score of each method over its published number of trained parameters, and that of full fine-tuning."""
    for number, name in enumerate(dict.fromkeys(row.method for row in rows)):
        of = sorted((row for row in rows if row.method == name), key=lambda row: float(row.millions))
        axes.plot(
            [float(row.millions) for row in of], [row.scores[score] for row in of], color=LINES[number % len(LINES)],
            marker=MARKERS[number % len(MARKERS)], markersize=6, linewidth=1.2, label=name,
        )  # fmt: skip
    label = f"full, {float(full.millions):,.0f} million"
    axes.axhline(full.scores[score], color="#888888", linewidth=1.0, linestyle="--", label=label)
    axes.set_xscale("log")
    axes.margins(x=0.15, y=0.3)
    low, high = axes.get_xlim()
    ticks = [x for x in (0.1, 0.3, 1, 3, 10, 30) if low <= x <= high]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set(xlabel="trained parameters, millions", ylabel=unit, title=title)
    axes.legend(frameon=False, fontsize=8)
