from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from effzoo.course.assignments.a13_subspace.harness import accuracy, trained
from effzoo.course.assignments.a13_subspace.tasks import SHARE, SIZE, Net, explicit, smallest
from scripts.pictures import BLUE, GREEN, GREY, INK, ORANGE, PALE, PINK, box, canvas

SIZES = [1, 2, 4, 8, 16, 32, 64]


def draw() -> Figure:
    """The rounds of sums and differences for n = 8; the five factors; d90 of a small network."""
    figure = Figure(figsize=(7.6, 2.8), dpi=110)
    butterfly(figure.add_axes((0.02, 0.12, 0.25, 0.72)))
    factors(figure.add_axes((0.3, 0.12, 0.29, 0.72)))
    curve(figure.add_axes((0.675, 0.19, 0.3, 0.65)))
    return figure


def butterfly(axes: Axes) -> None:
    """Which entries meet in which round: lines to sums are blue, to differences orange where negative."""
    axes.axis("off")
    axes.set_title("H x in 3 rounds, n = 8", fontsize=10, color=INK)
    for round_, step in enumerate((1, 2, 4)):
        for i in range(8):
            low, high = i & ~step, i | step
            for source in (low, high):
                minus = bool(i & step) and source == high
                axes.plot([round_, round_ + 1], [-source, -i], color=ORANGE if minus else BLUE, linewidth=1.1)
        axes.text(round_ + 0.5, -8.0, f"{step} apart", fontsize=9, ha="center", va="top", color=GREY)
    axes.scatter(
        [x for x in range(4) for _ in range(8)], [-i for _ in range(4) for i in range(8)], s=14, color=INK, zorder=3
    )
    axes.set_ylim(-9, 0.6)


def factors(axes: Axes) -> None:
    canvas(axes, 60, 40)
    axes.set_title(r"$P\,\theta = \frac{1}{n} H G \Pi H B\,\theta$", fontsize=11, color=INK)
    for number, (name, colour, said) in enumerate((
        ("$B$", ORANGE, "signs, on θ and zeros"), ("$H$", BLUE, "n log n sums"), (r"$\Pi$", GREEN, "a permutation"),
        ("$G$", PINK, "normal numbers"), ("$H$", BLUE, "n log n sums"), ("", PALE, "the first D entries, / n"),
    )):  # fmt: skip
        y = 32 - 6.3 * number
        box(axes, 2, y, 9, 5, colour, name, "white")
        axes.text(14, y + 2.5, said, fontsize=9, va="center", color=INK)


def curve(axes: Axes) -> None:
    """Accuracy of the network of the assignment in subspaces of growing d."""
    given = Net().calls(9)[0].given
    start, x, labels = (given[name] for name in ("start", "x", "labels"))
    drawn = {name: given[name] for name in ("signs", "order", "gauss")}
    found = {}
    for d in SIZES:
        theta = trained(lambda t: start + explicit(t, **drawn, size=SIZE), start.new_zeros(d), x, labels)
        found[d] = accuracy(start + explicit(theta, **drawn, size=SIZE), x, labels)
    line, d90 = SHARE * given["baseline"], smallest(found, given["baseline"], SHARE)
    axes.plot(list(found), list(found.values()), "o-", color=BLUE, markersize=4, linewidth=1.6)
    axes.axhline(line, color=GREY, linewidth=0.9, linestyle=":")
    axes.text(1, line + 0.015, "90 % of the baseline", fontsize=9, color=GREY, va="bottom")
    if d90 is not None:
        axes.plot([d90, d90], [0.2, found[d90]], color=ORANGE, linewidth=1.4, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set(xticks=SIZES, xticklabels=[str(d) for d in SIZES], ylim=(0.2, 1.05), yticks=[0.25, 0.5, 0.75, 1.0])
    axes.tick_params(colors=GREY, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.set_title(f"accuracy over d; d90 = {d90} of {SIZE}", fontsize=10, color=INK)
    axes.set_xlabel("d", fontsize=9, color=GREY)
