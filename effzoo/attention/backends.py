"""Which backend computes an attention, and why.

| backend | where | what it takes |
|---|---|---|
| reference | everywhere | everything: the plain twin, which keeps the scores |
| flash | CPU; CUDA in bfloat16 and float16 | torch's flash operators: dropout 0, on CUDA without a bias |
| blocks | CPU, CUDA | dropout: weights written out a block at a time, and again in the backward pass |
| efficient | CUDA, all but float64 | torch's memory-efficient operators: biases, dropout |
| flex | CUDA, all but float64; CPU without gradients | torch's FlexAttention: kinds that are a predicate; dropout 0; only when asked for |
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from effzoo.attention import flex
from effzoo.attention.cuda import Efficient, FlashCuda
from effzoo.attention.dropped import Weights
from effzoo.attention.flash import Flash
from effzoo.attention.part import Folded, Kernel, Layout, Part
from effzoo.attention.tiles import Tiles
from effzoo.errors import OptionError

BACKENDS = ("auto", "reference", "flash", "blocks", "efficient", "flex")
RENAMED = {"sdpa": "flash"}
HALF, SINGLE, ALL = (torch.bfloat16, torch.float16), (torch.float32,), (torch.bfloat16, torch.float16, torch.float32, torch.float64)
TAKES = {  # backend, device -> dtypes
    ("flash", "cpu"): ALL,
    ("blocks", "cpu"): ALL,
    ("blocks", "cuda"): ALL,
    ("flash", "cuda"): HALF,
    ("efficient", "cuda"): HALF + SINGLE,
    ("flex", "cpu"): ALL,
    ("flex", "cuda"): HALF + SINGLE,
}
FLASH: dict[str, type[Flash] | type[FlashCuda]] = {"cpu": Flash, "cuda": FlashCuda}
DOES = {
    "flash": "fused flash attention",
    "blocks": "weights some at a time, and again in the backward pass",
    "efficient": "fused memory-efficient attention",
    "flex": "FlexAttention",
}
ORDER = {"cpu": ("flash", "blocks"), "cuda": ("flash", "efficient")}


def known(backend: str) -> str:
    """The backend, or "auto". Raises OptionError for any other name."""
    if backend in BACKENDS:
        return backend
    if backend in RENAMED:
        raise OptionError(f"backend {backend!r} is called {RENAMED[backend]!r} now")
    raise OptionError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")


def choose(parts: Sequence[Part], dropout: float, backend: str = "auto") -> tuple[str, str]:
    """The backend that `attend` takes for these parts, and the reason. Raises OptionError for a named one that cannot run here."""
    device = parts[0].q.device.type
    if known(backend) == "reference":
        return "reference", "asked for"
    if backend != "auto":
        if why_not := _obstacle(backend, parts, dropout):
            instead, _ = choose(parts, dropout)
            raise OptionError(f"backend {backend!r} cannot run here: {why_not}; use backend='auto', which is {instead!r} here")
        return backend, f"asked for: {DOES[backend]} on {device}"
    passed = ""
    for name in ORDER.get(device, ()):
        why_not = _obstacle(name, parts, dropout)
        if not why_not:
            return name, f"{DOES[name]} on {device}{passed}"
        passed += f"; not {name!r}: {why_not}"
    return "reference", f"plain PyTorch on {device}{passed or '; no fused operators are known there'}"


def _obstacle(backend: str, parts: Sequence[Part], dropout: float) -> str:
    """Why a backend cannot compute these parts; empty if it can."""
    q = parts[0].q
    device = q.device.type
    takes = TAKES.get((backend, device))
    if takes is None:
        return f"it runs on {' and '.join(where for name, where in TAKES if name == backend)}, the tensors are on {device}"
    if q.dtype not in takes:
        return f"on {device} it takes {', '.join(map(_short, takes))}, got {_short(q.dtype)}"
    if backend in ("blocks", "efficient"):
        return ""
    if dropout > 0:
        return f"attention dropout {dropout} needs the weights themselves, which it never holds (attention_dropout=0 allows it)"
    if backend == "flex":
        return flex.obstacle(parts)
    return _no_flash(parts) if FLASH[device] is FlashCuda else ""


def _no_flash(parts: Sequence[Part]) -> str:
    """Why torch's flash operators for CUDA cannot compute these parts."""
    if lacking := has_no_flash(parts[0].q.device.index):
        return lacking
    for part in parts:
        widest = max(part.q.shape[-1], part.v.shape[-1])
        if widest > 256:
            return f"it takes heads of at most 256 numbers, got {widest}"
        if not part.way.bare(part.brought):
            return "it takes no bias, which padding and the tiles of some kinds need"
        if part.causal and part.q.shape[2] != part.k.shape[2]:
            return f"causal, it takes as many queries as keys, got {part.q.shape[2]} and {part.k.shape[2]}"
    return ""


@functools.cache
def has_no_flash(device: int | None) -> str:
    """What torch's flash operators lack on a CUDA device."""
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has none for CUDA"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"it needs compute capability 8.0, this card has {major}.{minor}"


def placed(part: Part, backend: str, dropout: float, seed: int | None = None) -> tuple[Layout, Kernel]:
    """How a part lies in tiles, and what computes them; seed: for dropout, drawn if None."""
    if backend in ("blocks", "reference"):  # in compiled code the plain twin is not followed by autograd
        return part.way, Weights(dropout, _number(drawn_seed()) if seed is None else seed, part.scale)
    if backend == "efficient":
        return part.way, Efficient(part.scale, dropout, seed)
    kernel = FLASH[part.q.device.type]
    if kernel is FlashCuda and isinstance(part.layout, Tiles) and part.layout.window is not None:  # which it knows itself
        return Folded(), FlashCuda(part.scale, part.layout.window)
    return part.way, kernel(part.scale)


def drawn_seed() -> Tensor:
    """A seed from torch's generator: the same again when a checkpoint restores its state."""
    return torch.randint(2**62, (1,), device="cpu")


def _number(seed: Tensor) -> int:
    return 0 if isinstance(seed, FakeTensor) else int(seed)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
