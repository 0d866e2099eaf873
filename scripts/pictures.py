"""Draw the pictures of README and documentation from the code that runs: python scripts/pictures.py. A test holds the
two in step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from effzoo import attention, plots
from effzoo.writing import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = Path(__file__).parent.parent / "docs/pictures"
N = 48  # positions of the drawn masks
KINDS = {  # options small enough for N positions, and which positions are global
    "full": ("full", ()),
    "blockwise": ("blockwise[blocks=3]", ()),
    "longformer": ("longformer[window=8]", (0, 20)),
    "local": ("local[chunk=8]", ()),
    "streaming": ("streaming[window=8, sinks=3]", ()),
    "bigbird": ("bigbird[block=4, random=1]", ()),
    "dilated": ("dilated[segments=(8, 16, 48), dilations=(1, 2, 4)]", ()),
    "lsh": ("lsh[rounds=1, chunk=8, buckets=6]", ()),
    "linformer": ("linformer[k=8]", ()),
    "perceiver": ("perceiver[latents=8]", ()),
    "nystromformer": ("nystromformer[landmarks=8]", ()),
    "linear": ("linear", ()),
    "performer": ("performer", ()),
}
# which no mask over the keys shows
MIXED = {
    "linformer": "mixtures of all keys",
    "perceiver": "latents that have read all",
    "nystromformer": "landmarks, means of segments",
}
INK, PALE, GREY = "#222222", "#eeeeee", "#888888"
BLUE, ORANGE, GREEN, PINK = "#0072b2", "#e69f00", "#009e73", "#cc79a7"


def masks() -> Figure:
    """Which keys a query sees under each kind, computed by the kind itself."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    kinds = attention_kinds()
    rows = len(kinds) // 4 + 1  # with room for the key
    figure = Figure(figsize=(11.2, 3.3 * rows), dpi=130)
    around = {"left": 0.01, "right": 0.99, "top": 1 - 0.1 / rows, "bottom": 0.12 / rows, "wspace": 0.08}
    panels = list(figure.subplots(rows, 4, gridspec_kw=around).flat)
    for axes, name in zip(panels, kinds, strict=False):
        mask(axes, name)
    for axes in panels[len(kinds) :]:
        bare(axes)
    key = panels[len(kinds)]
    key.text(
        0.04,
        0.86,
        f"rows are queries, columns are keys;\n{N} positions, the first head",
        va="top",
        fontsize=10,
        transform=key.transAxes,
    )
    legend = [
        Patch(facecolor=plots.COLOURS[state], edgecolor="#bbbbbb", label=plots.LABELS[state]) for state in plots.LABELS
    ]
    key.legend(handles=legend, loc="center left", frameon=False, fontsize=10, bbox_to_anchor=(0.0, 0.45))
    return figure


def mask(axes: Axes, name: str) -> None:
    """One kind: its mask, or, where queries meet mixtures of keys, which and how many there are."""
    from matplotlib.colors import ListedColormap

    spec, places = KINDS[name]
    cells = plots.pattern(spec, N, is_global=places)
    below = f"cost {attention.get(name).cost}"
    if name in MIXED:
        cells = cells[:, : N // 6]
        below = f"{N // 6} {MIXED[name]}"
    colours = ListedColormap([plots.COLOURS[state] for state in sorted(plots.COLOURS)])
    axes.imshow(cells.numpy(), cmap=colours, vmin=0, vmax=2, interpolation="nearest")
    axes.set_xlim(-0.5, N - 0.5)
    # a longer title would run into those beside it
    axes.set_title(spec if len(spec) < 34 else spec.replace("), ", "),\n"), fontsize=9, family="monospace")
    axes.set_xlabel(below, fontsize=9, color=GREY)
    bare(axes)


def attention_kinds() -> list[str]:
    """The registered kinds, in the order in which they are drawn. A kind without options for the picture is an
    error."""
    missing = set(attention.names()) - KINDS.keys()
    if missing:
        raise SystemExit(f"pictures.KINDS has no options for {', '.join(sorted(missing))}")
    return [name for name in KINDS if name in attention.names()]


def kind(name: str) -> Callable[[], Figure]:
    """The picture of one kind alone."""

    def drawn() -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(2.9, 3.2), dpi=130)
        mask(figure.add_axes((0.02, 0.08, 0.96, 0.84)), name)
        return figure

    return drawn


