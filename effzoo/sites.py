"""Sites: the places of a model where a PEFT module can be hung.

Everything with a weight is a site (Linear, LayerNorm, RMSNorm, Embedding, TiedLinear); two weightless Branch sites per block see what a
sub-layer adds to the residual stream, and one Memory site per attention layer holds extra keys and values (where keys are normalised, a Keys
site sees them afterwards). A site is a thin subclass that owns an empty ModuleDict, so hanging a module on it renames no base key: new keys contain
`.adapters.<adapter name>.<method name>.`.

A module enters a site through a door, by overriding its method (unified view: He et al. 2022, arXiv:2110.04366):

    door        method                          composition
    parameter   weight(w) -> w', bias(b) -> b'  f(theta + phi)
    input       rows() -> rows, memory() -> k,v f([phi, x])
    function    before(x) -> x', after(x, y) -> y'   phi(f(x))

Three doors more are for methods that need to see more than their site: `joined` (after, with the padding), `remember` and `beyond` (memory, with the
layer's input), and `beside`, the one escape hatch, for a second network beside the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effzoo.errors import IncompatibleError, OptionError

KeysValues = tuple[Tensor, Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Seen:
    """What an attention layer shows to the modules of its memory site.

    x [batch, n, dim]: the layer's input. valid bool[batch, n]: tokens, or None when there is no padding. keys_values: rows [..., r, source_dim] ->
    the keys [..., heads, r, head_dim] and values that this layer's own projections make of them (not rotated, with the bias).
    """

    x: Tensor
    valid: Tensor | None
    keys_values: Callable[[Tensor], KeysValues]


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

    def joined(self, x: Tensor, y: Tensor, valid: Tensor | None) -> Tensor:
        """`after` on a Branch, for modules that must know which positions hold a token (bool[batch, n], or None for all)."""
        return self.after(x, y)

    def rows(self) -> Tensor | None:
        """Embedding rows put in front of every input, [rows, dim]."""
        return None

    def memory(self) -> KeysValues | None:
        """Keys and values that every query of the layer also sees, each [heads, rows, head_dim]."""
        return None

    def remember(self, seen: Seen) -> KeysValues | None:
        """`memory` for modules that make it of what the layer sees; it may then differ by example, [batch, heads, rows, head_dim]."""
        return self.memory()

    def beyond(self, seen: Seen) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys, values and a gate [heads]: gate * Attn(q, keys, values), with a softmax of its own, is added to each head's output."""
        return None

    def beside(self, states: Sequence[Tensor], mask: Any) -> Tensor:
        """What replaces the output of the last block, of the states [batch, n, width] before, between and after the blocks (without gradient)."""
        raise NotImplementedError

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """What merging adds to the site's weight and bias so that the function door is no longer needed.

        None when no such change exists. Computed in the dtype of `weight`, which `merge` makes float64. Modules that
        enter through the parameter door need not override it: the door itself says what the merged tensors are.
        """
        return None

    def changed(self, weight: Tensor | None, bias: Tensor | None) -> int | None:
        """How many entries of the site's weight and bias merging may change; None for every entry of the tensors that it touches."""
        return None

    def packed(self) -> dict[str, Tensor] | None:
        """What a file needs to hold, where that is less than the state dict (indices and values, bits); None for the state dict itself."""
        return None

    def unpack(self, tensors: dict[str, Tensor]) -> None:
        """Take what `packed` gave. Raises KeyError or ValueError for tensors that do not fit."""
        raise NotImplementedError

    def opens(self, *doors: str) -> bool:
        """Whether this module overrides one of the named doors."""
        return any(getattr(type(self), door) is not getattr(PeftModule, door) for door in doors)


