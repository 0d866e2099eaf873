"""The two networks of Li et al. 2018 (arXiv:1804.08838, section 3.1) of sites, so that any method can be hung on them,
at any size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.errors import InputError
from effzoo.lab.analyses.lenet import Output
from effzoo.sites import Conv2d, Linear


class FullyConnected(nn.Module):
    """Linear layers with biases and ReLU between them, with the roles fc.0, fc.1, ....

    widths: of the input, the hidden layers and the output; (784, 200, 200, 10) are 199,210 parameters.
    """

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise InputError(
                "widths are those of the inputs, of every hidden layer and of the classes, at least 1 "
                f"each, got {tuple(widths)}"
            )
        pairs = enumerate(pairwise(widths))
        self.layers = nn.ModuleList(Linear(before, after, role=f"fc.{i}", layer=i) for i, (before, after) in pairs)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Output:
        """pixels [batch, 1, height, width]."""
        x = rearrange(pixels, "b c h w -> b (c h w)")
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return _output(self.layers[-1](x), labels)


class Convolutional(nn.Module):
    """LeNet-5: twice a convolution, ReLU and the maximum of 2 x 2 pixels, then linear layers.

    Roles are conv.0, conv.1, fc.0, fc.1, fc.2. 28 x 28 pixels with 6 and 16 channels, kernel 5 without padding and
    hidden (120, 84) are 44,426 parameters.

    channels, kernel, padding: of the convolutions.
    hidden: widths of the two linear layers before the last.
    """

    def __init__(
        self,
        size: tuple[int, int] = (28, 28),
        *,
        channels: tuple[int, int] = (6, 16),
        kernel: int = 5,
        padding: int = 0,
        hidden: tuple[int, int] = (120, 84),
        classes: int = 10,
    ):
        super().__init__()
        height, width = size
        for _ in channels:
            height, width = ((side + 2 * padding - kernel + 1) // 2 for side in (height, width))
        if min(height, width) < 1:
            raise InputError(
                f"images of {size[0]} x {size[1]} are too small for kernel={kernel} twice; give a "
                "smaller kernel, or padding"
            )
        first, second = channels
        self.convolutions = nn.ModuleList(
            Conv2d(before, after, kernel, padding=padding, role=f"conv.{i}", layer=i)
            for i, (before, after) in enumerate(((1, first), (first, second)))
        )
        widths = (second * height * width, *hidden, classes)
        pairs = enumerate(pairwise(widths))
        self.layers = nn.ModuleList(Linear(before, after, role=f"fc.{i}", layer=2 + i) for i, (before, after) in pairs)

    def filters(self) -> list[Conv2d]:
        """The convolutions, in order."""
        return [part for part in self.convolutions if isinstance(part, Conv2d)]

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Output:
        """pixels [batch, 1, height, width]."""
        x = pixels
        for convolution in self.convolutions:
            x = F.max_pool2d(convolution(x).relu(), 2)
        x = rearrange(x, "b c h w -> b (c h w)")
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return _output(self.layers[-1](x), labels)


def _output(logits: Tensor, labels: Tensor | None) -> Output:
    return Output(logits, None if labels is None else F.cross_entropy(logits, labels))
