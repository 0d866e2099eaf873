"""A linear site whose weight is stored as codes and made anew for each product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.codes import coded, decoded, margins
from effzoo.quantisation.view import Decoded
from effzoo.recompute import follows
from effzoo.sites import Acts, Linear, opens
from effzoo.sites.site import Inputs


class QuantisedLinear(Linear):
    """y = x W^T + b with W = `decoded(codes, scales)`, [..., in] -> [..., out]; nothing of W is trained.

    W is dense while one product runs, forward or backward, and is not kept in between. Methods that change the weight
    (DoRA, masks, diff pruning) are given W; what they make of it is dense, and kept for the backward pass as in any
    other layer. `QuantisedLinear.made_of(site, bits)` turns a Linear into one in place, so that whoever holds the site
    goes on holding it.
    """

    codes: Tensor
    scales: Tensor
    bits = 8

    @staticmethod
    def made_of(site: Linear, bits: int) -> QuantisedLinear:
        """Replace the weight of a site by its codes."""
        return QuantisedLinear.holding(site, bits, *coded(site.weight, bits))

    @staticmethod
    def holding(site: Linear, bits: int, codes: Tensor, scales: Tensor) -> QuantisedLinear:
        """Replace the weight of a site by these codes."""
        del site.weight
        site.__class__ = QuantisedLinear
        quantised = cast(QuantisedLinear, site)
        quantised.bits = bits
        quantised.register_buffer("codes", codes)
        quantised.register_buffer("scales", scales)
        return quantised

    def dense(self) -> Linear:
        """The same site with a weight again, in place: what its codes stand for."""
        weight = self.numbers()
        del self.codes, self.scales, self.bits
        site = cast(Linear, self)
        site.__class__ = Linear
        bias = site._parameters.pop("bias")
        site.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        # behind the weight, as ever: methods that number a site's entries go by this order
        site.register_parameter("bias", bias)
        return site

    def numbers(self) -> Tensor:
        """The weight [out, in], made of the codes."""
        return decoded(self.codes, self.scales, torch.Size((self.out_features, self.in_features)), self.bits)

    def margins(self) -> Tensor:
        """How far each entry of the weight may be from the one that was quantised, [out, in]."""
        return margins(self.codes, self.scales, torch.Size((self.out_features, self.in_features)), self.bits)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """What methods and others read."""
        return Decoded.of(self)

    def base(self) -> dict[str, Any]:
        """The weight, to be read and copied, and the bias."""
        return {"weight": self.weight, **super().base()}

    def composed_weight(self, modules: Sequence[Acts] | None = None) -> Tensor:
        weight = self.numbers()
        return self.passed("weight", weight, modules).to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.combined(x) if self.active else self.multiplied(x, self.bias)

    def enter(self, modules: Sequence[Acts], *inputs: Tensor) -> tuple[Inputs, Tensor]:
        if any(opens(module, "weight") for module in modules):
            return super().enter(modules, *inputs)
        x = self.entered(modules, *inputs)
        return (x,), self.multiplied(x, self.composed_bias(modules))

    def multiplied(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b with the weight that the codes stand for."""
        return follows(self.times(x, bias), self.times, x, bias)

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        device = x.device.type
        if not x.is_meta and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        times: Any = _Times.apply
        y: Tensor = times(x, bias, self.codes, self.scales, (self.out_features, self.in_features), self.bits)
        return y


class _Times(torch.autograd.Function):
    """x W^T + b, whose backward pass makes W once more."""

    generate_vmap_rule = True  # adapters chosen by row map over this

    @staticmethod
    def forward(
        x: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor, shape: tuple[int, int], bits: int
    ) -> Tensor:
        weight = decoded(codes, scales, torch.Size(shape), bits)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, bias, codes, scales, ctx.shape, ctx.bits = inputs
        ctx.save_for_backward(codes, scales)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (codes, scales) = grads, ctx.saved_tensors
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = grad @ decoded(codes, scales, torch.Size(ctx.shape), ctx.bits).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias_dtype)
        return of_x, of_bias, None, None, None, None
