"""Bottleneck adapters after both sub-layers (Houlsby et al. 2019, arXiv:1902.00751)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from effzoo.annotations import Count, Positive
from effzoo.errors import OptionError
from effzoo.peft.method import Layers, Method, Targets
from effzoo.peft.parameter.selective_methods import Copy
from effzoo.registry import peft
from effzoo.sites import Branch, HookContext, Norm, PeftModule, Positionwise, Site

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}


class Bottleneck(Positionwise, PeftModule):
    """y' = y + W_up sigma(W_down y + b_down) + b_up, with W_down [bottleneck, dim] and W_up [dim, bottleneck]."""

    def __init__(self, dim: int, bottleneck: int, activation: str, std: float):
        super().__init__()
        self.down, self.up = nn.Linear(dim, bottleneck), nn.Linear(bottleneck, dim)
        self.activation = ACTIVATIONS[activation]()
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(linear.bias)

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        return y + self.up(self.activation(self.down(y)))


def check_bottleneck(method: str, bottleneck: int, activation: str) -> None:
    """OptionError for a width below 1 or an unknown activation."""
    if bottleneck < 1:
        raise OptionError(f"{method}: bottleneck is at least 1, got {bottleneck}")
    if activation not in ACTIVATIONS:
        raise OptionError(f"{method}: activation is one of {', '.join(ACTIVATIONS)}, got {activation!r}")


@peft.register("houlsby", "adapter")
class Houlsby(Method):
    """y' = y + W_up sigma(W_down y) at the end of each sub-layer, before the residual is added; the norms are trained
    too.

    bottleneck: inner width; each adapter has 2 bottleneck dim + bottleneck + dim parameters.
    activation: sigma; gelu, relu, silu or tanh.
    std: of the truncated normal that both matrices start from, which makes the adapter nearly, not exactly, the
        identity (section 2.1; any std up to 1e-2 serves).
    """

    paper = "Houlsby et al. 2019, Parameter-efficient transfer learning for NLP, arXiv:1902.00751, section 2.1"
    identity_at_init = False
    accepts: ClassVar[tuple[type[Site], ...]] = (Branch, Norm)
    default_targets: tuple[str, ...] = ("attn.branch", "mlp.branch", "attn.norm", "mlp.norm")
    size = "bottleneck"
    learning_rate = 1e-3

    def __init__(
        self,
        *,
        bottleneck: Count = 64,
        activation: str = "gelu",
        std: Positive = 1e-2,
        targets: Targets = None,
        layers: Layers = None,
    ):
        super().__init__(targets=targets, layers=layers)
        check_bottleneck(self.name, bottleneck, activation)
        self.bottleneck, self.activation, self.std = bottleneck, activation, std

    def make(self, site: Site) -> PeftModule:
        if isinstance(site, Branch):
            return Bottleneck(site.dim, self.bottleneck, self.activation, self.std)
        return Copy(**site.base())
