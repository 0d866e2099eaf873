"""Attention in one pass of our own Triton kernels: dilated windows, global keys, padding, dropout; rounds of hashing.

`OnePass` and `Hashed` compute a part of the one softmax, forward and backward, in O(n) memory; `InOnePass` is the
`Tiling` (part.py) that calls them. `TritonTile` is a `Kernel` for a single tile. Triton is an optional extra: `pip
install effzoo[triton]`, on Linux.
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
from effzoo.attention.part import Gradients, Kernel, Part, Tile, Tiling, join_heads
from effzoo.devices import capability, chosen, kind_of
from effzoo.errors import OptionError

if TYPE_CHECKING:
    from effzoo.attention.band import Window

LARGEST = 128  # width of a head
STEPS = 2**31  # in which probabilities of keeping a weight are drawn
REGISTERS = 255  # of a thread: left to itself, the assembler spills one or two to fit another program beside
SPAN = 2048  # queries over which one program adds up the gradient of a column
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TileSizes(NamedTuple):
    """Queries and keys of a tile, warps of a program, tiles that are on their way at once."""

    queries: int
    keys: int
    warps: int
    stages: int


TILE_SIZES = {  # kernel and whether heads are wider than 64: for capability 8 (and those not named), 9 and 10
    ("forward", False): (TileSizes(128, 64, 8, 2), TileSizes(128, 64, 8, 2), TileSizes(128, 64, 8, 2)),
    ("forward", True): (TileSizes(64, 64, 8, 2), TileSizes(64, 64, 8, 2), TileSizes(64, 32, 8, 2)),
    ("of_queries", False): (TileSizes(128, 32, 8, 2), TileSizes(128, 64, 8, 2), TileSizes(64, 64, 4, 2)),
    ("of_queries", True): (TileSizes(64, 32, 8, 2), TileSizes(64, 64, 8, 2), TileSizes(64, 64, 8, 2)),
    ("of_keys", False): (TileSizes(64, 32, 4, 2), TileSizes(64, 64, 8, 2), TileSizes(64, 64, 4, 2)),
    ("of_keys", True): (TileSizes(32, 64, 8, 2), TileSizes(32, 64, 8, 2), TileSizes(64, 32, 8, 2)),
}


def tile_sizes(kernel: str, width: int, size: int, capability: tuple[int, int], hashed: bool = False) -> TileSizes:
    """What a kernel takes for heads of a padded width and numbers of `size` bytes: no more shared memory than cards of
    that capability have, and no spills with two bytes; what is for 8 fits 8.6, 8.9 and 12 (99 KiB). `of_columns` is
    `of_keys` for columns.

    Found by compiling ahead of time, not by measuring: benchmarks/results/registers.json has the figures.
    """
    wide = width > 64
    if size > 2:  # multiplied without tensor cores
        by_keys = kernel in ("of_keys", "of_columns")
        return TileSizes(32, 32, 8 if wide else 4, 1) if by_keys else TileSizes(32, 16, 8, 1)
    if kernel == "of_columns":
        return TileSizes(32, 32, 4, 2)
    if hashed and kernel == "of_keys":
        return TileSizes(32, 64, 8, 2) if wide else TileSizes(64 if capability[0] == 10 else 32, 32, 4, 2)
    if hashed:
        return TileSizes(64, 32, 8, 2) if wide else TileSizes(32, 64, 4, 2)
    return TILE_SIZES[kernel, wide][capability[0] - 8 if capability[0] in (9, 10) else 0]


def obstacle(q: Tensor, v: Tensor) -> str:
    """The reason why the kernels cannot compute with these queries and values; "" if they can."""
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
    """softmax(scale q k^T + bias) v over a window of keys and the columns.

    q [batch, heads, m, d], k [batch, heads, s, d], v [batch, heads, s, e]: float32, bfloat16 or float16; scores and
        sums are float32.
    causal: query i sees keys j <= i.
    window: None for all keys.
    scale: 1 / sqrt(d) when None.
    dropout, seed: the probability of dropping a weight, and what is drawn from.

    Arguments of the passes:

    bias: additive, broadcastable to [batch, heads, m, s], -inf where a query does not see a key; no gradient.
    key_mask bool[batch, s]: False for keys that no query sees, such as padding.
    columns int[batch, slots]: positions of keys that every query sees, outside `window` and `key_mask` too (when
        causal, no earlier query); s or more in an empty slot.
    """

    causal: bool = False
    window: Window | None = None
    scale: float | None = None
    dropout: float = 0.0
    seed: int = 0
    tiles: TileSizes | None = None  # instead of those of the card; for tests

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, key_mask: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Output [batch, heads, m, e] and log-sum-exp float32[batch, heads, m]; 0 and -inf for a query without keys.

        Raises OptionError where `obstacle` gives a reason.
        """
        call = self._call(q, k, v, bias, key_mask, columns)
        out, lse = _heads_inside(q, q.shape[2], v.shape[-1], v.dtype), q.new_empty(q.shape[:3], dtype=torch.float32)
        call.forward(out, lse)
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, bias: Tensor | None = None,
        key_mask: Tensor | None = None, columns: Tensor | None = None,
    ) -> Gradients:  # fmt: skip
        """Gradients of q, k and v. grad: of the output; out, lse: of all parts merged."""
        return self._call(q, k, v, bias, key_mask, columns).backward(grad, out, lse)

    def _call(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_mask: Tensor | None, columns: Tensor | None
    ) -> _Call:
        columns = None if columns is None or columns.shape[1] == 0 else columns
        call = _Call(q, k, v, self.scale, self.causal, self.dropout, self.seed, self.tiles)
        if self.window is not None:
            call.see(*astuple(self.window))
        if bias is not None:
            whole = bias.expand(*q.shape[:3], k.shape[2])
            names = ("bias_batch", "bias_head", "bias_query", "bias_key")
            strides = dict(zip(names, whole.stride(), strict=True))
            call.given |= {"Bias": whole, "BIAS_ROWS": whole.stride(2) != 0, **strides}
        if columns is not None:
            key_mask = _without(columns, key_mask, k)
            of_batch = columns.expand(q.shape[0], -1).to(torch.int32).contiguous()
            call.given |= {"Columns": of_batch, "slots": columns.shape[1]}
        call.mask_keys(key_mask)
        return call


