"""The attention patterns of the lectures, drawn from what the library computes: blockwise permutations, Longformer, and
Reformer in four steps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effzoo.attention import AttentionCore, Context
from effzoo.attention.hashing import buckets_of
from effzoo.lab.analyses.patterns import (
    attention_matrix,
    caught,
    chunk_pairs,
    clusters,
    global_pairs,
    in_order_of,
    same_bucket,
    window_pairs,
    within_reach,
)
from effzoo.lab.draw import panels
from effzoo.lab.experiment import Claim, Findings, Run, Table, experiment
from effzoo.plots import COLOURS, pattern
from effzoo.registry import attention as registry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALL, BLOCKS, WINDOW, DILATION, GLOBALS, CHUNK, DIM = 36, 3, 6, 2, 2, 6, 16
ROUNDS = (1, 2, 4, 8)
STATES = {  # colour and label
    0: (COLOURS[0], "not attended"),
    1: (COLOURS[1], "attended (in a and b: same bucket)"),
    2: (COLOURS[2], "through a global token; in d: same bucket, out of reach"),
    3: ("#9ecae1", "in d: within reach, of another bucket"),
}


@experiment(
    "patterns",
    deck=4,
    source="Qiu et al. 2020, arXiv:1911.02972; Beltagy et al. 2020, figure 2; Kitaev et al. 2020, figure 2",
)
def patterns(run: Run) -> Findings:
    """Which query attends which key, in blockwise attention, Longformer and the four steps of Reformer?"""
    large = run.choose(960, 3840)
    counts = {n: _masked(n) for n in (SMALL, large)}
    exact = all(wanted == counted for kinds in counts.values() for _, wanted, counted, _ in kinds)
    hashed = {str(seed): _hashed(large, seed) for seed in run.seeds}
    run.say(
        ", ".join(f"{r} rounds: {100 * hashed[str(run.seeds[0])]['mass'][str(r)]:.0f} % of attention" for r in ROUNDS)
    )

    head = [
        "pattern",
        *(f"{what}, n = {n}, % of pairs" for n in counts for what in ("predicted", "counted")),
        "published cost",
    ]
    table: Table = [head]
    for rows in zip(*counts.values(), strict=True):
        cells = [f"{100 * pairs / n**2:.2f}" for n, (_, *both, _) in zip(counts, rows, strict=True) for pairs in both]
        table.append([rows[0][0], *cells, rows[0][3]])
    random_directions = _mean(hashed, "same bucket, random directions")
    buckets = 2 * large // _chunk(large)
    expected = f"at least {100 / buckets:.2f}"  # sum over b of p_b^2, which is 1 / buckets when all are equally likely
    table.append(
        ["lsh: same bucket, random directions", "", "", expected, f"{100 * random_directions:.2f}", "no number"]
    )
    rounds: Table = [["rounds", "pairs seen, %", "of full attention, %", "of which in the same bucket, %", "published"]]
    for r in ROUNDS:
        means = [
            100 * sum(facts[what][str(r)] for facts in hashed.values()) / len(hashed)
            for what in ("pairs", "mass", "mass in bucket")
        ]
        rounds.append([f"{r}", *(f"{mean:.1f}" for mean in means), "no number"])

    rising = [
        min(facts["mass"][str(b)] - facts["mass"][str(a)] for a, b in itertools.pairwise(ROUNDS))
        for facts in hashed.values()
    ]
    settings = {
        "n": [SMALL, large], "blocks": BLOCKS, "window": WINDOW, "dilation": DILATION, "globals": GLOBALS,
        "chunk": [_chunk(SMALL), _chunk(large)], "buckets": [2 * SMALL // _chunk(SMALL), buckets],
    }  # fmt: skip
    return Findings(
        tables={"Attended pairs": table, f"What rounds of hashing catch, n = {large}": rounds},
        figure=_figure(run.seeds[0]),
        claims=[
            Claim.law(
                "every masked pattern, and one round of hashing, attends exactly the pairs of its formula", exact
            ),
            Claim.law(
                "what the core of LSH attends is hashing, sorting and chunks, done one after the other",
                tuple(facts["core is the steps"] for facts in hashed.values()),
            ),
            Claim.of_differences(
                "one round of hashing catches a larger share of full attention than of the pairs",
                [facts["mass"]["1"] - facts["pairs"]["1"] for facts in hashed.values()],
            ),
            Claim.of_differences("more rounds catch more of full attention, at every step", rising),
        ],
        values={"pairs": {str(n): [list(row) for row in rows] for n, rows in counts.items()}, "hashing": hashed},
        settings=settings,
        notes=[
            "Everything is counted from what the library computes: declared patterns, equal to the forward pass by the "
            "tests, and for LSH the output of the forward pass where the values are the identity.",
            "Reformer's a: queries and keys of their own. b: both sorted by bucket. c: keys are the queries. d: what "
            "the core attends, sorted: chunks with themselves and the chunk before; no token attends itself there.",
            "Vectors for hashing lie around random directions. `lsh` attends other buckets within its chunks, as "
            "Trax and HF do and the figure of "
            "the paper does not; lsh[within_buckets=true] leaves them out. A seed draws vectors and rotations.",
        ],
    )


def _chunk(n: int) -> int:
    return CHUNK if n == SMALL else n // 15


def _masked(n: int) -> list[tuple[str, int, int, str]]:
    """Name, pairs by formula, pairs counted, published cost."""
    kinds: list[tuple[str, int, Tensor, str]] = [("full", n * n, pattern("full", n), "n^2")]
    for permutation in _permutations():
        kinds.append((f"blockwise {permutation}", n * n // BLOCKS, pattern(_blockwise(permutation), n), "n^2 / blocks"))
    window = {"name": "longformer", "window": WINDOW}
    dilated = window | {"dilation": DILATION}
    with_globals = pattern(window, n, is_global=range(GLOBALS))
    kinds += [
        (f"window {WINDOW}", window_pairs(n, WINDOW), pattern(window, n), "n w"),
        (f"window {WINDOW}, dilation {DILATION}", window_pairs(n, WINDOW, DILATION), pattern(dilated, n), "n w"),
        (f"window {WINDOW}, {GLOBALS} global tokens", global_pairs(n, WINDOW, GLOBALS), with_globals, "n w"),
        (
            "lsh, 1 round",
            chunk_pairs(n, _chunk(n)),
            attention_matrix(_lsh(n), clusters(n, DIM, 6)).gt(0)[0, 0],
            "n log n",
        ),
    ]
    return [(name, wanted, int((pattern > 0).sum()), cost) for name, wanted, pattern, cost in kinds]


def _permutations() -> list[tuple[int, ...]]:
    return [tuple((block + shift) % BLOCKS + 1 for block in range(BLOCKS)) for shift in range(BLOCKS)]


def _blockwise(permutation: Sequence[int]) -> dict[str, Any]:
    return {"name": "blockwise", "blocks": BLOCKS, "permutations": (tuple(permutation),)}


def _lsh(n: int, *, rounds: int = 1, seed: int = 0) -> AttentionCore:
    chunk = _chunk(n)
    spec = {"name": "lsh", "rounds": rounds, "chunk": chunk, "buckets": 2 * n // chunk, "seed": seed}
    core: AttentionCore = registry.create(spec, Context(heads=1, head_dim=DIM, max_length=n))
    return core


def _hashed(n: int, seed: int) -> dict[str, Any]:
    """What hashing rounds see of n vectors and how much of full attention that is, by the number of rounds."""
    core: Any = _lsh(n, rounds=max(ROUNDS), seed=seed)
    x = clusters(n, DIM, n // 16, seed=seed)
    buckets = buckets_of(x, core.rotations, core.factors)
    reach, same = within_reach(buckets, core.chunk), same_bucket(x, x, core.rotations, core.factors)
    other = ~torch.eye(n, dtype=torch.bool)
    draw = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 1, n, DIM, generator=draw) for _ in range(2))
    facts: dict[str, Any] = {
        "same bucket, random directions": float(same_bucket(q, k, core.rotations, core.factors).float().mean())
    }
    facts |= {"pairs": {}, "mass": {}, "mass in bucket": {}, "core is the steps": True}
    for rounds in ROUNDS:
        core.rounds = rounds
        seen = (attention_matrix(core, x) > 0)[0, 0]
        facts["core is the steps"] &= bool((seen == reach[:rounds, 0, 0].any(dim=0) & other).all())
        facts["pairs"][str(rounds)] = float(seen.float().mean())
        facts["mass"][str(rounds)] = float(caught(x, seen).mean())
        facts["mass in bucket"][str(rounds)] = float(caught(x, (reach & same)[:rounds].any(dim=0) & other).mean())
    return facts


def _mean(hashed: Mapping[str, Any], what: str) -> float:
    return sum(facts[what] for facts in hashed.values()) / len(hashed)


def _figure(seed: int) -> Figure:
    n = SMALL
    window = {"name": "longformer", "window": WINDOW}
    blockwise = [pattern(_blockwise(permutation), n) for permutation in _permutations()]
    drawn = [(f"blockwise, permutation {p}", cells) for p, cells in zip(_permutations(), blockwise, strict=True)]
    drawn += [
        ("blockwise, three heads together", torch.stack(blockwise).amax(dim=0)),
        ("full", pattern("full", n)),
        (f"Longformer: window {WINDOW}", pattern(window, n)),
        (f"window {WINDOW}, dilation {DILATION}", pattern(window | {"dilation": DILATION}, n)),
        (f"window {WINDOW}, {GLOBALS} global tokens", pattern(window, n, is_global=range(GLOBALS))),
        *_reformer(seed).items(),
    ]
    figure, every = panels(4, rows=3, width=2.9, height=2.95)
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colours = ListedColormap([colour for colour, _ in STATES.values()])
    for axes, (title, cells) in zip(every, drawn, strict=True):
        axes.imshow(cells.numpy(), cmap=colours, vmin=0, vmax=len(STATES) - 1, interpolation="nearest")
        axes.grid(visible=False)
        axes.set_xticks([x - 0.5 for x in range(n + 1)], minor=True)
        axes.set_yticks([x - 0.5 for x in range(n + 1)], minor=True)
        axes.grid(visible=True, which="minor", color="white", linewidth=0.4)
        axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
        axes.spines[:].set_visible(False)
        axes.set_title(title, fontsize=9)
    for axes in every[::4]:
        axes.set_ylabel("queries", fontsize=9)
    for axes in every[-4:]:
        axes.set_xlabel("keys", fontsize=9)
    handles = [Patch(facecolor=colour, edgecolor="#bbbbbb", label=label) for colour, label in STATES.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _reformer(seed: int) -> dict[str, Tensor]:
    """The four steps, int8[n, n] each, by title."""
    core: Any = _lsh(SMALL, seed=seed)
    q, k = (clusters(SMALL, DIM, 6, seed=2 * seed + one) for one in (0, 1))
    of_q, of_k = (buckets_of(x, core.rotations, core.factors) for x in (q, k))
    separate, shared = (same_bucket(q, x, core.rotations, core.factors) for x in (k, q))
    seen = (attention_matrix(core, q) > 0).expand_as(shared)
    states = torch.where(seen, torch.where(shared, 1, 3), torch.where(shared, 2, 0))
    states = states.masked_fill(torch.eye(SMALL, dtype=torch.bool), 0)
    steps = {
        "Reformer a: as it is": separate,
        "b: sorted by bucket": in_order_of(separate, of_q, of_k),
        "c: sorted, Q = K": in_order_of(shared, of_q, of_q),
        "d: chunks and the one before": in_order_of(states, of_q, of_q),
    }
    return {title: cells[0, 0, 0].to(torch.int8) for title, cells in steps.items()}
