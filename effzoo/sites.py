"""Sites: the places of a model where a PEFT module can be hung.

Everything with a weight is a site (Linear, LayerNorm, RMSNorm, Embedding, TiedLinear); two weightless Branch sites per block see what a
sub-layer adds to the residual stream, and one Memory site per attention layer holds extra keys and values. A site is a
thin subclass that owns an empty ModuleDict, so hanging a module on it renames no base key: new keys contain
`.adapters.<adapter name>.<method name>.`.

A module enters a site through a door, by overriding its method (unified view: He et al. 2022, arXiv:2110.04366):

    door        method                          composition
    parameter   weight(w) -> w', bias(b) -> b'  f(theta + phi)
    input       rows() -> rows, memory() -> k,v f([phi, x])
    function    before(x) -> x', after(x, y) -> y'   phi(f(x))
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.errors import OptionError


class PeftModule(nn.Module):
    """What is hung on a site; every door is open and does nothing until it is overridden."""

    def weight(self, weight: Tensor) -> Tensor:
        return weight

    def bias(self, bias: Tensor) -> Tensor:
        return bias

    def before(self, x: Tensor) -> Tensor:
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def rows(self) -> Tensor | None:
        """Embedding rows put in front of every input, [rows, dim]."""
        return None

    def memory(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values that every query of the layer also sees, each [heads, rows, head_dim]."""
        return None

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """What merging adds to the site's weight and bias so that the function door is no longer needed.

        None when no such change exists. Computed in the dtype of `weight`, which `merge` makes float64. Modules that
        enter through the parameter door need not override it: the door itself says what the merged tensors are.
        """
        return None

    def opens(self, *doors: str) -> bool:
        """Whether this module overrides one of the named doors."""
        return any(getattr(type(self), door) is not getattr(PeftModule, door) for door in doors)


class Site(nn.Module):
    """Mixin: a role in the model (`attn.q`), the block it belongs to (None outside the blocks), and the modules hung here."""

    role: str
    layer: int | None
    adapters: nn.ModuleDict
    active: tuple[str, ...]

    def _open(self, role: str, layer: int | None) -> None:
        self.role, self.layer, self.active = role, layer, ()
        self.adapters = nn.ModuleDict()

    def hang(self, adapter: str, method: str, module: PeftModule) -> None:
        """Hang a module under an adapter's name; the adapter is not made active here."""
        if adapter not in self.adapters:
            self.adapters[adapter] = nn.ModuleDict()
        modules = self.of(adapter)
        if method in modules:
            raise OptionError(
                f"adapter {adapter!r} would hang two {method!r} modules on {self.role!r}; give the two specs disjoint targets or layers"
            )
        modules[method] = module

    def of(self, adapter: str) -> nn.ModuleDict:
        """The modules of one adapter by method."""
        return cast(nn.ModuleDict, self.adapters[adapter])

    def hung(self, *adapters: str) -> Iterator[PeftModule]:
        """The modules of the named adapters (default: the active ones), in the order in which they act."""
        for adapter in adapters or self.active:
            if adapter in self.adapters:
                yield from cast("Iterator[PeftModule]", self.of(adapter).values())

    def base(self) -> dict[str, nn.Parameter]:
        """The site's own parameters, without what is hung on it."""
        return dict(self.named_parameters(recurse=False))

    def composed_weight(self) -> Tensor:
        """The site's weight as it passes through the parameter door of the active modules."""
        weight = cast(Tensor, self.weight)
        for module in self.hung():
            weight = module.weight(weight)
        return weight

    def composed_bias(self) -> Tensor | None:
        """The site's bias, likewise; None when it has none."""
        bias = cast("Tensor | None", self.bias)
        if bias is None:
            return None
        for module in self.hung():
            bias = module.bias(bias)
        return bias


class Linear(nn.Linear, Site):
    """y = x W^T + b, [..., in] -> [..., out]."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, role: str, layer: int | None = None):
        super().__init__(in_features, out_features, bias)
        self._open(role, layer)

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return F.linear(x, self.weight, self.bias)
        modules = tuple(self.hung())
        for module in modules:
            x = module.before(x)
        y = F.linear(x, self.composed_weight(), self.composed_bias())
        for module in modules:
            y = module.after(x, y)
        return y


class TiedLinear(Site):
    """y = x W^T + b with a weight that another site owns (a language-model head tied to the embedding)."""

    def __init__(self, out_features: int, bias: bool, *, role: str, layer: int | None = None):
        super().__init__()
        self._open(role, layer)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        y = F.linear(x, weight, self.composed_bias())
        for module in self.hung():
            y = module.after(x, y)
        return y


class Norm(Site):
    """What LayerNorm and RMSNorm have in common: they normalise the last axis and scale it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.normalise(x, self.composed_weight(), self.composed_bias())
        for module in self.hung():
            y = module.after(x, y)
        return y

    def normalise(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError


class LayerNorm(Norm, nn.LayerNorm):
    """(x - mean) / sqrt(var + eps) * w + b over the last axis (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, dim: int, eps: float, *, bias: bool = True, role: str, layer: int | None = None):
        nn.LayerNorm.__init__(self, dim, eps, bias=bias)
        self._open(role, layer)

    def normalise(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(Norm, nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * w over the last axis, the mean in float32 or better (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    bias = None

    def __init__(self, dim: int, eps: float, *, role: str, layer: int | None = None):
        nn.RMSNorm.__init__(self, dim, eps)
        self._open(role, layer)

    def normalise(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(exact, self.normalized_shape, None, self.eps).to(x.dtype) * weight


class Embedding(nn.Embedding, Site):
    """Rows of a table, [...] integers -> [..., dim]."""

    def __init__(self, rows: int, dim: int, *, role: str, layer: int | None = None):
        super().__init__(rows, dim)
        self._open(role, layer)

    def forward(self, ids: Tensor) -> Tensor:
        y = F.embedding(ids, self.composed_weight())
        for module in self.hung():
            y = module.after(ids, y)
        return y

    def prompt(self) -> Tensor | None:
        """The rows that active modules put in front of every input, [rows, dim], or None."""
        given = [module.rows() for module in self.hung()]
        rows = [each for each in given if each is not None]
        return torch.cat(rows) if rows else None


class Branch(Site):
    """The end of a sub-layer, before it joins the residual: x is the sub-layer's input, y its output, both [..., dim]."""

    def __init__(self, dim: int, *, role: str, layer: int | None = None):
        super().__init__()
        self._open(role, layer)
        self.dim = dim

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for module in self.hung():
            y = module.after(x, y)
        return y


class Memory(Site):
    """Extra keys and values of one attention layer, seen by every query: what prefix tuning trains."""

    def __init__(self, heads: int, head_dim: int, *, value_dim: int | None = None, role: str, layer: int | None = None):
        super().__init__()
        self._open(role, layer)
        self.heads, self.head_dim, self.value_dim = heads, head_dim, value_dim or head_dim

    def forward(self) -> tuple[Tensor, Tensor] | None:
        """Keys [heads, rows, head_dim] and values [heads, rows, value_dim], or None when nothing is hung here."""
        given = [module.memory() for module in self.hung()]
        found = [each for each in given if each is not None]
        if not found:
            return None
        return torch.cat([keys for keys, _ in found], dim=1), torch.cat([values for _, values in found], dim=1)


def sites(model: nn.Module) -> Iterator[tuple[str, Site]]:
    """Every site of a model with its dotted path."""
    for path, module in model.named_modules():
        if isinstance(module, Site):
            yield path, module