@dataclass(frozen=True)
class Hashed:
    """One softmax over the keys that queries see in all rounds of LSH attention (`HashingRounds`), without gathering.

    chunk: length of a chunk.
    before, after: how many chunks before and after its own a query sees.
    within: only keys in the bucket of the query.
    once: a pair that meets in several rounds counts once.
    stable: `before` and `after` are counted from the query instead of from its chunk.
    causal, scale, dropout, seed: as in `OnePass`.
    padding: the bucket of padding, which marks it where no key_mask is given.

    Arguments of the passes:

    buckets int[rounds, batch, heads, n]: of each position.
    key_mask bool[batch, n]: False at padding, which neither sees nor is seen; its bucket is the largest.
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
    tiles: TileSizes | None = None
    padding: int | None = None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, buckets: Tensor, key_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp float32[batch, heads, n]; 0 and -inf for a query without keys."""
        call = self._call(q, k, v, buckets, key_mask)
        out = _heads_inside(q, q.shape[2], v.shape[-1], torch.float32 if len(buckets) > 1 else v.dtype)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        for turn in range(len(buckets)):
            call.round(turn, self.seed)
            call.forward(out, lse, resume=turn > 0)
        return out.to(v.dtype), lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, buckets: Tensor,
        key_mask: Tensor | None = None,
    ) -> Gradients:  # fmt: skip
        """Gradients of q, k and v. grad: of the output; out, lse: of all parts merged."""
        call = self._call(q, k, v, buckets, key_mask)
        sums = None
        for turn in range(len(buckets)):
            call.round(turn, self.seed)
            sums = call.backward(grad, out, lse, sums, torch.float32 if len(buckets) > 1 else q.dtype)
        assert sums is not None
        return sums[0].to(q.dtype), sums[1].to(k.dtype), sums[2].to(v.dtype)

    def _call(self, q: Tensor, k: Tensor, v: Tensor, buckets: Tensor, key_mask: Tensor | None) -> _Call:
        call = _Call(q, k, v, self.scale, self.causal, self.dropout, self.seed, self.tiles)
        if self.stable:
            call.see(self.before * self.chunk, self.after * self.chunk, 1, 1)
        else:
            call.see(self.before, self.after, 1, self.chunk)
        order, place = sort(buckets)
        call.given |= {"Order": order.int(), "rounds": len(buckets), "ITSELF": False}
        call.given["Buckets"] = buckets.contiguous() if self.within else None
        call.given["Place"] = place.int() if self.once else None
        call.mask_keys(buckets[0, :, 0] < self.padding if key_mask is None and self.padding is not None else key_mask)
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
class InOnePass(Tiling):
    """A part that `OnePass` (inputs: key_mask, columns) or `Hashed` (input: buckets) computes.

    groups: heads and their kernel; one group stands for all heads.
    """

    groups: Sequence[tuple[list[int], OnePass | Hashed]]

    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        named = self._named(inputs)
        results = [one.forward(*self._of(heads, q, k, v), **named) for heads, one in self.groups]
        return self._join([out for out, _ in results]), self._join([lse.unsqueeze(-1) for _, lse in results])

    def backward(
        self, kernel: Kernel, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        *inputs: Tensor | None,
    ) -> Gradients:  # fmt: skip
        named, tensors = self._named(inputs), (grad, q, k, v, out, lse.squeeze(-1))
        gradients = [one.backward(*self._of(heads, *tensors), **named) for heads, one in self.groups]
        grad_q, grad_k, grad_v = (self._join(by_group) for by_group in zip(*gradients, strict=True))
        return grad_q, grad_k, grad_v

    def _of(self, heads: list[int], *tensors: Tensor) -> list[Tensor]:
        return list(tensors) if len(self.groups) == 1 else [chosen(x, heads, 1) for x in tensors]

    def _join(self, tensors: Sequence[Tensor]) -> Tensor:
        return join_heads([heads for heads, _ in self.groups], tensors)

    def _named(self, inputs: Sequence[Tensor | None]) -> dict[str, Any]:
        names = ("key_mask", "columns") if isinstance(self.groups[0][1], OnePass) else ("buckets",)
        return dict(zip(names, inputs, strict=True))


