"""LeNet-300-100 as a network of sites, so that every method for a matrix can be hung on it (LeCun et al. 1998; as in
Frankle & Carbin 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.sites import Linear

HIDDEN = (300, 100)


@dataclass
class Output:
    """logits [batch, classes]; loss, the mean cross-entropy, where labels were given."""

    logits: Tensor
    loss: Tensor | None


class LeNet(nn.Module):
    """W_3 relu(W_2 relu(W_1 x)): three Linear sites without biases, with the roles `fc.0`, `fc.1`, `fc.2`.

    Without biases the matrices are all there is to train, and a mask on them is a mask on the network. They start
    Glorot normal, W ~ N(0, 2 / (in + out)), drawn from `seed`.
    """

    def __init__(self, inputs: int, classes: int = 10, hidden: Sequence[int] = HIDDEN, *, seed: int = 0):
        super().__init__()
        widths = (inputs, *hidden, classes)
        draw = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):  # what nn.Linear draws first is not kept
            self.layers = nn.ModuleList(
                Linear(before, after, bias=False, role=f"fc.{i}", layer=None)
                for i, (before, after) in enumerate(pairwise(widths))
            )
        with torch.no_grad():
            for weight in self.matrices():
                after, before = weight.shape
                weight.copy_(torch.randn(after, before, generator=draw) * (2 / (before + after)) ** 0.5)

    def matrices(self) -> list[Tensor]:
        """The matrices, from the first layer on."""
        return [layer.weight for layer in self.layers if isinstance(layer, Linear)]

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Output:
        """pixels [batch, 1, height, width]."""
        x = rearrange(pixels, "b c h w -> b (c h w)")
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        logits = self.layers[-1](x)
        return Output(logits, None if labels is None else F.cross_entropy(logits, labels))
