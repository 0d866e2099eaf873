"""The feed-forward sub-layer (Vaswani et al. 2017, arXiv:1706.03762, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.recompute import made_again
from effzoo.sites import Linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class FeedForward(nn.Module):
    """W_down act(W_up x + b_up) + b_down, [..., dim] -> [..., dim] through [..., mlp].

    gated: W_down (act(W_gate x) * W_up x) instead (Shazeer 2020, arXiv:2002.05202).
    out_bias: whether W_down has a bias; None for `bias`, which says it of all.
    chunk: positions that are computed at a time, for less memory and the same result (Kitaev et al. 2020,
        arXiv:2001.04451, section 3); 0: all at once.
    dropout: of the hidden units.
    """

    def __init__(
        self,
        dim: int,
        mlp: int,
        activation: str,
        layer: int | None,
        *,
        gated: bool = False,
        bias: bool = True,
        out_bias: bool | None = None,
        chunk: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.gate = Linear(dim, mlp, bias=bias, role="mlp.gate", layer=layer) if gated else None
        self.up = Linear(dim, mlp, bias=bias, role="mlp.up", layer=layer)
        out_bias = bias if out_bias is None else out_bias
        self.down = Linear(mlp, dim, bias=out_bias, role="mlp.down", layer=layer)
        self.activation = ACTIVATIONS[activation]
        self.chunk = chunk
        self.dropout = nn.Dropout(dropout) if dropout else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.chunk or x.shape[1] <= self.chunk:
            return self.whole(x)
        return torch.cat([self.whole(part) for part in torch.split(x, self.chunk, dim=1)], dim=1)

    def whole(self, x: Tensor) -> Tensor:
        """All positions at once."""
        with made_again(products=True):  # hidden units are four times as wide as x
            hidden = self.activation(self.up(x)) if self.gate is None else self.activation(self.gate(x)) * self.up(x)
        return self.down(hidden if self.dropout is None else self.dropout(hidden))
