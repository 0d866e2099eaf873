"""The layers of a model as sites: those with a weight, and the ends of the sub-layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.devices import kind_of
from effzoo.errors import IncompatibleError
from effzoo.recompute import made_again
from effzoo.sites.dtypes import autocasts, linear
from effzoo.sites.extras import own_outputs
from effzoo.sites.hooks import Acts
from effzoo.sites.site import Inputs, Site, present


class Linear(nn.Linear, Site):
    """y = x W^T + b, [..., in] -> [..., out]. heads: of an attention projection, and of the input of `attn.o`."""

    heads = 1

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, role: str, layer: int | None = None):
        super().__init__(in_features, out_features, bias)
        self._open(role, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.combined(x) if self.active else self.product(x, self.weight, self.bias)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b."""
        return linear(x, weight, bias)

    def outputs(self, *names: str) -> int:
        """The number of outputs with these adapters, one after the other: of the last that replaces the weight.

        Raises IncompatibleError where one adapter changes the site's weight and another replaces it by one of another
        size.
        """
        modules = [(name, module) for name in names for module in self.hung(name)]
        replaced = {name: outputs for name, module in modules if (outputs := own_outputs(module)) is not None}
        other = next((name for name, outputs in replaced.items() if outputs != self.out_features), None)
        changing = next((name for name, module in modules if own_outputs(module) is None), None)
        if other is not None and changing is not None:
            raise IncompatibleError(
                f"{self.role}: adapter {changing!r} changes the model's own head, which has {self.out_features} "
                f"outputs, and {other!r} brings one with {replaced[other]}; activate only one of them"
            )
        return list(replaced.values())[-1] if replaced else self.out_features

    def outputs_now(self) -> int:
        """`outputs` of the active adapters. Raises IncompatibleError where they differ and are averaged, or chosen by
        row."""
        now, here = self.now, self.adapters
        if not (now.average or now.rows is not None):
            return self.outputs(*now.names)
        sizes = {name: self.outputs(name) for name in now.names if name in here or not now.average}
        if now.rows is not None and -1 in now.rows:
            sizes["the bare base"] = self.out_features
        if len(set(sizes.values())) > 1:
            how = "averaged" if now.average else "computed by row in one batch"
            listed = ", ".join(f"{outputs} ({name})" for name, outputs in sizes.items())
            raise IncompatibleError(
                f"{self.role}: heads with {listed} outputs cannot be {how}; activate one adapter "
                "at a time, or those of equal size"
            )
        return next(iter(sizes.values()), self.out_features)

    def enter(self, modules: Sequence[Acts], *inputs: Tensor) -> tuple[Inputs, Tensor]:
        x = self.entered(modules, *inputs)
        return (x,), self.product(x, self.composed_weight(modules), self.composed_bias(modules))