class Site(nn.Module):
    """Mixin: a role in the model (`attn.q`), the block it belongs to (None outside the blocks), and the modules hung here."""

    role: str
    layer: int | None
    adapters: nn.ModuleDict
    active: tuple[str, ...]
    average: bool  # whether active adapters act side by side, and the mean of their outputs counts
    choice: Tensor | None  # the active adapter, by number, that acts on each row of the batch; -1 for none

    def _open(self, role: str, layer: int | None) -> None:
        self.role, self.layer = role, layer
        self.active, self.average, self.choice = (), False, None
        self.adapters = nn.ModuleDict()

    def compute(self, modules: Sequence[PeftModule], *inputs: Tensor) -> Tensor:
        """What the site computes with these modules."""
        raise NotImplementedError

    def combined(self, *inputs: Tensor | None) -> Tensor:
        """`compute` with the active adapters: one after the other, averaged, or another one for each row of the batch."""
        if self.choice is not None:
            return self._by_row(*inputs)
        if self.average:
            return torch.stack([self.compute(tuple(self.hung(name)), *inputs) for name in self.active]).mean(dim=0)  # type: ignore[arg-type]
        return self.compute(tuple(self.hung()), *inputs)  # type: ignore[arg-type]

    def _by_row(self, *inputs: Tensor | None) -> Tensor:
        """One gathered, batched product: the adapters' tensors are stacked, each row takes its own, and `compute` is mapped over the rows."""
        assert self.choice is not None
        if inputs[0] is None or inputs[0].ndim < 2 or inputs[0].shape[0] != len(self.choice):
            given = None if inputs[0] is None else tuple(inputs[0].shape)
            raise IncompatibleError(
                f"{self.role}: adapters were chosen for {len(self.choice)} rows, but what comes here has shape {given}, whose first axis is not "
                "the batch; give as many choices as the batch has rows, and leave this role out of such adapters"
            )
        row = _Row(self, nn.ModuleList(self.hung(self.active[0])))
        stacked = self.stacked()
        if not stacked:
            return self.compute((), *inputs)  # type: ignore[arg-type]
        choice = self.choice.to(inputs[0].device)  # wherever the model is now
        own = {f"modules_.{key}": value[choice.clamp(min=0)] for key, value in stacked.items()}
        places = (0, *(None if x is None else 0 for x in inputs))

        def one(tensors: dict[str, Tensor], *xs: Tensor) -> Tensor:
            found: Tensor = torch.func.functional_call(row, tensors, xs, tie_weights=False)
            return found

        by_row = torch.vmap(one, in_dims=places, randomness="different")
        y: Tensor = by_row(own, *inputs)  # type: ignore[arg-type]
        if int(choice.min()) >= 0:
            return y
        without = (choice < 0).view(-1, *[1] * (y.ndim - 1))
        return torch.where(without, self.compute((), *inputs), y)  # type: ignore[arg-type]

    def stacked(self) -> dict[str, Tensor]:
        """The tensors of all active adapters at this site, each with a first axis of adapters. They must have the same spec."""
        each = [nn.ModuleList(self.hung(name)) for name in self.active]
        if not any(len(modules) for modules in each):
            return {}
        states = [{**dict(m.named_parameters(remove_duplicate=False)), **dict(m.named_buffers(remove_duplicate=False))} for m in each]
        shapes = [{key: value.shape for key, value in state.items()} for state in states]
        kinds = [[type(module) for module in modules] for modules in each]
        for name, shape, kind in zip(self.active, shapes, kinds, strict=True):
            if shape != shapes[0] or kind != kinds[0]:
                raise IncompatibleError(
                    f"{self.role}: adapters {self.active[0]!r} and {name!r} differ in methods or shapes, so they cannot act on rows of one batch; "
                    "attach both with the same spec, or run the rows apart"
                )
        return {key: torch.stack([state[key] for state in states]) for key in states[0]}

    def _mix(self, each: list[Tensor]) -> Tensor:
        """One tensor per active adapter -> their mean, or the chosen one for each row of the batch."""
        if len(each) != len(self.active) or any(x.shape != each[0].shape for x in each):
            raise IncompatibleError(f"{self.role}: the active adapters must put in as many rows each, got shapes {[tuple(x.shape) for x in each]}")
        if self.choice is None:
            return torch.stack(each).mean(dim=0)
        if int(self.choice.min()) < 0:
            raise IncompatibleError(f"{self.role}: a row without adapter beside rows with trained input rows; run the rows apart")
        if each[0].ndim == 4:
            raise IncompatibleError(f"{self.role}: rows that differ by example cannot be chosen by row; run the rows apart")
        return torch.stack(each)[self.choice.to(each[0].device)]

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

    def composed_weight(self, modules: Sequence[PeftModule] | None = None) -> Tensor:
        """The site's weight as it passes through the parameter door of the modules (default: the active ones)."""
        weight = cast(Tensor, self.weight)
        for module in self.hung() if modules is None else modules:
            weight = module.weight(weight)
        return weight

    def composed_bias(self, modules: Sequence[PeftModule] | None = None) -> Tensor | None:
        """The site's bias, likewise; None when it has none."""
        bias = cast("Tensor | None", self.bias)
        if bias is None:
            return None
        for module in self.hung() if modules is None else modules:
            bias = module.bias(bias)
        return bias

    @property
    def mixed(self) -> bool:
        """Whether the active adapters are averaged or chosen by row, so that there is no one composed weight."""
        return bool(self.active) and (self.average or self.choice is not None)


