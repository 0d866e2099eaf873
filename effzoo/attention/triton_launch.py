"""Attention in one pass of our own Triton kernels: a window with holes, columns that every query sees, padding and
dropout; and rounds of hashing.

`OnePass` and `Hashed` compute the output and the log-sum-exp of one part of the one softmax, and its gradients given
    the merged ones; `Whole` is the
`Layout` (part.py) that takes them instead of tiles. `TritonTile` is a `Kernel` for a single tile. Nothing of size n^2
    is kept. Triton is an optional extra: `pip install effzoo[triton]`, on Linux.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from effzoo.attention.hashing import sort
from effzoo.attention.part import Kernel, Layout, Part, Tile, together
from effzoo.devices import capability, chosen, kind_of
from effzoo.errors import OptionError

if TYPE_CHECKING:
    from effzoo.attention.band import Window

LARGEST = 128  # width of a head
STEPS = 2**31  # in which probabilities of keeping a weight are drawn
REGISTERS = 255  # of a thread: left to itself, the assembler spills one or two to fit another program beside
SPAN = 2048  # queries over which one program adds up the gradient of a column
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Tiling(NamedTuple):
    """Queries and keys of a tile, warps of a program, tiles that are on their way at once."""

    queries: int
    keys: int
    warps: int
    stages: int


TILINGS = {  # kernel and whether heads are wider than 64: for capability 8 (and those not named), 9 and 10
    ("forward", False): (Tiling(128, 64, 8, 2), Tiling(128, 64, 8, 2), Tiling(128, 64, 8, 2)),
    ("forward", True): (Tiling(64, 64, 8, 2), Tiling(64, 64, 8, 2), Tiling(64, 32, 8, 2)),
    ("of_queries", False): (Tiling(128, 32, 8, 2), Tiling(128, 64, 8, 2), Tiling(64, 64, 4, 2)),
    ("of_queries", True): (Tiling(64, 32, 8, 2), Tiling(64, 64, 8, 2), Tiling(64, 64, 8, 2)),
    ("of_keys", False): (Tiling(64, 32, 4, 2), Tiling(64, 64, 8, 2), Tiling(64, 64, 4, 2)),
    ("of_keys", True): (Tiling(32, 64, 8, 2), Tiling(32, 64, 8, 2), Tiling(64, 32, 8, 2)),
}


def tiling(kernel: str, width: int, size: int, capability: tuple[int, int], hashed: bool = False) -> Tiling:
    """What a kernel takes for heads of a padded width and numbers of `size` bytes: no more shared memory than cards of
    that capability have, and no spills with two bytes; what is for 8 fits 8.6, 8.9 and 12 (99 KiB). `of_columns` is
    `of_keys` for columns.

    Found by compiling ahead of time, not by measuring: benchmarks/results/registers.json has the figures.
    """
    wide = width > 64
    if size > 2:  # multiplied without tensor cores
        return Tiling(32, 32, 8 if wide else 4, 1) if kernel in ("of_keys", "of_columns") else Tiling(32, 16, 8, 1)
    if kernel == "of_columns":
        return Tiling(32, 32, 4, 2)
    if hashed and kernel == "of_keys":
        return Tiling(32, 64, 8, 2) if wide else Tiling(64 if capability[0] == 10 else 32, 32, 4, 2)
    if hashed:
        return Tiling(64, 32, 8, 2) if wide else Tiling(32, 64, 4, 2)
    return TILINGS[kernel, wide][capability[0] - 8 if capability[0] in (9, 10) else 0]


def obstacle(q: Tensor, v: Tensor) -> str:
    """Why the kernels cannot compute with these queries and values; empty if they can."""
    if not _installed():
        return "triton is not installed; pip install effzoo[triton]"
    if kind_of(q) != "cuda" and not _interpreted():
        return f"the Triton kernels run on CUDA, not on {q.device.type}"
    if capability(q.device) < (8, 0):
        return (
            "the Triton kernels run on cards of compute capability 8.0 or more, not "
            f"{'.'.join(map(str, capability(q.device)))}"
        )
    if q.dtype not in DTYPES:
        return f"the Triton kernels have no {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > LARGEST:
        return f"the Triton kernels take heads of at most {LARGEST} numbers, not {max(q.shape[-1], v.shape[-1])}"
    return ""


@dataclass(frozen=True)
class OnePass:
    """Which keys a query sees, by numbers alone; the factor on q k^T (None: 1 / sqrt(d)); the probability of dropping a
    weight, and its seed.

    q [batch, heads, m, d], k [batch, heads, s, d], v [batch, heads, s, e], in float32, bfloat16 or float16; scores and
    sums are float32.
    sight: of the keys, how far a query looks, as kinds declare it (band.py); None: to all.
    causal: no key after the query. bias: additive, broadcastable to [batch, heads, m, s], -inf where a query does
        not see a key, without gradient. held: bool[batch, s], False for keys that nothing sees, such as padding.
        columns: int[batch, slots], positions of keys that every query sees, whatever `sight` and `held` say (after
        the query too, unless causal), each once; s or more where a slot is empty.
    """

    causal: bool = False
    sight: Window | None = None
    scale: float | None = None
    dropout: float = 0.0
    seed: int = 0
    tiles: Tiling | None = None  # instead of those of the card; for tests

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None = None,
        held: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Output [batch, heads, m, e] and log-sum-exp float32[batch, heads, m]; 0 and -inf for a query that sees
        nothing.

        Raises OptionError where `obstacle` says so.
        """
        call = self._call(q, k, v, bias, held, columns)
        out, lse = _rows_first(q, q.shape[2], v.shape[-1], v.dtype), q.new_empty(q.shape[:3], dtype=torch.float32)
        call.forward(out, lse)
        return out, lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        bias: Tensor | None = None,
        held: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, given that of the output, and the output and log-sum-exp of all parts together."""
        return self._call(q, k, v, bias, held, columns).backward(grad, out, lse)

    def _call(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, held: Tensor | None, columns: Tensor | None
    ) -> _Call:
        columns = None if columns is None or columns.shape[1] == 0 else columns
        call = _Call(q, k, v, self.scale, self.causal, self.dropout, self.seed, self.tiles)
        if self.sight is not None:
            call.see(*astuple(self.sight))
        if bias is not None:
            whole = bias.expand(*q.shape[:3], k.shape[2])
            names = ("bias_batch", "bias_head", "bias_query", "bias_key")
            call.given |= {
                "Bias": whole,
                "BIAS_ROWS": whole.stride(2) != 0,
                **dict(zip(names, whole.stride(), strict=True)),
            }
        if columns is not None:
            held = _without(columns, held, k)
            call.given |= {
                "Columns": columns.expand(q.shape[0], -1).to(torch.int32).contiguous(),
                "slots": columns.shape[1],
            }
        call.hold(held)
        return call


@dataclass(frozen=True)
class Hashed:
    """Rounds of LSH attention with nothing gathered beforehand: a query sees keys of its own chunk of the sorted order,
    and of chunks around it.

    Each round goes on with the softmax of the rounds before it, so all together are one, exactly. buckets int[rounds,
    batch, heads, n]: that of every position; held: bool[batch, n], False at padding, which has the largest bucket and
    neither sees nor is seen. A query does not see its own key.
    chunk, before, after: length of a chunk, and how many chunks a query sees before and after its own; stable:
        counted from the query and not from its chunk.
    within: only keys of the query's own bucket.
    once: a pair that meets in several rounds counts once.
    padding: its bucket, by which it is known where `held` is not given. The others are those of `OnePass`.
    """

    chunk: int
    before: int = 1
    after: int = 0
    within: bool = False
    once: bool = False
    stable: bool = False
    causal: bool = False
    scale: float | None = None
    dropout: float = 0.0
    seed: int = 0
    tiles: Tiling | None = None
    padding: int | None = None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, buckets: Tensor, held: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp float32[batch, heads, n] over what is seen in all rounds; 0 and -inf for a query that
        sees nothing."""
        call = self._call(q, k, v, buckets, held)
        out = _rows_first(q, q.shape[2], v.shape[-1], torch.float32 if len(buckets) > 1 else v.dtype)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        for turn in range(len(buckets)):
            call.round(turn, self.seed)
            call.forward(out, lse, resume=turn > 0)
        return out.to(v.dtype), lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        buckets: Tensor,
        held: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, given that of the output, and the output and log-sum-exp of all parts together."""
        call = self._call(q, k, v, buckets, held)
        sums = None
        for turn in range(len(buckets)):
            call.round(turn, self.seed)
            sums = call.backward(grad, out, lse, sums, torch.float32 if len(buckets) > 1 else q.dtype)
        assert sums is not None
        return sums[0].to(q.dtype), sums[1].to(k.dtype), sums[2].to(v.dtype)

    def _call(self, q: Tensor, k: Tensor, v: Tensor, buckets: Tensor, held: Tensor | None) -> _Call:
        call = _Call(q, k, v, self.scale, self.causal, self.dropout, self.seed, self.tiles)
        call.see(
            *(self.before * self.chunk, self.after * self.chunk, 1, 1)
            if self.stable
            else (self.before, self.after, 1, self.chunk)
        )
        order, place = sort(buckets)
        call.given |= {"Order": order.int(), "rounds": len(buckets), "ITSELF": False}
        call.given |= {
            "Buckets": buckets.contiguous() if self.within else None,
            "Place": place.int() if self.once else None,
        }
        call.hold(buckets[0, :, 0] < self.padding if held is None and self.padding is not None else held)
        return call


@dataclass(frozen=True)
class TritonTile:
    """The kernel of a single tile; each draws its dropout from a seed of its own."""

    scale: float | None = None
    dropout: float = 0.0
    seed: int = 0

    def forward(self, tile: Tile, index: int) -> tuple[Tensor, Tensor]:
        return self._pass(tile, index).forward(tile.q, tile.k, tile.v, bias=tile.bias)

    def backward(self, tile: Tile, index: int, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._pass(tile, index).backward(grad, tile.q, tile.k, tile.v, out, lse, bias=tile.bias)

    def _pass(self, tile: Tile, index: int) -> OnePass:
        return OnePass(tile.causal, scale=self.scale, dropout=self.dropout, seed=self.seed + index)


@dataclass(frozen=True)
class Whole(Layout):
    """A part whose kernels find the tiles themselves. It is given what they take beside q, k and v: `held` and
    `columns` of `OnePass`, `buckets` of
    `Hashed`."""

    ones: Sequence[tuple[list[int], OnePass | Hashed]]  # heads, all of them if there is one, and what computes them

    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        outs, lses = zip(
            *(one.forward(*self._of(heads, q, k, v), **self._named(given)) for heads, one in self.ones), strict=True
        )
        return self._together(outs), self._together([lse.unsqueeze(-1) for lse in lses])

    def backward(
        self,
        kernel: Kernel,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *given: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        named, whole = self._named(given), (grad, q, k, v, out, lse.squeeze(-1))
        of_q, of_k, of_v = zip(
            *(one.backward(*self._of(heads, *whole), **named) for heads, one in self.ones), strict=True
        )
        return self._together(of_q), self._together(of_k), self._together(of_v)

    def _of(self, heads: list[int], *of_all: Tensor) -> list[Tensor]:
        return list(of_all) if len(self.ones) == 1 else [chosen(x, heads, 1) for x in of_all]

    def _together(self, found: Sequence[Tensor]) -> Tensor:
        return together([heads for heads, _ in self.ones], found)

    def _named(self, given: Sequence[Tensor | None]) -> dict[str, Any]:
        return dict(
            zip(("held", "columns") if isinstance(self.ones[0][1], OnePass) else ("buckets",), given, strict=True)
        )


def whole(parts: Sequence[Part]) -> list[Part]:
    """Parts with a band or rounds of hashing as parts that are computed in one pass, a band with the columns behind it;
    the others as they are."""
    found: list[Part] = []
    for part in parts:
        front, ones = found[-1] if found else None, part.way.one_pass()
        if ones:
            given = [part.brought[0], None] if isinstance(ones[0][1], OnePass) else part.given
            found.append(replace(part, layout=Whole(ones), given=given))
        elif part.where is not None and front is not None and isinstance(front.layout, Whole):
            found[-1] = replace(front, given=[front.given[0], part.where])
        else:
            found.append(part)
    return found


class _Call:
    """The arguments that all kernels of one attention share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        causal: bool,
        dropout: float,
        seed: int,
        tiles: Tiling | None,
    ):
        if wrong := obstacle(q, v):
            raise OptionError(wrong)
        if not q.dtype == k.dtype == v.dtype:
            raise OptionError(
                f"the Triton kernels take queries, keys and values of one dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
            )
        if not 0 <= dropout < 1:
            raise OptionError(f"the probability of dropping a weight is at least 0 and below 1, got {dropout}")
        self.q, self.k, self.v, self.tiles = *(_dense(x) for x in (q, k, v)), tiles
        batch, heads, m, d = q.shape
        self.given: dict[str, Any] = {name: None for name in ("Bias", "Held", "Columns", "Order", "Place", "Buckets")}
        for name, x in (("q", self.q), ("k", self.k), ("v", self.v)):
            self.given |= {
                name.upper(): x,
                f"{name}_batch": x.stride(0),
                f"{name}_head": x.stride(1),
                f"{name}_row": x.stride(2),
            }
        self.given |= dict.fromkeys(
            ("bias_batch", "bias_head", "bias_query", "bias_key", "slots", "rounds", "turn", "left", "right"), 0
        )
        self.given |= {
            "scale": 1 / math.sqrt(d) if scale is None else float(scale),
            "heads": heads,
            "m": m,
            "s": k.shape[2],
            "batches": batch,
        }
        self.given |= {
            "dilation": 1,
            "chunk": 1,
            "keep": min(round((1 - dropout) * STEPS), STEPS - 1),
            "DROPOUT": dropout > 0,
        }
        self.given |= {"CAUSAL": causal, "ITSELF": True, "WINDOW": False, "BIAS_ROWS": False}
        self.given |= {"D": d, "BD": _padded(d), "E": v.shape[-1], "BE": _padded(v.shape[-1])}
        self.given["PRECISION"] = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        self.round(0, seed)

    def round(self, turn: int, seed: int) -> None:
        """Which round of hashing comes next; each draws its dropout from a seed of its own."""
        seed = (seed + turn) % 2**62
        self.given |= {"turn": turn, "seed_low": seed % STEPS, "seed_high": seed // STEPS}

    def see(self, left: int | None, right: int | None, dilation: int, chunk: int) -> None:
        """How far the queries look, in chunks of the indices."""
        most = max(self.q.shape[2], self.k.shape[2])
        bounds = {
            "left": most if left is None else min(left, most),
            "right": most if right is None else min(right, most),
        }
        self.given |= {
            **bounds,
            "dilation": dilation,
            "chunk": min(chunk, max(1, most)),
            "WINDOW": left is not None or right is not None,
        }

    def hold(self, held: Tensor | None) -> None:
        """Keys that are seen, bool[batch, s]."""
        self.given["Held"] = None if held is None else held.expand(self.q.shape[0], -1).contiguous().view(torch.uint8)

    def forward(self, out: Tensor, lse: Tensor, *, resume: bool = False) -> None:
        self._launch("forward", Out=_as_rows(out), Lse=lse, RESUME=resume)

    def backward(
        self,
        grad: Tensor,
        out: Tensor,
        lse: Tensor,
        sums: tuple[Tensor, Tensor, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, added to `sums`, or as new tensors [batch, heads, n, width] of this dtype."""
        columns, slots, s = self.given["Columns"], self.given["slots"], self.k.shape[2]
        room = s + (columns is not None)  # a place behind the last, for the slots without a column
        if sums is None:
            like = ((self.q, self.q.shape[2]), (self.k, room), (self.v, room))
            of_q, of_k, of_v = (_rows_first(x, n, x.shape[-1], x.dtype if dtype is None else dtype) for x, n in like)
        else:
            of_q, of_k, of_v = sums
        lse = lse.to(torch.float32).contiguous()
        delta = torch.empty_like(lse)
        same = {"Grad": _as_rows(grad.to(self.v.dtype)), "Lse": lse, "Delta": delta, "ADD": sums is not None}
        self._launch("of_queries", **same, Out=_as_rows(out), DQ=of_q.transpose(1, 2))
        of_keys = {"DK": of_k.transpose(1, 2), "DV": of_v.transpose(1, 2)}
        self._launch("of_keys", **same, **of_keys, span=0, key_rows=room, Columns=None)
        if columns is None:
            return of_q, of_k, of_v
        batch, heads, m, _ = self.q.shape
        parts = -(-m // SPAN)
        where = columns.long().masked_fill((columns < 0) | (columns > s), s)[:, :, None, None]
        found = {
            name: x.new_empty(parts, batch, slots, heads, x.shape[-1], dtype=torch.float32)
            for name, x in of_keys.items()
        }
        self._launch("of_keys", **same, **found, span=SPAN, key_rows=slots, Held=None, WINDOW=False, dilation=1)
        for name, x in of_keys.items():
            x.scatter_(1, where.expand(-1, -1, *x.shape[2:]), found[name].sum(dim=0).to(x.dtype))
        return of_q, of_k[:, :, :s], of_v[:, :, :s]

    def _launch(self, name: str, **own: Any) -> None:
        given = self.given | own
        width, columns = max(given["BD"], given["BE"]), name == "of_keys" and given["Columns"] is not None
        size = self.tiles
        if size is None:
            kernel, hashed = "of_columns" if columns else name, given["Order"] is not None
            size = tiling(kernel, width, self.q.element_size(), capability(self.q.device), hashed)
        groups = self.q.shape[0] * self.q.shape[1] * given["dilation"]
        rows, of_tile = (given["m"], size.queries) if name != "of_keys" else (given["s"], size.keys)
        if columns:
            rows, groups = given["slots"], groups * len(own["DK"])
        chosen = {
            "BM": size.queries,
            "BN": size.keys,
            "num_warps": size.warps,
            "num_stages": size.stages,
            "maxnreg": REGISTERS,
        }
        programs = math.ceil(math.ceil(rows / given["dilation"]) / of_tile) * groups
        if programs and not isinstance(self.q, FakeTensor):
            started(name, programs, self.q.device, given | chosen)


def started(name: str, programs: int, device: torch.device, given: dict[str, Any]) -> None:
    """So many programs of a kernel, on the card that its tensors are on."""
    from effzoo.attention import triton_kernels

    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        getattr(triton_kernels, name)[(programs,)](**given)


def _without(columns: Tensor, held: Tensor | None, k: Tensor) -> Tensor:
    """Keys that are held and no columns, bool[batch, s]."""
    batch, _, s, _ = k.shape
    room = k.new_ones(batch, s + 1, dtype=torch.bool)
    if held is not None:
        room[:, :s] = held
    where = columns.long().masked_fill((columns < 0) | (columns > s), s)
    return room.scatter_(1, where.expand(batch, -1), False)[:, :s]


def _rows_first(like: Tensor, n: int, width: int, dtype: torch.dtype) -> Tensor:
    """[batch, heads, n, width] whose heads lie side by side, so that they are one row without a copy."""
    return like.new_empty(like.shape[0], n, like.shape[1], width, dtype=dtype).transpose(1, 2)


def _as_rows(x: Tensor) -> Tensor:
    """[batch, heads, n, x] -> [batch, n, heads, x], dense."""
    return x.transpose(1, 2).contiguous()


def _dense(x: Tensor) -> Tensor:
    """Rows that the kernels can walk: numbers side by side, and no row further off than 32 bits say."""
    return x if x.stride(-1) == 1 and x.shape[2] * x.stride(2) < 2**31 else x.contiguous()


def _padded(width: int) -> int:
    """A power of two, of at least the 16 that a matrix product wants."""
    return max(16, 1 << (width - 1).bit_length())


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)
