"""KronA: the change of a weight is a Kronecker product (Edalati et al. 2022, arXiv:2212.10650)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from effzoo.annotations import Count, NonZero
from effzoo.errors import OptionError
from effzoo.peft.method import Layers, Method, Targets
from effzoo.registry import peft
from effzoo.sites import Branch, HookContext, Linear, PeftModule, Positionwise, Site


def kronecker(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """(A kron B) x without the product: with X = x as a matrix [a2, b2], it is A X B^T, flattened.

    A: [a1, a2].
    B: [b1, b2].
    x: [..., a2 b2], to [..., a1 b1].

    The cheaper of the two orders is taken.
    """
    (a1, a2), (b1, b2) = A.shape, B.shape
    X = rearrange(x, "... (a b) -> ... a b", a=a2)
    Y = A @ (X @ B.T) if b1 * a2 * (b2 + a1) <= b2 * a1 * (a2 + b1) else (A @ X) @ B.T
    return rearrange(Y, "... a b -> ... (a b)")


def balanced(size: int) -> int:
    """The largest divisor of a size that is at most its root: 24 for 768 = 24 * 32."""
    return next(divisor for divisor in range(math.isqrt(size), 0, -1) if size % divisor == 0)


def factors(method: str, outputs: int, inputs: int, shape: Sequence[int] | None, role: str) -> tuple[Tensor, Tensor]:
    """A [a1, a2] of zeros and B [out / a1, in / a2], uniform as in a linear layer, so that A kron B starts at 0."""
    a1, a2 = (balanced(outputs), balanced(inputs)) if shape is None else shape
    if outputs % a1 or inputs % a2:
        raise OptionError(
            f"{method}: A of shape ({a1}, {a2}) does not divide {role!r}, which is {outputs} x {inputs}; give a shape "
            f"of divisors, ({balanced(outputs)}, {balanced(inputs)}) say, or none for that one"
        )
    B = torch.empty(outputs // a1, inputs // a2)
    nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    return torch.zeros(a1, a2), B


class Kronecker(Positionwise, PeftModule):
    """y' = y + s (A kron B) x; merged, the weight changes by s A kron B, of rank (rank A) (rank B)."""

    def __init__(self, A: Tensor, B: Tensor, scale: float):
        super().__init__()
        self.scale, self.delta_rank = scale, min(A.shape) * min(B.shape)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        return y + kronecker(x, self.scale * self.A, self.B)

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.scale * torch.kron(self.A.to(weight), self.B.to(weight)), None


class KroneckerAdapter(Positionwise, PeftModule):
    """y' = y + s (A kron B) x + s_res x, where x is the feed-forward's input and y its output."""

    def __init__(self, A: Tensor, B: Tensor, scale: float, residual: bool):
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.scale = scale
        self.residual = nn.Parameter(torch.zeros(())) if residual else None

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        y = y + kronecker(x, self.scale * self.A, self.B)
        return y if self.residual is None else y + self.residual * x


@peft.register("krona")
class KronA(Method):
    """W' = W + s A kron B, with A [a1, a2] and B [out / a1, in / a2], of full rank where A and B are.

    shape: (a1, a2) of A, which must divide (out, in); None for the divisors nearest below the roots (24 and 32 of 768),
        which makes both factors as square, and the number of parameters as small, as can be.
    scale: s.

    It trains a1 a2 + (out / a1) (in / a2) numbers for each matrix. The product is never formed in training.
    """

    paper = "Edalati et al. 2022, KronA: Parameter-efficient tuning with Kronecker adapter, arXiv:2212.10650, section 3"
    accepts: ClassVar[tuple[type[Site], ...]] = (Linear,)
    default_targets: tuple[str, ...] = ("attn.q*", "attn.v*")
    learning_rate = 5e-3

    def __init__(
        self,
        *,
        shape: Sequence[Count] | None = None,
        scale: NonZero = 1.0,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(targets=targets, layers=layers)
        if shape is not None and len(shape) != 2:
            raise OptionError(f"{self.name}: shape is that of A, two numbers from 1 up, got {tuple(shape)}")
        self.shape, self.scale = shape, scale

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Linear)
        return Kronecker(*factors(self.name, site.out_features, site.in_features, self.shape, site.role), self.scale)


@peft.register("krona_b")
class KronAB(KronA):
    """y = FFN(x) + s (A kron B) x: a parallel adapter without an activation, whose matrix is a Kronecker product.

    shape: (a1, a2) of A; None for factors as square as can be.
    scale: s.

    It is no change of a weight, so it cannot be merged.
    """

    paper = "Edalati et al. 2022, KronA, arXiv:2212.10650, section 3 (KronA^B)"
    accepts = (Branch,)
    default_targets = ("mlp.branch",)
    learning_rate = 2e-3
    residual = False

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Branch)
        return KroneckerAdapter(
            *factors(self.name, site.dim, site.dim, self.shape, site.role), self.scale, self.residual
        )


@peft.register("krona_res", "krona_b_res")
class KronABRes(KronAB):
    """y = FFN(x) + s (A kron B) x + s_res x, with a trained s_res that starts at 0.

    shape: (a1, a2) of A; None for factors as square as can be.
    scale: s.
    """

    paper = "Edalati et al. 2022, KronA, arXiv:2212.10650, section 3 (KronA^B_res)"
    residual = True
