"""A site: the modules of several adapters at one place, and which of them act."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from effzoo.errors import IncompatibleError, OptionError
from effzoo.recompute import in_dtype
from effzoo.sites.doors import Mixture, PeftModule

T = TypeVar("T")
Inputs = tuple[Tensor, ...]


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
        place = next((i for i, module in enumerate(modules) if isinstance(module, Mixture)), None)
        if place is None:
            entered, alone = self.enter(modules, *inputs)
            return in_dtype(self.leave(modules, entered, alone), alone.dtype, of=alone)
        mixture, first, rest = cast(Mixture, modules[place]), modules[:place], modules[place + 1 :]
        entered, alone = self.enter((*first, *rest), *inputs)
        plain = self.leave(first, entered, alone)
        outs = []
        for own in mixture.at_hand():
            at, y = (entered, None) if mixture.at_the_output(own) else self.enter((*first, *own, *rest), *inputs)
            outs.append(self.leave(own, at, plain if y is None else self.leave(first, at, y)))
        x, plain, *outs = suited(mixture, inputs[0], plain, *outs)
        return self.leave(rest, entered, mixture.mix(self, x, plain, outs)).to(alone.dtype)

    def enter(self, modules: Sequence[PeftModule], *inputs: Tensor) -> tuple[Inputs, Tensor]:
        """The inputs as `before` leaves them, and what the site makes of them with its weight as it passes through the parameter door."""
        raise NotImplementedError

    def entered(self, modules: Sequence[PeftModule], x: Tensor) -> Tensor:
        """The input as `before` of the modules leaves it, in its own dtype."""
        for module in modules:
            if module.opens("before"):
                x = in_dtype(module.before(*suited(module, x)), x.dtype)
        return x

    def leave(self, modules: Sequence[PeftModule], inputs: Inputs, y: Tensor) -> Tensor:
        """The output as it passes through the function door of the modules, in their dtype: what they add is rounded once, after the last one."""
        dtype = y.dtype
        for module in modules:
            if module.opens("after"):
                y = module.after(*suited(module, inputs[0], y))
        return y.to(dtype) if autocasts(y) else y

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
        if any(isinstance(module, Mixture) for module in self.hung()):
            raise IncompatibleError(f"{self.role}: a mixture routes by itself, so it cannot be chosen by row; run the rows apart")
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
        """The site's weight as it passes through the parameter door of the modules (default: the active ones), rounded once to its dtype."""
        weight = cast(Tensor, self.weight)
        return in_dtype(self.passed("weight", weight, modules), weight.dtype)

    def composed_bias(self, modules: Sequence[PeftModule] | None = None) -> Tensor | None:
        """The site's bias, likewise; None when it has none."""
        bias = cast("Tensor | None", self.bias)
        return None if bias is None else in_dtype(self.passed("bias", bias, modules), bias.dtype)

    def passed(self, door: Literal["weight", "bias"], tensor: Tensor, modules: Sequence[PeftModule] | None = None) -> Tensor:
        """The weight or bias as it passes through the parameter door of the modules, in the widest of their dtypes and its own."""
        for module in self.hung() if modules is None else modules:
            if module.opens(door) and not isinstance(module, Mixture):
                tensor = getattr(module, door)(in_dtype(tensor, torch.promote_types(tensor.dtype, module.dtype or tensor.dtype)))
        return tensor

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


def autocasts(x: Tensor) -> bool:
    """Whether autocast decides in which dtype x is computed with."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def suited(module: PeftModule, *tensors: Any) -> tuple[Any, ...]:
    """The tensors in the dtype that a module computes in: its own, which is wider than that of a base in half precision. Integers, and everything
    under autocast, stay as they are."""
    dtype = module.dtype
    return tuple(x if dtype is None or x is None or not x.is_floating_point() or autocasts(x) else in_dtype(x, dtype) for x in tensors)


def given(values: Iterable[T | None]) -> list[T]:
    """Those that are not None."""
    return [value for value in values if value is not None]
