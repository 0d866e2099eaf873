"""LoRA on convolutions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.sites import Conv2d, HookContext, PeftModule


class LowRankConv(PeftModule):
    """y' = y + s B * (A * x): a convolution of the site's shape to `rank` channels, then one of 1 x 1.

    Merged, the flattened kernels change by s B A.
    """

    def __init__(self, site: Conv2d, rank: int, scale: float):
        super().__init__()
        outputs, *patch = site.weight.shape
        self.scale, self.stride, self.padding = scale, site.stride, site.padding
        self.delta_rank = min(rank, outputs, math.prod(patch))
        self.A = nn.Parameter(torch.empty(rank, *patch))
        self.B = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        narrow = self.scale * F.conv2d(x, self.A, None, self.stride, self.padding)
        return y + F.conv2d(narrow, self.B[:, :, None, None])

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.scale * torch.einsum("or,r...->o...", self.B.to(weight), self.A.to(weight)), None
