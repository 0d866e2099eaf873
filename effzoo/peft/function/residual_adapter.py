"""Residual adapters for convolutional networks (Rebuffi et al. 2017, arXiv:1705.08045; 2018, arXiv:1803.10082)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.errors import OptionError
from effzoo.peft.method import Layers, Method, Targets
from effzoo.registry import peft
from effzoo.sites import Conv2d, HookContext, PeftModule, Site


class SerialConvolution(PeftModule):
    """y' = y + M y with M [out, out] at every place; merged, the filters are W + M W and the bias b + M b."""

    delta_rank = None

    def __init__(self, channels: int):
        super().__init__()
        self.M = nn.Parameter(torch.zeros(channels, channels))

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        return y + F.conv2d(y, self.M[:, :, None, None])

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        M = self.M.to(weight)
        return torch.einsum("po,oihw->pihw", M, weight), None if bias is None else M @ bias


class ParallelConvolution(PeftModule):
    """y' = y + M x with M [out, in] at every place that the filters are centred on.

    Merged, M is added to the middle of the filters.
    """

    delta_rank = None

    def __init__(self, site: Conv2d):
        super().__init__()
        self.stride = site.stride
        self.M = nn.Parameter(torch.zeros(site.out_channels, site.in_channels))

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        return y + F.conv2d(x, self.M[:, :, None, None], stride=self.stride)

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        change = torch.zeros_like(weight)
        change[:, :, weight.shape[2] // 2, weight.shape[3] // 2] = self.M.to(weight)
        return change, None


@peft.register("residual_adapter")
class ResidualAdapter(Method):
    """y' = y + M y after each convolution, M a 1 x 1 convolution (`series`, 2017), or y' = y + M x (`parallel`, 2018).

    form: "series" or "parallel"; parallel needs filters of odd size with padding that keeps their centre, kernel // 2.

    M starts at 0. The papers have batch normalisation between M and the sum, and train the domain's own normalisation;
    here a network without it is assumed, so that the adapter is linear and merges into the filters.
    """

    paper = (
        "Rebuffi et al. 2017, Learning multiple visual domains with residual adapters, arXiv:1705.08045, section "
        "3; 2018, arXiv:1803.10082"
    )
    accepts = (Conv2d,)
    default_targets = ("conv*",)
    learning_rate = 1e-3

    def __init__(
        self, *, form: Literal["series", "parallel"] = "series", targets: Targets = None, layers: Layers = None
    ):
        super().__init__(targets=targets, layers=layers)
        self.form = form

    def make(self, site: Site) -> PeftModule:
        assert isinstance(site, Conv2d)
        if self.form == "series":
            return SerialConvolution(site.out_channels)
        if any(size % 2 == 0 or pad != size // 2 for size, pad in zip(site.kernel_size, site.padding, strict=True)):
            raise OptionError(
                f"residual_adapter: form='parallel' needs odd filters with padding kernel // 2, {site.role!r} has "
                f"{site.kernel_size} with {site.padding}; use form='series'"
            )
        return ParallelConvolution(site)
