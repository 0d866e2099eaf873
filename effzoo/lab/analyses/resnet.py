"""A small residual network with batch normalisation, of sites, with what of it is a domain's own (Rebuffi et al. 2017,
arXiv:1705.08045, section 3)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import effzoo
from effzoo.lab.analyses.lenet import Output
from effzoo.lab.fit import Batch
from effzoo.sites import Conv2d, Linear


class Residual(nn.Module):
    """x + BN(conv(relu(BN(conv(x))))), both convolutions 3 x 3 with the roles conv.i and conv.i+1."""

    def __init__(self, channels: int, number: int):
        super().__init__()
        self.convolutions = nn.ModuleList(
            Conv2d(channels, channels, 3, padding=1, role=f"conv.{number + i}", layer=number + i) for i in range(2)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norms[0](self.convolutions[0](x)).relu()
        return (x + self.norms[1](self.convolutions[1](inner))).relu()


class ResNet(nn.Module):
    """A convolution, residual blocks, the mean over places, and a linear layer; roles conv.0, conv.1, ..., fc.0.

    channels: of all convolutions.
    blocks: how many.
    """

    def __init__(self, channels: int = 16, blocks: int = 2, classes: int = 10):
        super().__init__()
        self.stem, self.norm = Conv2d(1, channels, 3, padding=1, role="conv.0", layer=0), nn.BatchNorm2d(channels)
        self.blocks = nn.ModuleList(Residual(channels, 1 + 2 * i) for i in range(blocks))
        self.head = Linear(channels, classes, role="fc.0", layer=1 + 2 * blocks)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Output:
        """pixels [batch, 1, height, width]."""
        x = self.norm(self.stem(pixels)).relu()
        for block in self.blocks:
            x = block(x)
        logits = self.head(x.mean(dim=(-1, -2)))
        return Output(logits, None if labels is None else F.cross_entropy(logits, labels))


WAYS = ("head", "norms", "adapters", "adapters and norms", "full")


def specialise(net: ResNet, way: str) -> int:
    """Make trainable what a new domain may train; the number of trained parameters.

    way: "head", the last layer alone; "norms", that and the scale and shift of every batch norm; "adapters", the head
        and a 1 x 1 convolution M after every convolution, BN(y + M y); "adapters and norms", as in the paper; "full".

    In every way the norms' running means and variances are those of the new domain once it is trained.
    """
    if "adapters" in way:
        effzoo.attach(net, "residual_adapter")
    for parameter in net.parameters():
        parameter.requires_grad_(way == "full")
    for name, module in net.named_modules():
        norm = isinstance(module, nn.BatchNorm2d) and "norms" in way
        if norm or module is net.head or name.endswith("residual_adapter"):
            for parameter in module.parameters():
                parameter.requires_grad_(True)
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def train(net: ResNet, batches: Iterator[Batch], steps: int, learning_rate: float) -> None:
    """Adam on all that is trainable, whether an adapter's, a norm's or the head's, at a rate that falls to 0; the
    network is left in evaluation mode."""
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=learning_rate)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    net.train()
    for _ in range(steps):
        loss = net(**next(batches)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
    net.eval()