class Conv2d(nn.Conv2d, Site):
    """A convolution over two axes, [batch, in, height, width] -> [batch, out, height', width']."""

    def __init__(
        self, channels: int, out_channels: int, kernel: int, *, stride: int = 1, padding: int = 0, bias: bool = True,
        role: str, layer: int | None = None,
    ):  # fmt: skip
        super().__init__(channels, out_channels, kernel, stride=stride, padding=padding, bias=bias)
        self._open(role, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.combined(x) if self.active else self.convolved(x, self.weight, self.bias)

    def convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution in the wider dtype of x and weight, returned in that of x."""
        if autocasts(x):
            return F.conv2d(x, weight, bias, self.stride, self.padding)
        widest = torch.promote_types(x.dtype, weight.dtype)
        bias = None if bias is None else bias.to(widest)
        return F.conv2d(x.to(widest), weight.to(widest), bias, self.stride, self.padding).to(x.dtype)

    def enter(self, modules: Sequence[Acts], *inputs: Tensor) -> tuple[Inputs, Tensor]:
        (x,) = inputs
        batched = self.entered(modules, x if x.ndim == 4 else x[None])
        return (batched,), self.convolved(batched, self.composed_weight(modules), self.composed_bias(modules))

    def compute(self, modules: Sequence[Acts], *inputs: Tensor) -> Tensor:
        y = super().compute(modules, *inputs)
        return y if inputs[0].ndim == 4 else y[0]


class TiedLinear(Site):
    """y = x W^T + b, [..., in] -> [..., out], with the weight of another site (a language-model head tied to the
    embedding). The adapters of that site act here too."""

    def __init__(self, in_features: int, out_features: int, bias: bool, *, role: str, layer: int | None = None):
        super().__init__()
        self._open(role, layer)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.table: tuple[Site, ...] = ()  # the other site during a call, in a tuple, so that it is no submodule

    @property
    def active(self) -> tuple[str, ...]:
        hanging, tables = self.hanging, [name for table in self.table for name in table.active]
        return tuple(name for name in self.now.names if name in hanging or name in tables) if tables else hanging

    def forward(self, x: Tensor, table: Site) -> Tensor:
        self.table = (table,)
        try:
            return self.combined(x) if self.active else linear(x, cast(Tensor, table.weight), self.bias)
        finally:
            self.table = ()

    def made_by(self, names: Sequence[str], *inputs: Tensor | None) -> Tensor:
        (table,) = self.table
        weight = table.composed_weight(tuple(table.acting(*names)) if names else ())
        return self.compute(tuple(self.acting(*names)) if names else (), *cast(Inputs, inputs), weight)

    def enter(self, modules: Sequence[Acts], *inputs: Tensor) -> tuple[Inputs, Tensor]:
        x, weight = inputs
        return (x,), linear(x, weight, self.composed_bias(modules))


class Norm(Site):
    """The sites LayerNorm and RMSNorm."""

    weight: nn.Parameter
    bias: Any

    def forward(self, x: Tensor) -> Tensor:
        if self.active:
            return self.combined(x)
        with made_again():
            return self.normalise(x, self.weight, self.bias)

    def enter(self, modules: Sequence[Acts], *inputs: Tensor) -> tuple[Inputs, Tensor]:
        (x,) = inputs
        # not rounded to the dtype of the weight: a norm computes in float32 or better
        weight = self.passed("weight", self.weight, modules)
        bias = None if self.bias is None else self.passed("bias", self.bias, modules)
        return (x,), self.normalise(x, weight, bias)

    def normalise(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError


class LayerNorm(Norm, nn.LayerNorm):
    """(x - mean) / sqrt(var + eps) * w + b over the last axis (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, dim: int, eps: float, *, bias: bool = True, role: str, layer: int | None = None):
        nn.LayerNorm.__init__(self, dim, eps, bias=bias)
        self._open(role, layer)

    def normalise(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if autocasts(x):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        widest = torch.promote_types(x.dtype, weight.dtype)
        widest = widest if bias is None else torch.promote_types(widest, bias.dtype)
        kernel_widens = kind_of(x) == "cpu" and widest == torch.float32  # a half x is then stored as it is
        exact, weight = x if kernel_widens else x.to(widest), weight.to(widest)
        bias = None if bias is None else bias.to(widest)
        return F.layer_norm(exact, self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class RMSNorm(Norm, nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * w over the last axis, the mean in float32 or better (Zhang & Sennrich 2019,
    arXiv:1910.07467)."""

    bias = None

    def __init__(self, dim: int, eps: float, *, role: str, layer: int | None = None):
        nn.RMSNorm.__init__(self, dim, eps)
        self._open(role, layer)

    def normalise(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = F.rms_norm(exact, self.normalized_shape, None, self.eps)
        if autocasts(x):
            return normed.to(x.dtype) * weight
        return (normed.to(torch.promote_types(x.dtype, weight.dtype)) * weight).to(x.dtype)


class RMSNormPlusOne(RMSNorm):
    """x / sqrt(mean(x^2) + eps) * (1 + w) over the last axis; w starts at 0 (Gemma: Gemma Team 2024, arXiv:2403.08295).

    The product is rounded once, to the dtype of x.
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def normalise(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        exact = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
        normed = F.rms_norm(x.to(exact), self.normalized_shape, None, self.eps)
        return (normed * (1 + weight.to(exact))).to(x.dtype)


class Embedding(nn.Embedding, Site):
    """table[ids], integers [...] -> [..., dim]; times `scale`, in the dtype of the table. added: entries that
    `effzoo.resize_vocabulary` has added."""

    added = 0
    scale: float | None = None

    def __init__(self, entries: int, dim: int, *, scale: float = 1.0, role: str, layer: int | None = None):
        super().__init__(entries, dim)
        if scale != 1:
            self.scale = scale
        self._open(role, layer)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.combined(ids) if self.active else F.embedding(ids, self.weight)
        if self.scale is None:
            return x
        return x * torch.full((), self.scale, dtype=torch.float32, device=x.device).to(self.weight.dtype)

    def enter(self, modules: Sequence[Acts], *inputs: Tensor) -> tuple[Inputs, Tensor]:
        (ids,) = inputs
        table = self.passed("weight", self.weight, modules)
        return (ids,), F.embedding(ids, table).to(self.weight.dtype)  # rounds the entries that are read alone

    def prompt(self) -> Tensor | None:
        """Prompt tokens of active modules [r, dim] or None; [batch, r, dim] where adapters are chosen by row."""
        by_adapter = [present(module.prompt() for module in self.acting(name)) for name in self.active]
        if not self.mixed:
            every = [tokens for of_adapter in by_adapter for tokens in of_adapter]
            return torch.cat(every) if every else None
        prompts = [torch.cat(of_adapter) for of_adapter in by_adapter if of_adapter]
        return self.mix(prompts) if prompts else None


class Branch(Site):
    """The end of a sub-layer, before it joins the residual: x is the sub-layer's input, y its output, both [...,
    dim]."""

    def __init__(self, dim: int, *, role: str, layer: int | None = None):
        super().__init__()
        self._open(role, layer)
        self.dim = dim

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.combined(x, y) if self.active else y

    def enter(self, modules: Sequence[Acts], *inputs: Tensor) -> tuple[Inputs, Tensor]:
        return inputs, inputs[1]


class Stream(Site):
    """The residual stream behind a block, [batch, n, dim], which a method may edit.

    causal: whether no position knows of the later ones.
    """

    def __init__(self, dim: int, *, role: str, layer: int | None = None, causal: bool = False):
        super().__init__()
        self._open(role, layer)
        self.dim, self.causal = dim, causal

    def forward(self, h: Tensor) -> Tensor:
        return self.combined(h) if self.active else h

    def enter(self, modules: Sequence[Acts], *inputs: Tensor) -> tuple[Inputs, Tensor]:
        return inputs, inputs[0]


class Keys(Site):
    """The normalised keys of an attention (`lsh`), [batch, n, dim], heads side by side.

    A method that scales keys, such as (IA)3, hangs here: a scale before the normalisation would cancel.
    """

    def __init__(self, dim: int, *, role: str, layer: int | None = None):
        super().__init__()
        self._open(role, layer)
        self.dim = dim

    def forward(self, keys: Tensor) -> Tensor:
        return self.combined(keys) if self.active else keys

    def enter(self, modules: Sequence[Acts], *inputs: Tensor) -> tuple[Inputs, Tensor]:
        return inputs, inputs[0]
