"""PHM adapters and Compacter: adapters whose matrices are sums of Kronecker products (Mahabadi et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.annotations import Count, Positive
from effzoo.errors import OptionError
from effzoo.peft.function.houlsby import ACTIVATIONS, check_bottleneck
from effzoo.peft.method import Layers, Method, Targets
from effzoo.peft.parameter.selective_methods import Copy
from effzoo.registry import peft
from effzoo.sites import Branch, HookContext, Norm, PeftModule, Positionwise, Site


class PHM(nn.Module):
    """W x + b with W = sum_i A_i kron B_i, A [n, n, n] and B [n, out / n, in / n].

    W is formed for each pass, which costs less than applying its factors to more than a few tokens (section 3.1; Zhang
    et al. 2021, arXiv:2102.08597).
    """

    def __init__(self, inputs: int, outputs: int, rules: nn.Parameter):
        super().__init__()
        self.A = rules
        self.B = nn.Parameter(torch.empty(len(rules), outputs // len(rules), inputs // len(rules)))
        self.bias = nn.Parameter(torch.zeros(outputs))
        for B in self.B:
            nn.init.xavier_uniform_(B, gain=math.sqrt(2))

    def matrix(self) -> Tensor:
        """W, [out, in]."""
        return rearrange(torch.einsum("iab,ioc->aobc", self.A, self.B), "a o b c -> (a o) (b c)")

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(), self.bias)


class LowRankPHM(nn.Module):
    """W x + b with W = sum_i A_i kron (s_i t_i^T), s [n, out / n, rank] and t [n, in / n, rank] (LPHM, section 3.2).

    W is never formed. With X = x as a matrix [n, in / n], W x is sum_i A_i X t_i s_i^T: n rank (in + out + n^2)
    products instead of in * out.
    """

    def __init__(self, inputs: int, outputs: int, rules: nn.Parameter, rank: int):
        super().__init__()
        n = len(rules)
        self.A = rules
        self.s = nn.Parameter(torch.empty(n, outputs // n, rank))
        self.t = nn.Parameter(torch.empty(n, inputs // n, rank))
        self.bias = nn.Parameter(torch.zeros(outputs))
        for factor in (*self.s, *self.t):
            nn.init.xavier_uniform_(factor, gain=math.sqrt(2))

    def matrix(self) -> Tensor:
        """W, [out, in]: for reading and for tests."""
        return rearrange(torch.einsum("iab,ior,icr->aobc", self.A, self.s, self.t), "a o b c -> (a o) (b c)")

    def forward(self, x: Tensor) -> Tensor:
        X = rearrange(x, "... (b c) -> ... b c", b=len(self.A))
        narrow = torch.einsum("...bc,icr->...ibr", X, self.t)
        turned = torch.einsum("iab,...ibr->...iar", self.A, narrow)
        out = torch.einsum("...iar,ior->...ao", turned, self.s)
        return rearrange(out, "... a o -> ... (a o)") + self.bias


class Hypercomplex(Positionwise, PeftModule):
    """y' = y + up(sigma(down(y))), two PHM layers."""

    def __init__(self, down: nn.Module, up: nn.Module, activation: str):
        super().__init__()
        self.down, self.up, self.activation = down, up, ACTIVATIONS[activation]()

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        return y + self.up(self.activation(self.down(y)))


@peft.register("phm", "phm_adapter")
class PHMAdapter(Method):
    """y' = y + W_up sigma(W_down y) after each sub-layer, with W = sum_i A_i kron B_i; the norms are trained too.

    bottleneck: inner width, a multiple of n, as the model's width must be.
    n: products in a sum, and the size of the square A_i.
    activation: sigma.
    std: of the normal distribution that A starts from.

    Each matrix has an A of its own, and about 1 / n of the parameters of a full one.
    """

    paper = "Mahabadi et al. 2021, Compacter, arXiv:2106.04647, section 3.1 and 5 (PHM-Adapter)"
    identity_at_init = False
    accepts = (Branch, Norm)
    default_targets: tuple[str, ...] = ("attn.branch", "mlp.branch", "attn.norm", "mlp.norm")
    size = "bottleneck"
    learning_rate = 3e-3

    def __init__(
        self,
        *,
        bottleneck: Count = 24,
        n: Count = 4,
        activation: str = "gelu",
        std: Positive = 0.01,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(targets=targets, layers=layers)
        check_bottleneck(self.name, bottleneck, activation)
        if bottleneck % n:
            wider = -(-bottleneck // n) * n
            raise OptionError(
                f"{self.name}: n divides bottleneck, got n={n}, bottleneck={bottleneck}; try bottleneck={wider}"
            )
        self.bottleneck, self.n, self.activation, self.std = bottleneck, n, activation, std

    def make(self, site: Site) -> PeftModule:
        if not isinstance(site, Branch):
            return Copy(**site.base())
        if site.dim % self.n:
            raise OptionError(
                f"{self.name}: n={self.n} does not divide the width {site.dim} of {site.role!r}; choose a divisor"
            )
        return Hypercomplex(
            self.layer(site.dim, self.bottleneck), self.layer(self.bottleneck, site.dim), self.activation
        )

    def layer(self, inputs: int, outputs: int) -> nn.Module:
        """One PHM layer."""
        return PHM(inputs, outputs, self.rules())

    def rules(self) -> nn.Parameter:
        """New rules A."""
        return nn.Parameter(torch.randn(self.n, self.n, self.n) * self.std)


@peft.register("compacter")
class Compacter(PHMAdapter):
    """y' = y + W_up sigma(W_down y) with W = sum_i A_i kron (s_i t_i^T), the A_i shared by the model; the norms are
    trained too.

    bottleneck: inner width, a multiple of n (the paper: a 32nd of the model's width).
    n: products in a sum, and the size of the square A_i.
    rank: of s_i t_i^T; 1 in the paper.
    activation: sigma.
    std: of the normal distribution that A starts from; a shared A starts smaller than that of `phm`, as in the code of
        the paper.

    The A of all layers together has n^3 parameters, an adapter about 2 rank (width + bottleneck).
    """

    paper = (
        "Mahabadi et al. 2021, Compacter: Efficient low-rank hypercomplex adapter layers, arXiv:2106.04647, section 3.2"
    )
    size = "rank"

    def __init__(
        self,
        *,
        bottleneck: Count = 24,
        n: Count = 4,
        rank: Count = 1,
        activation: str = "gelu",
        std: Positive = 1e-4,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(bottleneck=bottleneck, n=n, activation=activation, std=std, targets=targets, layers=layers)
        self.rank = rank

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        self.shared = self.rules()

    def layer(self, inputs: int, outputs: int) -> nn.Module:
        return LowRankPHM(inputs, outputs, self.shared, self.rank)


@peft.register("compacter_plus", "compacter_plus_plus")
class CompacterPlus(Compacter):
    """Compacter after the feed-forward alone; the norms are trained too.

    bottleneck, n, rank, activation, std: as in `compacter`.
    """

    paper = "Mahabadi et al. 2021, Compacter, arXiv:2106.04647, section 3.2 (Compacter++)"
    default_targets = ("mlp.branch", "attn.norm", "mlp.norm")
