"""The layers of a model as sites: those with a weight, and the ends of the sub-layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.devices import kind_of
from effzoo.errors import IncompatibleError
from effzoo.recompute import made_again
from effzoo.sites.dtypes import autocasts, linear
from effzoo.sites.extras import own_outputs
from effzoo.sites.hooks import Acts
from effzoo.sites.site import Inputs, Site, given


class Linear(nn.Linear, Site):
    """y = x W^T + b, [..., in] -> [..., out]. heads: into how many heads the output (of `attn.o`: the input) divides; 1
    elsewhere."""

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
        """How many numbers come out with these adapters, one after the other: as many as the last weight of their own
        has, else the site's.

        Raises IncompatibleError where one of them changes the site's own weight and another one has put a weight of
            another size in its place.
        """
        modules = [(name, module) for name in names for module in self.hung(name)]
        own = {name: outputs for name, module in modules if (outputs := own_outputs(module)) is not None}
        other = next((name for name, outputs in own.items() if outputs != self.out_features), None)
        changing = next((name for name, module in modules if own_outputs(module) is None), None)
        if other is not None and changing is not None:
            raise IncompatibleError(
                f"{self.role}: adapter {changing!r} changes the model's own head, which has {self.out_features} "
                f"outputs, and {other!r} brings "
                f"one with {own[other]}; activate only one of them"
            )
        return list(own.values())[-1] if own else self.out_features

    def outputs_now(self) -> int:
        """`outputs` of the active adapters; where they are averaged, or chosen by row, all have to agree. Raises
        IncompatibleError."""
        now, here = self.now, self.adapters
        if not (now.average or now.rows is not None):
            return self.outputs(*now.names)
        each = {name: self.outputs(name) for name in now.names if name in here or not now.average}
        if now.rows is not None and -1 in now.rows:
            each["the bare base"] = self.out_features
        if len(set(each.values())) > 1:
            how = "averaged" if now.average else "computed by row in one batch"
            said = ", ".join(f"{outputs} ({name})" for name, outputs in each.items())
            raise IncompatibleError(
                f"{self.role}: heads with {said} outputs cannot be {how}; activate one adapter "
                "at a time, or those of equal size"
            )
        return next(iter(each.values()), self.out_features)

    def enter(self, modules: Sequence[Acts], *inputs: Tensor) -> tuple[Inputs, Tensor]:
        x = self.entered(modules, *inputs)
        return (x,), self.product(x, self.composed_weight(modules), self.composed_bias(modules))


class Conv2d(nn.Conv2d, Site):
    """A convolution over two axes, [batch, in, height, width] -> [batch, out, height', width']: sites are not only for
    transformers."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        role: str,
        layer: int | None = None,
    ):
        super().__init__(channels, out_channels, kernel, stride=stride, padding=padding, bias=bias)
        self._open(role, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.combined(x) if self.active else self.convolved(x, self.weight, self.bias)

    def convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution, in the dtype of x; computed in the weight's where that is wider."""
        if autocasts(x):
            return F.conv2d(x, weight, bias, self.stride, self.padding)
        widest = torch.promote_types(x.dtype, weight.dtype)
        return F.conv2d(
            x.to(widest), weight.to(widest), None if bias is None else bias.to(widest), self.stride, self.padding
        ).to(x.dtype)

    def enter(self, modules: Sequence[Acts], *inputs: Tensor) -> tuple[Inputs, Tensor]:
        (x,) = inputs
        batched = self.entered(modules, x if x.ndim == 4 else x[None])
        return (batched,), self.convolved(batched, self.composed_weight(modules), self.composed_bias(modules))

    def compute(self, modules: Sequence[Acts], *inputs: Tensor) -> Tensor:
        y = super().compute(modules, *inputs)
        return y if inputs[0].ndim == 4 else y[0]


class TiedLinear(Site):
    """y = x W^T + b, [..., in] -> [..., out], with a weight that another site owns (a language-model head tied to the
    embedding).

    What acts on that site acts here too, and in the same way: each adapter of an average, or of a row, has a table of
    its own.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, *, role: str, layer: int | None = None):
        super().__init__()
        self._open(role, layer)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        # the site whose weight is read, while it is; a tuple hides it from the parameters
        self.table: tuple[Site, ...] = ()

    @property
    def active(self) -> tuple[str, ...]:
        own, tables = self.hanging, [name for table in self.table for name in table.active]
        return tuple(name for name in self.now.names if name in own or name in tables) if tables else own

    def forward(self, x: Tensor, table: Site) -> Tensor:
        self.table = (table,)
        try:
            return self.combined(x) if self.active else linear(x, table.weight, self.bias)  # type: ignore[arg-type]
        finally:
            self.table = ()

    def made_by(self, names: Sequence[str], *inputs: Tensor | None) -> Tensor:
        (table,) = self.table
        weight = table.composed_weight(tuple(table.acting(*names)) if names else ())
        return self.compute(tuple(self.acting(*names)) if names else (), *inputs, weight)  # type: ignore[arg-type]

    def enter(self, modules: Sequence[Acts], *inputs: Tensor) -> tuple[Inputs, Tensor]:
        x, weight = inputs
        return (x,), linear(x, weight, self.composed_bias(modules))


class Norm(Site):
    """What LayerNorm and RMSNorm have in common: they normalise the last axis and scale it."""

    def forward(self, x: Tensor) -> Tensor:
        if self.active:
            return self.combined(x)
        with made_again():
            return self.normalise(x, self.weight, self.bias)  # type: ignore[arg-type]

    def enter(self, modules: Sequence[Acts], *inputs: Tensor) -> tuple[Inputs, Tensor]:
        (x,) = inputs
        # as exact as they are: a norm is computed in float32 or better
        weight = self.passed("weight", cast(Tensor, self.weight), modules)
        bias = None if self.bias is None else self.passed("bias", cast(Tensor, self.bias), modules)
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
        kernel_widens = kind_of(x) == "cpu" and widest == torch.float32  # of a half x, which then is kept as it is
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


class Embedding(nn.Embedding, Site):
    """Rows of a table, [...] integers -> [..., dim]. added: how many of the last rows `effzoo.resize_vocabulary` has
    added."""

    added = 0

    def __init__(self, rows: int, dim: int, *, role: str, layer: int | None = None):
        super().__init__(rows, dim)
        self._open(role, layer)

    def forward(self, ids: Tensor) -> Tensor:
        return self.combined(ids) if self.active else F.embedding(ids, self.weight)

    def enter(self, modules: Sequence[Acts], *inputs: Tensor) -> tuple[Inputs, Tensor]:
        (ids,) = inputs
        table = self.passed("weight", self.weight, modules)
        return (ids,), F.embedding(ids, table).to(self.weight.dtype)  # the rows are rounded, not the whole table

    def prompt(self) -> Tensor | None:
        """The rows that active modules put in front of every input, [rows, dim], or None; [batch, rows, dim] where
        adapters are chosen by row."""
        each = [given(module.prompt() for module in self.acting(name)) for name in self.active]
        if not self.mixed:
            put_in = [rows for of_adapter in each for rows in of_adapter]
            return torch.cat(put_in) if put_in else None
        prompts = [torch.cat(rows) for rows in each if rows]
        if not prompts:
            return None
        return self.mix(prompts)


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


class Keys(Site):
    """The keys of an attention that normalises them, [batch, n, dim], heads side by side: what a vector that scales
    keys must be applied to.

    Before the normalisation its length would cancel, and where queries are keys it would change the queries too.
    """

    def __init__(self, dim: int, *, role: str, layer: int | None = None):
        super().__init__()
        self._open(role, layer)
        self.dim = dim

    def forward(self, keys: Tensor) -> Tensor:
        return self.combined(keys) if self.active else keys

    def enter(self, modules: Sequence[Acts], *inputs: Tensor) -> tuple[Inputs, Tensor]:
        return inputs, inputs[0]
