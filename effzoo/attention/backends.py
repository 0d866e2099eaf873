"""Which backend computes an attention, and why.

| backend | where | what it takes |
|---|---|---|
| reference | everywhere | everything: the plain form, which keeps the scores |
| flash | CPU; CUDA in bfloat16 and float16 | torch's flash operators: on the CPU dropout 0, on CUDA no bias |
| blocks | CPU, CUDA | dropout, capped scores: weights written out a block at a time, and again in the backward pass |
| efficient | CUDA, all but float64 | torch's memory-efficient operators: biases, dropout |
| triton | CUDA, all but float64 | our own kernels (`triton_launch.py`): bands, dropout; hashing |
| flex | CUDA, not float64; CPU without gradients | FlexAttention, when asked for: predicates, caps; no dropout |
| xformers | CUDA, all but float64 | `xformers`, when asked for: biases, windows; dropout 0 |

On CUDA "auto" takes flash where it can; else triton for rounds of hashing, and for bands in bfloat16 and float16; else
efficient. That order is what is expected of them: no card has run them yet.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from effzoo.attention import flex, triton_launch, xformers
from effzoo.attention.cuda import Efficient, FlashCuda
from effzoo.attention.dropped import Weights
from effzoo.attention.flash import Flash
from effzoo.attention.part import Kernel, OneTile, Part, Tiling
from effzoo.attention.tiles import Tiles
from effzoo.attention.triton_launch import InOnePass, OnePass, TritonTile
from effzoo.attention.xformers import Xformers
from effzoo.devices import capability, kind_of
from effzoo.errors import OptionError

BACKENDS = ("auto", "reference", "flash", "blocks", "efficient", "flex", "triton", "xformers")
HALF, SINGLE = (torch.bfloat16, torch.float16), (torch.float32,)
ALL = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
TAKES = {  # backend, device -> dtypes
    ("flash", "cpu"): ALL,
    ("blocks", "cpu"): ALL,
    ("blocks", "cuda"): ALL,
    ("flash", "cuda"): HALF,
    ("efficient", "cuda"): HALF + SINGLE,
    ("flex", "cpu"): ALL,
    ("flex", "cuda"): HALF + SINGLE,
    ("triton", "cuda"): HALF + SINGLE,
    ("xformers", "cuda"): HALF + SINGLE,
}
FLASH: dict[str, type[Flash] | type[FlashCuda]] = {"cpu": Flash, "cuda": FlashCuda}
DOES = {
    "flash": "fused flash attention",
    "blocks": "weights some at a time, and again in the backward pass",
    "efficient": "fused memory-efficient attention",
    "flex": "FlexAttention",
    "triton": "our own Triton kernels, which no card has run yet,",
    "xformers": "memory-efficient attention of xformers",
}
ORDER = {"cpu": ("flash", "blocks"), "cuda": ("flash", "triton", "efficient")}


def known(backend: str) -> str:
    """The backend, or "auto". Raises OptionError for any other name."""
    if backend in BACKENDS:
        return backend
    raise OptionError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")


def choose(parts: Sequence[Part], dropout: float, backend: str = "auto") -> tuple[str, str]:
    """The backend that `attend` takes for these parts, and the reason. Raises OptionError for a named one that cannot
    run here."""
    device = kind_of(parts[0].q)
    if known(backend) == "reference":
        return "reference", "asked for"
    if backend != "auto":
        if why_not := _obstacle(backend, parts, dropout):
            instead, _ = choose(parts, dropout)
            raise OptionError(
                f"backend {backend!r} cannot run here: {why_not}; use backend='auto', which is {instead!r} here"
            )
        return backend, f"asked for: {DOES[backend]} on {device}"
    passed = ""
    with_cap = ("blocks",) if device == "cuda" and any(part.cap for part in parts) else ()
    for name in (*ORDER.get(device, ()), *with_cap):
        why_not = _obstacle(name, parts, dropout) or (_no_gain(parts) if name == "triton" else "")
        if not why_not:
            return name, f"{DOES[name]} on {device}{passed}"
        passed += f"; not {name!r}: {why_not}"
    return "reference", f"plain PyTorch on {device}{passed or '; no fused operators are known there'}"


def _obstacle(backend: str, parts: Sequence[Part], dropout: float) -> str:
    """The reason why a backend cannot compute these parts; "" if it can."""
    q = parts[0].q
    device = kind_of(q)
    takes = TAKES.get((backend, device))
    if takes is None:
        return (
            f"it runs on {' and '.join(where for name, where in TAKES if name == backend)}, the tensors are on {device}"
        )
    if q.dtype not in takes:
        return f"on {device} it takes {', '.join(map(_short, takes))}, got {_short(q.dtype)}"
    caps = [part.cap for part in parts if part.cap]
    if caps and backend not in ("blocks", "flex"):
        return f"it has no cap of the scores, and score_cap is {caps[0]}"
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for part in parts for x in part.tiling_inputs):
        return "what is added to the scores learns, which needs the scores themselves (frozen, it does not)"
    if backend in ("blocks", "efficient"):
        return ""
    if backend == "triton":
        return next(filter(None, (triton_launch.obstacle(part.q, part.v) for part in parts)), "")
    if backend == "xformers" and not xformers.installed():
        return xformers.MISSING
    if dropout > 0 and (backend in ("flex", "xformers") or FLASH[device] is Flash):
        return (
            f"attention dropout {dropout} needs the weights themselves, which it never holds (attention_dropout=0 "
            "allows it)"
        )
    if backend == "flex":
        return flex.obstacle(parts)
    if backend == "xformers":
        return ""
    return _no_flash(parts) if FLASH[device] is FlashCuda else ""


def _no_flash(parts: Sequence[Part]) -> str:
    """The reason why torch's flash operators for CUDA cannot compute these parts; "" if they can.

    Padded keys could be passed as sequences without a query (`cum_seq_q`, `cum_seq_k`). Whether the backward pass
    writes zeros for them has not been tested on a card, so padding goes to other backends.
    """
    if lacking := has_no_flash(parts[0].q.device):
        return lacking
    for part in parts:
        widest = max(part.q.shape[-1], part.v.shape[-1])
        if widest > 256:
            return f"it takes heads of at most 256 numbers, got {widest}"
        if not part.tiling_or_one.has_no_bias(part.tiling_inputs):
            return "it takes no bias, which padding and the tiles of some kinds need"
        if part.causal and part.q.shape[2] != part.k.shape[2]:
            return f"causal, it takes as many queries as keys, got {part.q.shape[2]} and {part.k.shape[2]}"
    return ""


@functools.cache
def has_no_flash(device: torch.device) -> str:
    """What torch's flash operators lack on a CUDA device; "" if nothing."""
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has none for CUDA"
    major, minor = capability(device)
    return "" if major >= 8 else f"it needs compute capability 8.0, this card has {major}.{minor}"


