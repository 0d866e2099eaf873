"""Pictures: which query sees which key, as a figure and in the terminal, and learning curves.

matplotlib is imported when a figure is drawn, and used without a display. Colours are those of Okabe & Ito (2008),
which colour-blind readers tell apart.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effzoo.attention.core import AttentionCore, Context, Mask
from effzoo.errors import InputError, OptionError
from effzoo.registry import attention as registry
from effzoo.spec import Spec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOT, ATTENDED, GLOBAL = 0, 1, 2
LABELS = {ATTENDED: "attended", GLOBAL: "through a global token", NOT: "not attended"}
COLOURS = {NOT: "#eeeeee", ATTENDED: "#0072b2", GLOBAL: "#e69f00"}
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "sD^vPX*o"
_MOST_PROBED = 1024

Kind = AttentionCore | str | Mapping[str, Any] | Spec
History = Sequence[Mapping[str, Any]]


def pattern(kind: Kind, n: int = 64, *, is_global: Sequence[int] = (), causal: bool = False) -> Tensor:
    """int8[n, n] of `NOT`, `ATTENDED` and `GLOBAL`: what query i (row) sees of key j (column) in the first head.

    A kind that declares no pattern is probed: with the identity as values its output is the attention matrix itself,
    for random queries and keys.

    kind: a core, or a spec such as "longformer[window=8]".
    is_global: positions of global tokens.
    """
    if n < 1:
        raise OptionError(f"n is at least 1, got {n}")
    core = kind if isinstance(kind, AttentionCore) else _core(kind, n, causal)
    row = torch.zeros(1, n, dtype=torch.bool)
    if outside := [place for place in is_global if not 0 <= place < n]:
        raise OptionError(f"global positions are in [0, {n}), got {outside}")
    row[0, list(is_global)] = True
    mask = Mask(is_global=row if is_global else None)
    core.check(mask)
    declared = type(core).pattern is not AttentionCore.pattern
    allowed = core.pattern(n, mask).expand(1, -1, n, n)[0, 0].cpu() if declared else _probe(core, n, mask)
    return allowed.to(torch.int8) * (1 + (row | row.T).to(torch.int8))


def pattern_text(
    kind: Kind,
    n: int = 64,
    *,
    is_global: Sequence[int] = (),
    causal: bool = False,
    width: int = 64,
    colour: bool = False,
) -> str:
    """The pattern for a terminal: a character is one key wide and two queries high; `colour` adds ANSI colours.

    More than `width` positions are drawn as blocks of tokens, coloured when any pair in them is attended.
    """
    cells, block = _blocks(pattern(kind, n, is_global=is_global, causal=causal), width)
    if len(cells) % 2:
        cells = torch.nn.functional.pad(cells, (0, 0, 0, 1))
    lines = []
    for upper, lower in zip(cells[::2].tolist(), cells[1::2].tolist(), strict=True):
        pairs = list(zip(upper, lower, strict=True))
        if colour:
            lines.append("".join(f"{_ansi(38, a)}{_ansi(48, b)}▀" for a, b in pairs) + "\x1b[0m")
        else:
            lines.append("".join(" ▀▄█"[(a != NOT) + 2 * (b != NOT)] for a, b in pairs))
    shown = [state for state in LABELS if state != NOT and (cells == state).any()]
    key = [f"{_ansi(38, state)}█\x1b[0m {LABELS[state]}" if colour else f"█ {LABELS[state]}" for state in shown]
    if not colour:
        key = ["█ attended"]
    size = f"{n} queries (down) x {n} keys (across)" + (f", a cell is {block} x {block} tokens" if block > 1 else "")
    return "\n".join([*lines, f"{size}   {'  '.join(key)}"])


def pattern_figure(
    kind: Kind, n: int = 64, *, is_global: Sequence[int] = (), causal: bool = False, title: str | None = None
) -> Figure:
    """A figure of the pattern: queries down, keys across, a colour for each of the three states.

    More than 128 positions are drawn as blocks, coloured when any pair in them is attended; the legend counts pairs.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    cells = pattern(kind, n, is_global=is_global, causal=causal)
    figure = Figure(figsize=(4.6, 5.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    drawn, block = _blocks(cells, 128)
    edge = len(drawn) * block - 0.5
    colours = ListedColormap([COLOURS[NOT], COLOURS[ATTENDED], COLOURS[GLOBAL]])
    axes.imshow(drawn.numpy(), cmap=colours, vmin=0, vmax=2, interpolation="nearest", extent=(-0.5, edge, edge, -0.5))
    axes.set(xlabel="key position", ylabel="query position", title=title or _title(kind, causal))
    if n <= 64:
        axes.set_xticks([x - 0.5 for x in range(n + 1)], minor=True)
        axes.set_yticks([x - 0.5 for x in range(n + 1)], minor=True)
        axes.grid(which="minor", color="white", linewidth=0.4 if n > 32 else 0.8)
        axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    shares = {state: float((cells == state).float().mean()) for state in LABELS}
    handles = [
        Patch(facecolor=COLOURS[s], edgecolor="#bbbbbb", label=f"{LABELS[s]} ({_percent(shares[s])})")
        for s in LABELS
        if shares[s]
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(2, len(handles)), frameon=False, fontsize=9)
    return figure


def learning_curves(
    history: History | Mapping[str, History], *, title: str | None = None, metric: str | None = None
) -> Figure:
    """Loss (and, beside it, a validation metric) over optimizer steps, for one run or for several by name.

    history: entries with `step` and any of `loss`, `eval_loss`, `eval_<metric>`, as `Result.history` and
        transformers' `log_history` are.
    metric: without `eval_`; default accuracy, or else the first one found.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    runs: Mapping[str, History] = history if isinstance(history, Mapping) else {"": history}
    keys = list(dict.fromkeys(key for entries in runs.values() for entry in entries for key in entry))
    if "step" not in keys or not {"loss", "eval_loss"} & set(keys):
        raise InputError(
            "a history is a list of entries with 'step' and 'loss' or 'eval_loss', got the keys "
            f"{', '.join(keys) or '(none)'}"
        )
    chosen = _metric(keys, metric)
    figure = Figure(figsize=(9.0 if chosen else 5.0, 3.8), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12))
    panels = figure.subplots(1, 2 if chosen else 1, squeeze=False, sharex=True)[0]
    looks = zip(itertools.cycle(LINES), itertools.cycle(MARKERS), strict=True)
    for (name, entries), (colour, marker) in zip(runs.items(), looks, strict=False):
        prefix, marked = f"{name}, " if name else "", {"color": colour, "marker": marker, "linewidth": 1.8}
        dots = {"marker": "."} if len(entries) <= 20 else {}
        _line(panels[0], entries, "loss", f"{prefix}training", color=colour, alpha=0.65, linewidth=1.3, **dots)
        _line(panels[0], entries, "eval_loss", f"{prefix}validation", linestyle="--", **marked)
        if chosen:
            _line(panels[1], entries, f"eval_{chosen}", name or "validation", **marked)
    for axes, label in zip(panels, ("loss", f"validation {chosen}"), strict=False):
        axes.set(xlabel="optimizer step", ylabel=label)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.03)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(panels[0].get_lines()) > 1:  # below, where it covers no line; the second panel has the colours of the first
        figure.legend(handles=panels[0].get_lines(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    panels[0].set_ylim(0, 1.08 * max(panels[0].dataLim.y1, 1e-9))
    if chosen == "accuracy":  # a share: room around small differences, none above 1
        logged = [entry for entries in runs.values() for entry in entries]
        lowest = min(entry["eval_accuracy"] for entry in logged if "eval_accuracy" in entry)
        panels[1].set_ylim(max(0.0, lowest - 0.1), 1.02)
    if title:
        figure.suptitle(title)
    return figure


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _core(kind: str | Mapping[str, Any] | Spec, n: int, causal: bool) -> AttentionCore:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        core: AttentionCore = registry.create(kind, Context(heads=1, head_dim=16, causal=causal, max_length=max(n, 16)))
    return core.eval()


@torch.no_grad()
def _probe(core: AttentionCore, n: int, mask: Mask) -> Tensor:
    """The keys that reach each query, with columns of the identity as values, as many at a time as a head holds."""
    if n > _MOST_PROBED:
        raise OptionError(
            f"attention {core.name!r} declares no pattern, so it is probed, up to n = {_MOST_PROBED}; got n = {n}"
        )
    heads, width = core.context.heads, core.context.head_dim
    dtype = next((p.dtype for p in core.parameters()), torch.float32)
    draw, used, eye = torch.Generator().manual_seed(0), core.uses(mask), torch.eye(n, dtype=dtype)
    drawn = {name: torch.randn(1, heads, n, width, generator=draw).to(dtype) for name in core.projections}
    columns = []
    for chunk in torch.split(torch.nn.functional.pad(eye, (0, -n % width)), width, dim=1):
        values = {name: chunk.expand(1, heads, n, width) for name, side in core.projections.items() if side == "value"}
        inputs = [x if name in used else None for name, x in (drawn | values).items()]
        columns.append(core(*inputs, mask=mask)[0, 0])
    weights = torch.cat(columns, dim=1)[:, :n]
    return weights.abs() > 1e-6 * weights.abs().amax()


def _blocks(cells: Tensor, width: int) -> tuple[Tensor, int]:
    """The cells pooled into at most `width` blocks, and how many tokens a block is wide."""
    if width < 1:
        raise OptionError(f"width is at least 1, got {width}")
    block = -(-len(cells) // width)
    if block == 1:
        return cells, 1
    pooled = torch.nn.functional.max_pool2d(cells[None].float(), block, ceil_mode=True)[0]
    return pooled.to(torch.int8), block


def _ansi(ground: int, state: int) -> str:
    red, green, blue = (int(COLOURS[state][i : i + 2], 16) for i in (1, 3, 5))
    return f"\x1b[{ground};2;{red};{green};{blue}m"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"


def _title(kind: Kind, causal: bool) -> str:
    name = kind.name if isinstance(kind, AttentionCore) else kind["name"] if isinstance(kind, Mapping) else str(kind)
    return f"{name}, causal" if causal or (isinstance(kind, AttentionCore) and kind.context.causal) else str(name)


def _metric(keys: Sequence[str], given: str | None) -> str | None:
    """The validation metric of the second panel, None when there is none."""
    skipped = ("eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    names = [key.removeprefix("eval_") for key in keys if key.startswith("eval_") and key not in skipped]
    if given is not None and given not in names:
        raise InputError(f"no entry has 'eval_{given}'; the metrics of this history are {', '.join(names) or '(none)'}")
    return given or ("accuracy" if "accuracy" in names else next(iter(names), None))


def _line(axes: Axes, entries: History, key: str, label: str, **style: Any) -> None:
    points = [(entry["step"], entry[key]) for entry in entries if key in entry]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, markersize=5, **style)