class _Row(nn.Module):
    """A site with the modules of one adapter, as a function of their tensors."""

    def __init__(self, site: Site, modules: nn.ModuleList):
        super().__init__()
        self.modules_ = modules
        self.site = (site,)  # a tuple hides the site from the parameters

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.site[0].compute(tuple(cast("Iterator[PeftModule]", iter(self.modules_))), *inputs)


class Linear(nn.Linear, Site):
    """y = x W^T + b, [..., in] -> [..., out]. heads: into how many heads the output (of `attn.o`: the input) divides; 1 elsewhere."""

    heads = 1

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, role: str, layer: int | None = None):
        super().__init__(in_features, out_features, bias)
        self._open(role, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.combined(x) if self.active else F.linear(x, self.weight, self.bias)

    def compute(self, modules: Sequence[PeftModule], *inputs: Tensor) -> Tensor:
        (x,) = inputs
        for module in modules:
            x = module.before(x)
        y = F.linear(x, self.composed_weight(modules), self.composed_bias(modules))
        dtype = y.dtype  # under autocast a trained vector in float32 would carry its dtype on, and attention wants one
        for module in modules:
            y = module.after(x, y).to(dtype)
        return y


class Conv2d(nn.Conv2d, Site):
    """A convolution over two axes, [batch, in, height, width] -> [batch, out, height', width']: sites are not only for transformers."""

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
        return self.combined(x) if self.active else F.conv2d(x, self.weight, self.bias, self.stride, self.padding)

    def compute(self, modules: Sequence[PeftModule], *inputs: Tensor) -> Tensor:
        (x,) = inputs
        batched = x if x.ndim == 4 else x[None]
        for module in modules:
            batched = module.before(batched)
        y = F.conv2d(batched, self.composed_weight(modules), self.composed_bias(modules), self.stride, self.padding)
        for module in modules:
            y = module.after(batched, y)
        return y if x.ndim == 4 else y[0]


class TiedLinear(Site):
    """y = x W^T + b with a weight that another site owns (a language-model head tied to the embedding)."""

    def __init__(self, out_features: int, bias: bool, *, role: str, layer: int | None = None):
        super().__init__()
        self._open(role, layer)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self.active:
            return F.linear(x, weight, self.bias)
        self.tied = weight
        try:
            return self.combined(x)
        finally:
            del self.tied

    def compute(self, modules: Sequence[PeftModule], *inputs: Tensor) -> Tensor:
        (x,) = inputs
        y = F.linear(x, self.tied, self.composed_bias(modules))
        for module in modules:
            y = module.after(x, y)
        return y


class Norm(Site):
    """What LayerNorm and RMSNorm have in common: they normalise the last axis and scale it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.combined(x) if self.active else self.compute((), x)

    def compute(self, modules: Sequence[PeftModule], *inputs: Tensor) -> Tensor:
        (x,) = inputs
        y = self.normalise(x, self.composed_weight(modules), self.composed_bias(modules))
        for module in modules:
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
        return self.combined(ids) if self.active else F.embedding(ids, self.weight)

    def compute(self, modules: Sequence[PeftModule], *inputs: Tensor) -> Tensor:
        (ids,) = inputs
        y = F.embedding(ids, self.composed_weight(modules))
        for module in modules:
            y = module.after(ids, y)
        return y

    def prompt(self) -> Tensor | None:
        """The rows that active modules put in front of every input, [rows, dim], or None; [batch, rows, dim] where adapters are chosen by row."""
        each = [_given(module.rows() for module in self.hung(name)) for name in self.active]
        if not self.mixed:
            given = [rows for of_adapter in each for rows in of_adapter]
            return torch.cat(given) if given else None
        prompts = [torch.cat(rows) for rows in each if rows]
        if not prompts:
            return None
        return self._mix(prompts)


class Branch(Site):
    """The end of a sub-layer, before it joins the residual: x is the sub-layer's input, y its output, both [..., dim]."""

    def __init__(self, dim: int, *, role: str, layer: int | None = None):
        super().__init__()
        self._open(role, layer)
        self.dim = dim

    def forward(self, x: Tensor, y: Tensor, valid: Tensor | None = None) -> Tensor:
        return self.combined(x, y, valid) if self.active else y

    def compute(self, modules: Sequence[PeftModule], *inputs: Tensor) -> Tensor:
        x, y, valid = inputs
        dtype = y.dtype
        for module in modules:
            y = module.joined(x, y, valid).to(dtype)
        return y


class Keys(Site):
    """The keys of an attention that normalises them, [batch, n, dim], heads side by side: what a vector that scales keys must be applied to.

    Before the normalisation its length would cancel, and where queries are keys it would change the queries too.
    """

    def __init__(self, dim: int, *, role: str, layer: int | None = None):
        super().__init__()
        self._open(role, layer)
        self.dim = dim

    def forward(self, keys: Tensor) -> Tensor:
        return self.combined(keys) if self.active else keys

    def compute(self, modules: Sequence[PeftModule], *inputs: Tensor) -> Tensor:
        (keys,) = inputs
        dtype, y = keys.dtype, keys
        for module in modules:
            y = module.after(keys, y).to(dtype)
        return y


class Memory(Site):
    """Extra keys and values of one attention layer, seen by every query: what prefix tuning trains."""

    def __init__(self, heads: int, head_dim: int, *, value_dim: int | None = None, role: str, layer: int | None = None):
        super().__init__()
        self._open(role, layer)
        self.heads, self.head_dim, self.value_dim = heads, head_dim, value_dim or head_dim

    def forward(self, seen: Seen) -> KeysValues | None:
        """Keys [heads, rows, head_dim] and values [heads, rows, value_dim], or None when nothing is hung here; with an axis of the batch in front
        where they differ by example."""
        each = [_given(module.remember(seen) for module in self.hung(name)) for name in self.active]
        if not self.mixed:
            given = [found for of_adapter in each for found in of_adapter]
            return _joined(given) if given else None
        memories = [_joined(found) for found in each if found]
        if not memories:
            return None
        return self._mix([keys for keys, _ in memories]), self._mix([values for _, values in memories])

    def extras(self, seen: Seen) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Keys, values and gates that have a softmax of their own."""
        found = _given(module.beyond(seen) for module in self.hung())
        if found and self.mixed:
            raise IncompatibleError(f"{self.role}: gated attention to trained rows can neither be averaged nor chosen by row; activate one adapter")
        return found


class Side(Site):
    """The one place for a second network beside the blocks (ladder side-tuning).

    width: of the states between the blocks. depth: how many blocks there are. narrow: factor, layers -> blocks `factor` times narrower with the
    attention of these layers, and their width; what the blocks share is in the first that uses it.
    """

    def __init__(self, width: int, depth: int, narrow: Callable[[int, Sequence[int]], tuple[nn.ModuleList, int]], *, role: str = "side"):
        super().__init__()
        self._open(role, None)
        self.width, self.depth, self.narrow = width, depth, narrow

    @property
    def replaces(self) -> bool:
        """Whether an active module computes the output in place of the last block."""
        return any(module.opens("beside") for module in self.hung())

    def forward(self, states: Sequence[Tensor], mask: Any) -> Tensor:
        """The mean of what the active networks make of the states."""
        if self.choice is not None:
            raise IncompatibleError("a side network cannot be chosen by row; run the rows apart")
        outs = [module.beside(states, mask) for module in self.hung() if module.opens("beside")]
        return torch.stack(outs).mean(dim=0)


def _given(values: Iterable[T | None]) -> list[T]:
    return [value for value in values if value is not None]


def prompt_rows(model: nn.Module) -> int:
    """How many rows the active adapters put in front of every input of a model; they count towards its length."""
    prompt = model.embeddings.prompt()  # type: ignore[union-attr, operator]
    return 0 if prompt is None else int(prompt.shape[-2])


def _joined(memories: Sequence[KeysValues]) -> KeysValues:
    """Several memories as one; those that differ by example spread the others over the batch."""
    batch = {len(keys) for keys, _ in memories if keys.ndim == 4}
    if batch:
        memories = [tuple(x if x.ndim == 4 else x.expand(*batch, *x.shape) for x in memory) for memory in memories]  # type: ignore[misc]
    return torch.cat([keys for keys, _ in memories], dim=-2), torch.cat([values for _, values in memories], dim=-2)


def sites(model: nn.Module) -> Iterator[tuple[str, Site]]:
    """Every site of a model with its dotted path; what is hung on a site is not looked into."""
    yield from _sites(model, "", set())


def _sites(module: nn.Module, path: str, seen: set[nn.Module]) -> Iterator[tuple[str, Site]]:
    if module in seen:
        return
    seen.add(module)
    if isinstance(module, Site):
        yield path, module
    for name, child in module.named_children():
        if not (isinstance(module, Site) and name == "adapters"):
            yield from _sites(child, f"{path}.{name}" if path else name, seen)
