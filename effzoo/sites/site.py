"""A site: the modules of several adapters at one place, and which of them act."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from effzoo.devices import chosen, table
from effzoo.errors import IncompatibleError, OptionError
from effzoo.recompute import made_again
from effzoo.sites.activity import Activity, Roster
from effzoo.sites.dtypes import autocasts
from effzoo.sites.hooks import Acts, Mixture, PeftModule, Scaled, at_hand, calling, dtype_of, is_mixture, opens

T = TypeVar("T")
Inputs = tuple[Tensor, ...]
NOTHING = Activity()


class Site(nn.Module):
    """Mixin of a layer: its role in the model (`attn.q`), its block, and the modules that hang on it.

    Which of them act is read from the roster that all sites of a model share.

    layer: number of the block; None outside the blocks.
    """

    role: str
    layer: int | None
    adapters: nn.ModuleDict
    roster: Roster | None = None  # of the model, from the first attach on

    def _open(self, role: str, layer: int | None) -> None:
        self.role, self.layer = role, layer
        self.adapters = nn.ModuleDict()

    @property
    def now(self) -> Activity:
        """Which adapters act in the model."""
        return NOTHING if self.roster is None else self.roster.now

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that act and have modules here, in their order."""
        return self.hanging

    @property
    def hanging(self) -> tuple[str, ...]:
        """`active` of this class: torch.compile cannot trace the property of a parent class."""
        roster = self.roster
        if roster is None or not roster.now.names:
            return ()
        adapters: Any = self._modules["adapters"]  # an attribute would be slow, and this is read in every pass
        here = adapters._modules
        return tuple([name for name in roster.now.names if name in here]) if here else ()

    @property
    def mixed(self) -> bool:
        """Whether the active adapters are averaged or chosen by row, so that there is no one composed weight."""
        return (self.now.average or self.now.rows is not None) and bool(self.active)

    def compute(self, modules: Sequence[Acts], *inputs: Tensor) -> Tensor:
        """What the site computes with these modules."""
        place = next((number for number, module in enumerate(modules) if is_mixture(module)), None)
        if place is None:
            entered, alone = self.enter(modules, *inputs)
            made = self.leave(modules, entered, alone)
            return made.to(alone.dtype)
        mixture, first, rest = cast(Mixture, modules[place]), modules[:place], modules[place + 1 :]
        entered, alone = self.enter((*first, *rest), *inputs)
        plain = self.leave(first, entered, alone)
        outs = []
        for expert in mixture.expert_modules():
            if Mixture.at_the_output(expert):
                outs.append(self.leave(expert, entered, plain))
            else:
                expert_entered, y = self.enter((*first, *expert, *rest), *inputs)
                outs.append(self.leave(expert, expert_entered, self.leave(first, expert_entered, y)))
        x, plain, *outs = cast_for(mixture, inputs[0], plain, *outs)
        mixed = mixture.mix(self, x, plain, outs, at_hand())
        return self._behind(rest, entered, inputs[0], mixed).to(alone.dtype)

    def _behind(self, modules: Sequence[Acts], entered: Inputs, x: Tensor, y: Tensor) -> Tensor:
        """The output y after modules that come behind a mixture, further mixtures among them.

        Raises IncompatibleError for a mixture whose experts change the input or the weight: each would have to compute
        the mixtures before it once more.
        """
        place = next((number for number, module in enumerate(modules) if is_mixture(module)), None)
        if place is None:
            return self.leave(modules, entered, y)
        mixture, y = cast(Mixture, modules[place]), self.leave(modules[:place], entered, y)
        experts = mixture.expert_modules()
        if not all(map(Mixture.at_the_output, experts)):
            raise IncompatibleError(
                f"{self.role}: two mixtures act here, and experts of the second change the input or the weight of the "
                "site; put that one first, give it other targets, or take experts that change the output alone (lora, "
                "pfeiffer)"
            )
        own_x, y, *outs = cast_for(mixture, x, y, *(self.leave(expert, entered, y) for expert in experts))
        return self._behind(modules[place + 1 :], entered, x, mixture.mix(self, own_x, y, outs, at_hand()))

    def enter(self, modules: Sequence[Acts], *inputs: Tensor) -> tuple[Inputs, Tensor]:
        """The inputs after the hook `before`, and the site's output with the weight after `weight`."""
        raise NotImplementedError

    def entered(self, modules: Sequence[Acts], x: Tensor) -> Tensor:
        """The input after `before` of the modules, in its own dtype."""
        for module in modules:
            if opens(module, "before"):
                (exact,) = cast_for(module, x)
                x = module.before(exact, at_hand()).to(x.dtype)
        return x

    def leave(self, modules: Sequence[Acts], inputs: Inputs, y: Tensor) -> Tensor:
        """The output after `after` of the modules, in their dtype, so that it is rounded once, after the last."""
        dtype = y.dtype
        for module in modules:
            if opens(module, "after"):
                x, y = cast_for(module, inputs[0], y)
                y = module.after(x, y, at_hand())
        return y.to(dtype) if y.dtype != dtype and autocasts(y) else y

    def combined(self, *inputs: Tensor | None) -> Tensor:
        """The output with the active adapters: one after the other, averaged, or chosen for each row of the batch."""
        now = self.now
        with made_again():
            if now.rows is not None:
                return self._by_row(now.rows, *inputs)
            if now.average:
                return torch.stack([self.made_by((name,), *inputs) for name in self.active]).mean(dim=0)
            return self.made_by(self.active, *inputs)

    def made_by(self, names: Sequence[str], *inputs: Tensor | None) -> Tensor:
        """The output with these adapters, one after the other."""
        return self.compute(tuple(self.acting(*names)) if names else (), *inputs)  # type: ignore[arg-type]

    def _by_row(self, rows: Sequence[int], *inputs: Tensor | None) -> Tensor:
        """The output with an adapter for each row of the batch; rows of one adapter are computed together."""
        x, active = inputs[0], self.active
        if any(is_mixture(module) for module in self.hung()):
            raise IncompatibleError(
                f"{self.role}: a mixture routes by itself, so it cannot be chosen by row; run the rows one by one"
            )
        batch = None if x is None or x.ndim < 2 else x.shape[0]
        self.now.check_batch(batch, self.role, None if x is None else x.shape)
        assert x is not None
        outs: list[Tensor] = []
        order: list[int] = []
        for names, group in _grouped(rows, self.now.names, active).items():
            with calling(at_hand().of_rows(group)):
                outs.append(self.made_by(names, *(None if x is None else chosen(x, group) for x in inputs)))
            order += group
        y = outs[0] if len(outs) == 1 else torch.cat(outs)
        if order == sorted(order):
            return y
        return y.index_select(0, table([order.index(row) for row in range(len(rows))], y.device))

    def mix(self, tensors: list[Tensor]) -> Tensor:
        """One tensor per active adapter -> their mean, or the one that each row of the batch has."""
        rows, active = self.now.rows, self.active
        if len(tensors) != len(active) or any(x.shape != tensors[0].shape for x in tensors):
            raise IncompatibleError(
                f"{self.role}: the active adapters must have equal numbers of prompt tokens, got shapes "
                f"{[tuple(x.shape) for x in tensors]}"
            )
        if rows is None:
            return torch.stack(tensors).mean(dim=0)
        chosen = [self.now.names[number] if number >= 0 else None for number in rows]
        if any(name not in active for name in chosen):
            raise IncompatibleError(
                f"{self.role}: a row without adapter next to rows with prompt tokens; run the rows one by one"
            )
        if tensors[0].ndim == 4:
            raise IncompatibleError(
                f"{self.role}: prompt tokens that differ by example cannot be chosen by row; run the rows one by one"
            )
        return torch.stack([tensors[active.index(name)] for name in chosen])

    def hang(self, adapter: str, method: str, module: PeftModule) -> None:
        """Hang a module under an adapter's name; the adapter is not made active here."""
        if adapter not in self.adapters:
            self.adapters[adapter] = nn.ModuleDict().train(self.training)
        modules = self.of(adapter)
        if method in modules:
            raise OptionError(
                f"adapter {adapter!r} would hang two {method!r} modules on {self.role!r}; give the two specs "
                "disjoint targets or layers"
            )
        modules[method] = module

    def of(self, adapter: str) -> nn.ModuleDict:
        """The modules of one adapter by method."""
        return cast(nn.ModuleDict, self.adapters[adapter])

    def hung(self, *adapters: str) -> Iterator[PeftModule]:
        """The modules of the named adapters (default: the active ones), in the order in which they act."""
        here: Any = self._modules["adapters"]
        for adapter in adapters or self.active:
            if adapter in here._modules:
                yield from here._modules[adapter]._modules.values()

    def acting(self, *adapters: str) -> Iterator[Acts]:
        """`hung` at the scales of the adapters; a task head has no scale, as it replaces."""
        now, full = self.now, self.role.startswith("head.")
        for adapter in adapters or self.active:
            scale = 1.0 if full else now.scale(adapter)
            for module in self.hung(adapter):
                yield module if scale == 1 else Scaled(module, scale)

    def base(self) -> dict[str, nn.Parameter]:
        """The site's parameters, without those of adapters."""
        return dict(self.named_parameters(recurse=False))

    def composed_weight(self, modules: Sequence[Acts] | None = None) -> Tensor:
        """The site's weight after the hook `weight` of the modules (default: the active ones), in its dtype."""
        weight = cast(Tensor, self.weight)
        return self.passed("weight", weight, modules).to(weight.dtype)

    def composed_bias(self, modules: Sequence[Acts] | None = None) -> Tensor | None:
        """The site's bias after the hook `bias`; None without bias."""
        bias = cast("Tensor | None", self.bias)
        return None if bias is None else self.passed("bias", bias, modules).to(bias.dtype)

    def passed(self, hook: Literal["weight", "bias"], tensor: Tensor, modules: Sequence[Acts] | None = None) -> Tensor:
        """A weight or bias after this hook of the modules, in the widest of their dtypes and its own."""
        for module in self.acting() if modules is None else modules:
            if opens(module, hook) and not is_mixture(module):
                widest = torch.promote_types(tensor.dtype, dtype_of(module) or tensor.dtype)
                tensor = getattr(module, hook)(tensor.to(widest))
        return tensor


def _grouped(rows: Sequence[int], names: Sequence[str], active: Sequence[str]) -> dict[tuple[str, ...], list[int]]:
    """The rows of the batch by the adapter that acts on them here, () for none."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for row, number in enumerate(rows):
        groups.setdefault((names[number],) if number >= 0 and names[number] in active else (), []).append(row)
    return groups


def cast_for(module: Acts, *tensors: Any) -> tuple[Any, ...]:
    """The tensors in the dtype of a module; integers, and all tensors under autocast, as they are."""
    dtype = dtype_of(module)
    for x in tensors:
        if dtype is not None and x is not None and x.dtype != dtype:
            return tuple(
                [x if x is None or not x.is_floating_point() or autocasts(x) else x.to(dtype) for x in tensors]
            )
    return tensors


def present(values: Iterable[T | None]) -> list[T]:
    """Those that are not None."""
    return [value for value in values if value is not None]