def softmax() -> Figure:
    """One softmax of a query, computed in parts and merged."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.0), dpi=130)
    axes = figure.add_axes((0, 0, 1, 1))
    canvas(axes, 100, 40)
    parts = [("global keys", 4, ORANGE), ("the window around i", 9, BLUE), ("memory of a prefix", 3, PINK)]
    axes.text(3, 37, "the keys that query i sees, cut into parts", fontsize=11, color=INK)
    left = 3.0
    gap = (94 - 4.4 * sum(count for _, count, _ in parts)) / 2
    for number, (label, count, colour) in enumerate(parts, 1):
        width = 4.4 * count
        for cell in range(count):
            box(axes, left + 4.4 * cell, 29, 3.9, 4.4, colour)
        axes.text(left + (width - 0.5) / 2, 26.2, label, ha="center", fontsize=10, color=INK)
        arrow(axes, (left + (width - 0.5) / 2, 25.2), (left + (width - 0.5) / 2, 21.2))
        middle = left + (width - 0.5) / 2
        axes.text(middle, 17.9, rf"$o_{number},\ \ell_{number}$", ha="center", fontsize=14, color=colour)
        arrow(axes, (middle, 16.4), (50 + (middle - 50) * 0.35, 12.2))
        left += width + gap
    axes.text(
        50,
        7.6,
        r"$\ell = \log\sum_p e^{\ell_p}\qquad\qquad o_i = \sum_p e^{\ell_p-\ell}\,o_p$",
        ha="center",
        fontsize=15,
        color=INK,
    )
    axes.text(
        50, 1.6,
        "$o_p$ is the softmax over part $p$ alone, $\\ell_p$ the log of its sum of exponentials; $o_i$ is exactly "
        "the softmax over all keys",
        ha="center", fontsize=10, color=GREY,
    )  # fmt: skip
    return figure


def compositions() -> Figure:
    """The three ways in which a fine-tuning method enters a layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.6, 3.9), dpi=130)
    axes = figure.add_axes((0, 0, 1, 1))
    canvas(axes, 106, 39)
    shown = [
        ("parameter", r"$f_{\theta+\phi}(x)$", "LoRA, BitFit, sparse masks", BLUE),
        ("input", r"$f_\theta([\phi, x])$", "prompts, prefixes", ORANGE),
        ("function", r"$\phi(f_\theta(x))$", "adapters, (IA)³", GREEN),
    ]
    for number, (name, formula, examples, colour) in enumerate(shown):
        x = 3 + 35 * number
        axes.text(x + 15, 36, f"{name} composition", ha="center", fontsize=12, color=INK)
        axes.text(x + 15, 5.2, formula, ha="center", fontsize=15, color=INK)
        axes.text(x + 15, 1.2, examples, ha="center", fontsize=10, color=GREY)
        box(axes, x + 9, 15, 12, 9, PALE, "frozen layer $\\theta$")
        arrow(axes, (x + 15, 10), (x + 15, 14.6))
        axes.text(x + 15, 8.4, "x", ha="center", fontsize=11, color=INK)
        if name == "parameter":
            box(axes, x + 23, 16.5, 6, 6, colour, "$\\phi$", "white")
            arrow(axes, (x + 22.8, 19.5), (x + 21.2, 19.5))
            arrow(axes, (x + 15, 24.4), (x + 15, 33.5))
        elif name == "input":
            box(axes, x + 2, 8.2, 6, 4, colour, "$\\phi$", "white")
            arrow(axes, (x + 6.6, 12.4), (x + 10.5, 14.7))
            arrow(axes, (x + 15, 24.4), (x + 15, 33.5))
        else:
            box(axes, x + 11, 26.5, 8, 4.4, colour, "$\\phi$", "white")
            arrow(axes, (x + 15, 24.4), (x + 15, 26.2))
            arrow(axes, (x + 15, 31.2), (x + 15, 33.9))
    return figure


def house() -> Figure:
    """The packages by floors: each imports from those below it."""
    from matplotlib.figure import Figure

    floors = [
        (
            "use",
            [
                ("command line", BLUE),
                ("lab", BLUE),
                ("measure", BLUE),
                ("checks", BLUE),
                ("plan", BLUE),
                ("train", BLUE),
            ],
        ),
        (
            "models",
            [
                ("build", GREEN),
                ("swap", GREEN),
                ("generate", GREEN),
                ("quantise", GREEN),
                ("convert", GREEN),
                ("zoo", GREEN),
            ],
        ),
        (
            "networks",
            [
                ("architectures: Transformer, Perceiver", GREEN),
                ("blocks: attention layer, feed-forward, experts", GREEN),
            ],
        ),
        ("plugs", [("attention kinds", ORANGE), ("fine-tuning methods", PINK)]),
        ("sockets", [("sites: every weight a place to hang on", GREY), ("routers", GREY)]),
        ("ground", [("registry: (kind, name) to class", GREY), ("specs such as lora[rank=4]", GREY), ("errors", GREY)]),
    ]
    figure = Figure(figsize=(10, 4.9), dpi=130)
    axes = figure.add_axes((0, 0, 1, 1))
    canvas(axes, 100, 49)
    for number, (floor, rooms) in enumerate(floors):
        y = 41 - 8 * number
        axes.text(14, y + 3, floor, ha="right", va="center", fontsize=10.5, color=GREY)
        share = 82 / len(rooms)
        for place, (room, colour) in enumerate(rooms):
            box(axes, 16 + share * place, y, share - 1, 6, colour, room, "white")
    arrow(axes, (5, 40), (5, 8))
    axes.text(2.6, 24, "imports", rotation=90, ha="center", va="center", fontsize=10, color=GREY)
    return figure


def canvas(axes: Axes, width: float, height: float) -> None:
    """Axes that are a sheet of this size."""
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")


def bare(axes: Axes) -> None:
    """No ticks and no frame."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def box(
    axes: Axes, x: float, y: float, width: float, height: float, colour: str, label: str = "", ink: str = INK
) -> None:
    """A rounded box with a label."""
    from matplotlib.patches import FancyBboxPatch

    axes.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.6", facecolor=colour, edgecolor="none"
        )
    )
    axes.text(x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=10, color=ink)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate(
        "", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    )


def pictures() -> dict[str, Callable[[], Figure]]:
    """Every picture, by the name of its file."""
    return {
        "masks": masks,
        "softmax": softmax,
        "compositions": compositions,
        "house": house,
        **{f"kind-{name}": kind(name) for name in attention_kinds()},
    }


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures().items():
        replace_file(FOLDER / f"{name}.png", plots.png_bytes(draw()))
