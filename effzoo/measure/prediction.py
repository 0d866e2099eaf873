"""What one attention layer should take by its arithmetic: operations and bytes over a card's rates.

    device = sum over steps of max(operations / rate, bytes / bandwidth),    host = launches * seconds of one launch,
    predicted = max(device, host)

as the host goes on while the device works. A step is a product with a weight, an attention, or a gathering; each reads
what it is given and writes what it gives once. It is a lower bound where the card reaches its peak rates, which no
kernel does. Left out: how far a kernel stays below the peak (attention more than a product), pairs that a tile computes
and masks, the softmax itself, norms, biases and dropout, sorting beyond one pass over its keys, what caches hold, and
what autograd adds of its own.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from effzoo.attention import Context, Mask, PredicateAttention, create
from effzoo.attention.features import FeatureAttention
from effzoo.attention.linformer import Linformer
from effzoo.attention.lsh import LSH
from effzoo.attention.nystromformer import Nystromformer
from effzoo.attention.perceiver import Perceiver
from effzoo.attention.performer import Performer
from effzoo.measure import cards
from effzoo.measure.cards import Card
from effzoo.measure.layer import DTYPES, Case, supported
from effzoo.measure.pairs import pairs
from effzoo.measure.timing import once

ROWS = 64  # queries on which pairs are counted
BACKWARD = 2.5  # operations of attention backward, in times of forward: five products for two
EXACT = 4  # bytes of the numbers in which sums over features are kept
# width of the products and numbers of the copies that `calibrated` times
PROBES = {"cuda": (8192, 2**28), "cpu": (512, 2**22)}
COUNTED = 2048  # up to this length launches are counted; beyond it the line through the last two counts goes on


@dataclass(frozen=True)
class Step:
    """Operations (a product and a sum are two) and bytes of one step, and how often it runs."""

    name: str
    operations: float
    bytes: float
    times: float = 1


@dataclass(frozen=True)
class Predicted:
    """Operations and bytes in all, launches, and the seconds of the device and of the host."""

    operations: float
    bytes: float
    launches: int
    device_seconds: float
    host_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.device_seconds, self.host_seconds)

    def row(self) -> dict[str, Any]:
        """As a part of a row of results."""
        return asdict(self) | {"seconds": self.seconds}


def predict(case: Case, card: Card, launches: int = 0) -> Predicted | None:
    """The prediction for a layer on a card; None for kinds that are neither a predicate nor one of ours."""
    parts = steps(case)
    if parts is None:
        return None
    rate = card.rate(case.dtype)
    device = sum(step.times * max(step.operations / rate, step.bytes / card.bandwidth) for step in parts)
    operations, moved = (sum(step.times * getattr(step, name) for step in parts) for name in ("operations", "bytes"))
    return Predicted(operations, moved, launches, device, launches * card.launch)


def predict_step(
    layer: Case, card: Card, *, layers: int, causal: bool, matrices: int, trained: int, trainable: int, saved: int
) -> Predicted | None:
    """The prediction for a training step of a model of such layers, by AdamW; None for kinds that are not known.

    matrices: numbers in the matrices that tokens are multiplied with; trained: those of them that are trained;
        trainable: all that is trained;
    saved: bytes that autograd keeps, which are written once and read once. A frozen matrix costs a product forward and
        one backward, a trained one a third. Embeddings are rows that are read, the vocabulary is not multiplied, and
        below the lowest adapter nothing is cut off.
    """
    of_layer = steps(layer)
    if of_layer is None:
        return None
    tokens, rate, size = layer.batch * layer.n, card.rate(layer.dtype), DTYPES[layer.dtype].itemsize
    parts = [
        Step("products", 2 * tokens * (2 * matrices + trained), 2 * saved + 3 * size * matrices),
        Step("optimizer", 0, 28 * trainable),  # reads weight, gradient and two states, writes weight and states
        *(
            replace(s, operations=s.operations / (1 + causal), times=layers * s.times)
            for s in of_layer
            if not s.name.startswith("project")
        ),
    ]
    device = sum(s.times * max(s.operations / rate, s.bytes / card.bandwidth) for s in parts)
    return Predicted(sum(s.times * s.operations for s in parts), sum(s.times * s.bytes for s in parts), 0, device, 0.0)


def steps(case: Case) -> list[Step] | None:
    """The steps of one pass; None for kinds that are not known."""
    size, B, n, d = DTYPES[case.dtype].itemsize, case.batch, case.n, case.dim
    if case.mode == "decode":
        return _decoding(case, size)
    core = _core(case.attention, case.n, False)
    forward = [
        _product(
            "project q, k, v" if not isinstance(core, LSH) else "project qk, v",
            B * n,
            d,
            d,
            size,
            len(core.uses(Mask())),
        )
    ]
    if isinstance(core, LSH):
        rounds, factors = core.rounds, sum(core.factors)
        attended = [Step("attention", 4 * B * d * _pairs(case.attention, n, False), 4 * size * B * n * d * rounds)]
        gathered = [
            Step("hash", B * n * d * rounds * factors, size * B * n * d + 4 * B * n * case.heads * rounds * factors),
            Step("sort", 0, 2 * 16 * B * case.heads * n * rounds),
            Step("gather and put back", 0, 8 * size * B * n * d * rounds),
        ]
    elif isinstance(core, Linformer):
        k = core.k
        forward = [
            _product("project q", B * n, d, d, size, 1),
            Step("compress", 2 * B * k * n * d, size * (B * (n + k) * d + k * n), 2),
            _product("project k, v", B * k, d, d, size, 2),
        ]  # fmt: skip
        attended, gathered = [Step("attention", 4 * B * d * n * k, size * B * d * 2 * (n + k))], []
    elif isinstance(core, Perceiver):
        m = core.latents.num_embeddings
        attended = [
            Step("summarise", 6 * B * d * n * m, size * B * d * (4 * n + 3 * m)),
            Step("read", 4 * B * d * n * m, size * B * d * 2 * (n + m))
        ]  # fmt: skip
        gathered = []
    elif isinstance(core, Nystromformer):
        m, gathered = min(core.landmarks or n, n), []
        softmaxes = 1 if core.landmarks is None else 2
        attended = [Step("attention", 4 * B * d * n * m, 2 * size * B * n * d, softmaxes)]
        if core.landmarks is not None:
            gathered = [
                Step("segments", 2 * B * d * n * m, size * B * (n * (d + m) + m * d), 2),
                Step("inverse", 2 * B * m * m * (2 * d + 4 * core.iterations * m * case.heads), EXACT * B * m * d),
            ]
        if core.conv is not None:
            gathered.append(Step("convolve", 2 * B * n * d * core.conv.in_features, 2 * size * B * n * d))
    elif isinstance(core, FeatureAttention):
        phi = case.heads * _features(case.attention, d // case.heads)
        attended, gathered = [_sums(case, B * n, EXACT * B * n * (4 * phi + 4 * d))], []
        if isinstance(core, Performer):
            gathered = [Step("features", 2 * B * n * phi * d / case.heads, EXACT * B * n * (d + phi), 2)]
    elif isinstance(core, PredicateAttention):
        attended, gathered = [Step("attention", 4 * B * d * _pairs(case.attention, n, False), 4 * size * B * n * d)], []
    else:
        return None
    forward.append(_product("project out", B * n, d, d, size, 1))
    parts = [*forward, *gathered, *attended]
    if case.mode == "train":
        parts += [
            replace(step, name=f"{step.name}, backward", times=2 * step.times)
            for step in [*forward, *gathered]
            if step.name != "hash"
        ]
        parts += [Step(f"{step.name}, backward", BACKWARD * step.operations, 2 * step.bytes) for step in attended]
    return parts


def _decoding(case: Case, size: int) -> list[Step] | None:
    """One token of every sequence: weights and cache are read."""
    core = _core(case.attention, case.n, True)
    B, d, n = case.batch, case.dim, case.n
    if isinstance(core, LSH):
        read, kept = n, n * (size * 2 * d + 8 * case.heads * core.rounds)
    elif isinstance(core, PredicateAttention):
        key = torch.arange(n)
        seen = core.allowed(key[None, None, -1:, None], key[None, None, None, :], Mask(), places=n).any(dim=1).flatten()
        columns = core.columns(Mask(), n, key.device)
        beside = key[:0] if columns is None else columns.positions[0, columns.seen[0, 0, -1]]
        seen = seen.index_fill(0, beside, False)
        read = n - int(seen.int().argmax()) + len(beside)
        kept = read * size * 2 * d
    elif isinstance(core, FeatureAttention):
        kept = EXACT * _features(case.attention, d // case.heads) * (d + case.heads)
        return [
            _product("projections", B, d, d, size, len(core.uses(Mask())) + 1),
            _sums(case, B, 2 * B * kept),  # which is read and written
        ]
    else:
        return None
    return [
        _product("projections", B, d, d, size, len(core.uses(Mask())) + 1),
        Step("attention", 4 * B * d * read, B * kept),
    ]


@functools.cache
def _features(kind: str, width: int) -> int:
    """The features of a kind in heads of this width."""
    features: int = create(kind, Context(heads=1, head_dim=width)).features
    return features


def _sums(case: Case, tokens: int, bytes_moved: float) -> Step:
    """phi(k) [v, 1]^T, and phi(q) times it."""
    width = case.dim // case.heads
    return Step("attention", 4 * tokens * case.heads * _features(case.attention, width) * (width + 1), bytes_moved)


def _product(name: str, rows: int, inputs: int, outputs: int, size: int, times: int) -> Step:
    """Rows times a weight."""
    return Step(name, 2 * rows * inputs * outputs, size * (rows * (inputs + outputs) + inputs * outputs), times)


@functools.cache
def _core(kind: str, n: int, causal: bool) -> Any:
    return create(kind, Context(heads=4, head_dim=8, causal=causal, max_length=max(n, 16)))


@functools.cache
def _pairs(kind: str, n: int, causal: bool) -> float:
    return pairs(_core(kind, n, causal), n, ROWS)


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators that compute: no views, and nothing that only reserves memory. What Triton launches by itself is
    not seen."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        view = any(output.alias_info is not None and not output.alias_info.is_write for output in func._schema.returns)
        self.count += not view and "empty" not in func._schema.name
        return func(*args, **(kwargs or {}))


def launched(run: Callable[[], object]) -> int:
    """The operators that one call launches."""
    with Launches() as counter:
        run()
    return counter.count


@functools.cache
def launches(kind: str, mode: str, n: int, heads: int) -> int:
    """Those of a layer on the CPU, at a small width: without a GPU the nearest that can be counted."""

    def at(length: int) -> int:
        run = Case(kind, mode, length, 8 * heads, heads).runner()  # type: ignore[arg-type]
        run()
        return launched(run)

    if n <= COUNTED:
        return at(n)
    half, whole = (launches(kind, mode, length, heads) for length in (COUNTED // 2, COUNTED))
    return round(whole + (whole - half) * (n - COUNTED) / (COUNTED - COUNTED // 2))


def against_full(
    kinds: Sequence[str],
    modes: Sequence[str],
    lengths: Sequence[int],
    case: Callable[[str, str, int], Case],
    card: Card,
) -> list[dict[str, Any]]:
    """A row for each kind, mode and length, with the prediction and its ratio to that of full attention."""
    rows = []
    for mode in modes:
        for n in lengths:
            of_full = predict(case("full", mode, n), card, launches("full", mode, n, case("full", mode, n).heads))
            assert of_full is not None
            for kind in kinds:
                one = case(kind, mode, n)
                if supported(one):
                    continue
                made = predict(one, card, launches(kind, mode, n, one.heads))
                if made is not None:
                    rows.append(
                        {"card": card.name, **asdict(one), **made.row(), "ratio": made.seconds / of_full.seconds}
                    )
    return rows


def calibrated(device: str = "cpu") -> Card:
    """The rates that a device reaches in large products, in copies and in tiny operators: a second or two."""
    width, room = PROBES[torch.device(device).type]

    def product(dtype: torch.dtype) -> float:
        a = torch.randn(width, width, device=device).to(dtype)
        return 2 * width**3 / _best(lambda: a @ a, device)

    source = torch.empty(room, device=device)
    target, tiny = torch.empty_like(source), torch.zeros(8, device=device)

    def many() -> None:
        for _ in range(1000):
            tiny.add_(1)

    copy = _best(lambda: target.copy_(source), device)
    name = f"{cards.machine(device)}, measured"
    return Card(
        name,
        product(torch.bfloat16),
        product(torch.float32),
        8 * room / copy,
        _best(many, device) / 1000,
        "measured by effzoo here",
    )


def _best(run: Callable[[], object], device: str) -> float:
    run()
    started, times = time.perf_counter(), [once(run, device)]
    while len(times) < 10 and time.perf_counter() - started < 0.3:
        times.append(once(run, device))
    return min(times)


@functools.cache
def of_device(device: str) -> Card:
    """The card by its name, or, for devices that are not in the table, what `calibrated` measures."""
    if torch.device(device).type == "cuda":
        for known, entry in cards.CARDS.items():
            if known in cards.machine(device):
                return entry
    return calibrated(device)


def compared(case: Case, seconds: float) -> dict[str, Any]:
    """The prediction for a measured time, and its share of it; on a GPU with the launches of another pass."""
    count = launched(case.runner()) if torch.device(case.device).type == "cuda" else 0
    made = predict(case, of_device(case.device), count)
    return {} if made is None else {"predicted": made.row(), "roofline": made.device_seconds / seconds}


def crossover(rows: Sequence[Mapping[str, Any]], kind: str, mode: str) -> int | None:
    """The shortest of the lengths from which on the kind is predicted to be faster than full attention at every one;
    None: nowhere."""
    shortest = None
    for row in sorted(
        (row for row in rows if (row["attention"], row["mode"]) == (kind, mode)), key=lambda row: -row["n"]
    ):
        if row["ratio"] >= 1:
            break
        shortest = row["n"]
    return shortest