def in_one_pass(parts: Sequence[Part]) -> list[Part]:
    """The parts; windows and rounds of hashing in one pass, global keys as columns of the window before them."""
    result: list[Part] = []
    for part in parts:
        before, groups = result[-1] if result else None, part.tiling_or_one.one_pass()
        if groups:
            inputs = [part.tiling_inputs[0], None] if isinstance(groups[0][1], OnePass) else part.inputs
            result.append(replace(part, tiling=InOnePass(groups), inputs=inputs))
        elif part.positions is not None and before is not None and isinstance(before.tiling, InOnePass):
            result[-1] = replace(before, inputs=[before.inputs[0], part.positions])
        else:
            result.append(part)
    return result


class _Call:
    """The arguments that all kernels of one attention share."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, dropout: float, seed: int,
        tiles: TileSizes | None,
    ):  # fmt: skip
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
        self.given: dict[str, Any] = dict.fromkeys(("Bias", "KeyMask", "Columns", "Order", "Place", "Buckets"))
        for name, x in (("q", self.q), ("k", self.k), ("v", self.v)):
            batch_stride, head_stride, row_stride, _ = x.stride()
            strides = {f"{name}_batch": batch_stride, f"{name}_head": head_stride, f"{name}_row": row_stride}
            self.given |= {name.upper(): x, **strides}
        self.given |= dict.fromkeys(
            ("bias_batch", "bias_head", "bias_query", "bias_key", "slots", "rounds", "turn", "left", "right"), 0
        )
        self.given["scale"] = 1 / math.sqrt(d) if scale is None else float(scale)
        self.given |= {"batches": batch, "heads": heads, "m": m, "s": k.shape[2], "dilation": 1, "chunk": 1}
        self.given |= {"keep": min(round((1 - dropout) * STEPS), STEPS - 1), "DROPOUT": dropout > 0}
        self.given |= {"CAUSAL": causal, "ITSELF": True, "WINDOW": False, "BIAS_ROWS": False}
        self.given |= {"D": d, "BD": _padded(d), "E": v.shape[-1], "BE": _padded(v.shape[-1])}
        self.given["PRECISION"] = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        self.round(0, seed)

    def round(self, turn: int, seed: int) -> None:
        """Choose the round of hashing; each has its own seed of dropout."""
        seed = (seed + turn) % 2**62
        self.given |= {"turn": turn, "seed_low": seed % STEPS, "seed_high": seed // STEPS}

    def see(self, left: int | None, right: int | None, dilation: int, chunk: int) -> None:
        """Set the window, in chunks of indices."""
        most = max(self.q.shape[2], self.k.shape[2])
        self.given["left"] = most if left is None else min(left, most)
        self.given["right"] = most if right is None else min(right, most)
        self.given |= {"dilation": dilation, "chunk": min(chunk, max(1, most))}
        self.given["WINDOW"] = left is not None or right is not None

    def mask_keys(self, mask: Tensor | None) -> None:
        """Set which keys are seen at all, bool[batch, s]."""
        if mask is not None:
            self.given["KeyMask"] = mask.expand(self.q.shape[0], -1).contiguous().view(torch.uint8)

    def forward(self, out: Tensor, lse: Tensor, *, resume: bool = False) -> None:
        self._launch("forward", Out=_heads_last(out), Lse=lse, RESUME=resume)

    def backward(
        self, grad: Tensor, out: Tensor, lse: Tensor, sums: Gradients | None = None, dtype: torch.dtype | None = None
    ) -> Gradients:
        """Gradients of q, k and v, added to `sums`, or as new tensors [batch, heads, n, width] of this dtype."""
        columns, slots, s = self.given["Columns"], self.given["slots"], self.k.shape[2]
        room = s + (columns is not None)  # one place more, for empty slots of columns
        if sums is None:
            like = ((self.q, self.q.shape[2]), (self.k, room), (self.v, room))
            of_q, of_k, of_v = (_heads_inside(x, n, x.shape[-1], x.dtype if dtype is None else dtype) for x, n in like)
        else:
            of_q, of_k, of_v = sums
        lse = lse.to(torch.float32).contiguous()
        delta = torch.empty_like(lse)
        same = {"Grad": _heads_last(grad.to(self.v.dtype)), "Lse": lse, "Delta": delta, "ADD": sums is not None}
        self._launch("of_queries", **same, Out=_heads_last(out), DQ=of_q.transpose(1, 2))
        of_keys = {"DK": of_k.transpose(1, 2), "DV": of_v.transpose(1, 2)}
        self._launch("of_keys", **same, **of_keys, span=0, key_count=room, Columns=None)
        if columns is None:
            return of_q, of_k, of_v
        batch, heads, m, _ = self.q.shape
        parts = -(-m // SPAN)
        index = columns.long().masked_fill((columns < 0) | (columns > s), s)[:, :, None, None]
        by_part = {
            name: x.new_empty(parts, batch, slots, heads, x.shape[-1], dtype=torch.float32)
            for name, x in of_keys.items()
        }
        self._launch("of_keys", **same, **by_part, span=SPAN, key_count=slots, KeyMask=None, WINDOW=False, dilation=1)
        for name, x in of_keys.items():
            x.scatter_(1, index.expand(-1, -1, *x.shape[2:]), by_part[name].sum(dim=0).to(x.dtype))
        return of_q, of_k[:, :, :s], of_v[:, :, :s]

    def _launch(self, name: str, **arguments: Any) -> None:
        given = self.given | arguments
        width, columns = max(given["BD"], given["BE"]), name == "of_keys" and given["Columns"] is not None
        size = self.tiles
        if size is None:
            kernel, hashed = "of_columns" if columns else name, given["Order"] is not None
            size = tile_sizes(kernel, width, self.q.element_size(), capability(self.q.device), hashed)
        groups = self.q.shape[0] * self.q.shape[1] * given["dilation"]
        count, of_tile = (given["m"], size.queries) if name != "of_keys" else (given["s"], size.keys)
        if columns:
            count, groups = given["slots"], groups * len(arguments["DK"])
        chosen = {"BM": size.queries, "BN": size.keys, "num_warps": size.warps, "num_stages": size.stages}
        chosen["maxnreg"] = REGISTERS
        programs = math.ceil(math.ceil(count / given["dilation"]) / of_tile) * groups
        if programs and not isinstance(self.q, FakeTensor):
            started(name, programs, self.q.device, given | chosen)


def started(name: str, programs: int, device: torch.device, given: dict[str, Any]) -> None:
    """Start so many programs of a kernel, on the card of its tensors."""
    from effzoo.attention import triton_kernels

    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        getattr(triton_kernels, name)[(programs,)](**given)


def _without(columns: Tensor, key_mask: Tensor | None, k: Tensor) -> Tensor:
    """The key mask without the columns, bool[batch, s]."""
    batch, _, s, _ = k.shape
    room = k.new_ones(batch, s + 1, dtype=torch.bool)
    if key_mask is not None:
        room[:, :s] = key_mask
    index = columns.long().masked_fill((columns < 0) | (columns > s), s)
    return room.scatter_(1, index.expand(batch, -1), False)[:, :s]


def _heads_inside(like: Tensor, n: int, width: int, dtype: torch.dtype) -> Tensor:
    """An empty [batch, heads, n, width] whose heads lie side by side in memory."""
    return like.new_empty(like.shape[0], n, like.shape[1], width, dtype=dtype).transpose(1, 2)


def _heads_last(x: Tensor) -> Tensor:
    """[batch, heads, n, x] -> [batch, n, heads, x], dense."""
    return x.transpose(1, 2).contiguous()


def _dense(x: Tensor) -> Tensor:
    """x with strides that the kernels take: 1 on the last axis, offsets below 2^31."""
    return x if x.stride(-1) == 1 and x.shape[2] * x.stride(2) < 2**31 else x.contiguous()


def _padded(width: int) -> int:
    """The next power of two, at least the 16 of a matrix product."""
    return max(16, 1 << (width - 1).bit_length())


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)