def _no_gain(parts: Sequence[Part]) -> str:
    """The reason why "auto" does not choose our own kernels where they can run; "" where they should be fastest."""
    kernels = [kernel for part in parts for _, kernel in part.tiling_or_one.one_pass()]
    if not kernels:
        return "it is for a band or rounds of hashing in one pass, and there is none"
    if parts[0].q.dtype not in HALF and any(isinstance(kernel, OnePass) for kernel in kernels):
        return f"in {_short(parts[0].q.dtype)} it does without tensor cores"
    return ""


def prepared(parts: Sequence[Part], backend: str) -> list[Part]:
    """The parts in the form that a backend takes."""
    return triton_launch.in_one_pass(parts) if backend == "triton" else list(parts)


def tiling_and_kernel(part: Part, backend: str, dropout: float, seed: int | None = None) -> tuple[Tiling, Kernel]:
    """The tiling and the kernel of a `prepared` part; seed: of dropout, drawn if None."""
    if backend == "triton":
        number = 0 if dropout == 0 else _number(drawn_seed()) if seed is None else seed
        if isinstance(part.tiling, InOnePass):
            groups = [
                (heads, replace(kernel, scale=part.scale, dropout=dropout, seed=number + index * 2**20))
                for index, (heads, kernel) in enumerate(part.tiling.groups)
            ]
            return InOnePass(groups), TritonTile()
        return part.tiling_or_one, TritonTile(part.scale, dropout, number)
    if backend in ("blocks", "reference"):  # in compiled code the plain form is not followed by autograd
        return part.tiling_or_one, Weights(
            dropout, _number(drawn_seed()) if seed is None else seed, part.scale, part.cap
        )
    if backend == "efficient":
        return part.tiling_or_one, Efficient(part.scale, dropout, seed)
    # a window that the operators take themselves
    window = part.tiling.plain_window if isinstance(part.tiling, Tiles) and part.tiling_inputs[0] is None else None
    if backend == "xformers":
        takes_window = window is not None and part.q.dtype not in SINGLE
        return (OneTile(), Xformers(part.scale, window)) if takes_window else (part.tiling_or_one, Xformers(part.scale))
    if FLASH[kind_of(part.q)] is Flash:
        return part.tiling_or_one, Flash(part.scale)
    return part.tiling_or_one if window is None else OneTile(), FlashCuda(part.scale, dropout, seed, window=window)


def drawn_seed() -> Tensor:
    """A seed from torch's generator: the same again when a checkpoint restores its state."""
    return torch.randint(2**62, (1,), device="cpu")


def _number(seed: Tensor) -> int:
    return 0 if isinstance(seed, FakeTensor) else int(seed)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
