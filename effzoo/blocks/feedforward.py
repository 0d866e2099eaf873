"""The feed-forward sub-layer (Vaswani et al. 2017, arXiv:1706.03762, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.sites import Linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class FeedForward(nn.Module):
    """W_down act(W_up x + b_up) + b_down, [..., dim] -> [..., dim] through [..., mlp]."""

    def __init__(self, dim: int, mlp: int, activation: str, layer: int):
        super().__init__()
        self.up = Linear(dim, mlp, role="mlp.up", layer=layer)
        self.down = Linear(mlp, dim, role="mlp.down", layer=layer)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))
