"""One attention layer with its projections, as something that can be run, checked and timed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from effzoo.attention import Cache, Context, Mask
from effzoo.blocks.attention import Attention
from effzoo.errors import OptionError
from effzoo.spec import parse_one

Mode = Literal["forward", "train", "decode"]
MODES: tuple[str, ...] = get_args(Mode)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# of the error's norm, in parts of the value's
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-3}
LONGEST_CHECK = 512  # the definition takes n^2 memory


@dataclass(frozen=True)
class Case:
    """What is measured: an attention kind (a spec), how it is used, and its sizes.

    mode: "forward", without gradients; "train", forward and backward; "decode", the next token of a causal layer that
        has seen n - 1.
    """

    attention: str
    mode: Mode
    n: int
    dim: int = 512
    heads: int = 8
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.mode not in MODES or self.dtype not in DTYPES:
            raise OptionError(
                f"mode is one of {', '.join(MODES)} and dtype one of {', '.join(DTYPES)}, got "
                f"{self.mode!r} and {self.dtype!r}"
            )
        if min(self.n, self.dim, self.heads, self.batch) < 1 or self.dim % self.heads:
            raise OptionError(
                f"sizes are at least 1, and heads divide dim; got n={self.n}, dim={self.dim}, "
                f"heads={self.heads}, batch={self.batch}"
            )

    @property
    def causal(self) -> bool:
        return self.mode == "decode"

    def layer(self) -> Attention:
        """The layer, with weights drawn from seed 0."""
        context = Context(
            heads=self.heads, head_dim=self.dim // self.heads, causal=self.causal, max_length=max(self.n, 16)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = Attention(self.dim, parse_one(self.attention), context)
            layer.core.initialise()
        return layer.to(device=self.device, dtype=DTYPES[self.dtype]).train(self.mode == "train")

    def input(self, n: int | None = None) -> Tensor:
        """x [batch, n, dim], drawn from seed 1."""
        x = torch.randn(self.batch, n or self.n, self.dim, generator=torch.Generator().manual_seed(1))
        return x.to(device=self.device, dtype=DTYPES[self.dtype])

    def runner(self) -> Callable[[], object]:
        """What is timed: one call is one pass."""
        layer = self.layer()
        if self.mode == "forward":
            x, mask = self.input(), Mask()

            @torch.no_grad()
            def forward() -> Tensor:
                out: Tensor = layer(x, mask)
                return out

            return forward
        if self.mode == "decode":
            return _decoder(layer, self)
        x, upstream = self.input().requires_grad_(), self.input()

        def train() -> None:
            layer.zero_grad(set_to_none=True)
            x.grad = None
            layer(x, Mask()).backward(upstream)

        return train


def supported(case: Case) -> str:
    """Why the kind cannot do this, or nothing."""
    from effzoo.registry import attention

    core = attention.get(parse_one(case.attention).name)
    if case.mode == "decode" and not core.decodes():
        return f"cannot be causal: {core.not_causal}" if core.not_causal else "keeps no cache for decoding"
    return ""


@torch.no_grad()
def _decoder(layer: Attention, case: Case) -> Callable[[], object]:
    """The next token; each call goes on from the one before it, so that nothing of the cache is copied, as in
    `effzoo.generate`."""
    cache = Cache()
    x = case.input()
    layer(x[:, :-1], Mask(), cache=cache)

    @torch.no_grad()
    def step() -> Tensor:
        out: Tensor = layer(x[:, -1:], Mask(), cache=cache)
        return out

    return step


def wrong(case: Case) -> str:
    """What differs from the definition, or nothing: output and gradient of the input against `core.dense` in float64.

    Up to `LONGEST_CHECK` positions and two sequences. The definition runs first, and its discrete choices (hash
    buckets) are used again.
    """
    n, case = min(case.n, LONGEST_CHECK), replace(case, batch=min(case.batch, 2))
    for what, error in differences(case.layer(), case.input(n), case.input(n), Mask(decisions={})).items():
        if not error <= TOLERANCE[case.dtype]:
            return (
                f"the {what} differs from the definition by {error:.1e} of its norm, more than "
                f"{TOLERANCE[case.dtype]:.0e} (n = {n}, {case.dtype})"
            )
    return ""


def differences(layer: Attention, x: Tensor, upstream: Tensor, mask: Mask) -> dict[str, float]:
    """|layer - definition| / |definition| in float64, of the output and of the gradient of x, padding included.

    upstream: the gradient of the output.
    mask: with `decisions`, so that the definition, which runs first, makes the discrete choices for both.
    """
    exact = copy.deepcopy(layer).double()
    exact.core.forward = exact.core.dense  # type: ignore[method-assign]
    exact.core.project = lambda name, x, linear, mask: linear(x)  # type: ignore[method-assign]
    # says on which device the definition is
    valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask.valid is None else mask.valid
    wanted = _through(exact, x.double(), upstream.double(), Mask(valid, decisions=mask.decisions))
    got = _through(layer, x, upstream, mask)
    names = ("output", "gradient of the input")
    return {
        what: float((mine.double() - theirs).norm() / theirs.norm())
        for what, mine, theirs in zip(names, got, wanted, strict=True)
    }


def _through(layer: Attention, x: Tensor, upstream: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = layer(x, mask)
    return out.detach(), torch.autograd.grad(out, x, upstream)[0]
