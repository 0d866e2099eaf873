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
    """Mixin: a role in the model (`attn.q`), the block it belongs to (None outside the blocks), and the modules hung
    here.

    Which of them act is not known here: it is read from the roster that all sites of a model share, so that no site can
    be of another opinion.
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
        """The adapters that act and have something here, in their order."""
        return self.hanging

    @property
    def hanging(self) -> tuple[str, ...]:
        """`active` of the site itself: a name of its own, since a property of the parent class cannot be traced by
        torch.compile."""
        roster = self.roster
        if roster is None or not roster.now.names:
            return ()
        here = self._modules["adapters"]._modules  # type: ignore[union-attr]
        return tuple([name for name in roster.now.names if name in here]) if here else ()

    @property
    def mixed(self) -> bool:
        """Whether the active adapters are averaged or chosen by row, so that there is no one composed weight."""
        return (self.now.average or self.now.rows is not None) and bool(self.active)

    def compute(self, modules: Sequence[Acts], *inputs: Tensor) -> Tensor:
        """What the site computes with these modules."""
        place = None
        for number, module in enumerate(modules):
            if is_mixture(module):
                place = number
                break
        if place is None:
            entered, alone = self.enter(modules, *inputs)
            made = self.leave(modules, entered, alone)
            return made.to(alone.dtype)
        mixture, first, rest = cast(Mixture, modules[place]), modules[:place], modules[place + 1 :]
        entered, alone = self.enter((*first, *rest), *inputs)
        plain = self.leave(first, entered, alone)
        outs = []
        for own in mixture.each():
            at, y = (entered, None) if Mixture.at_the_output(own) else self.enter((*first, *own, *rest), *inputs)
            outs.append(self.leave(own, at, plain if y is None else self.leave(first, at, y)))
        x, plain, *outs = suited(mixture, inputs[0], plain, *outs)
        return self.leave(rest, entered, mixture.mix(self, x, plain, outs, at_hand())).to(alone.dtype)

    def enter(self, modules: Sequence[Acts], *inputs: Tensor) -> tuple[Inputs, Tensor]:
        """The inputs as `before` leaves them, and what the site makes of them with its weight as `weight` of the
        modules leaves it."""
        raise NotImplementedError

    def entered(self, modules: Sequence[Acts], x: Tensor) -> Tensor:
        """The input as `before` of the modules leaves it, in its own dtype."""
        for module in modules:
            if opens(module, "before"):
                (own,) = suited(module, x)
                x = module.before(own, at_hand()).to(x.dtype)
        return x

    def leave(self, modules: Sequence[Acts], inputs: Inputs, y: Tensor) -> Tensor:
        """The output as `after` of the modules leaves it, in their dtype: what they add is rounded once, after the last
        one."""
        dtype = y.dtype
        for module in modules:
            if opens(module, "after"):
                x, y = suited(module, inputs[0], y)
                y = module.after(x, y, at_hand())
        return y.to(dtype) if y.dtype != dtype and autocasts(y) else y

    def combined(self, *inputs: Tensor | None) -> Tensor:
        """`made_by` the active adapters: one after the other, averaged, or another one for each row of the batch."""
        now = self.now
        with made_again():
            if now.rows is not None:
                return self._by_row(now.rows, *inputs)
            if now.average:
                return torch.stack([self.made_by((name,), *inputs) for name in self.active]).mean(dim=0)
            return self.made_by(self.active, *inputs)

    def made_by(self, names: Sequence[str], *inputs: Tensor | None) -> Tensor:
        """What the site computes with these adapters, one after the other."""
        return self.compute(tuple(self.acting(*names)) if names else (), *inputs)  # type: ignore[arg-type]

    def _by_row(self, rows: Sequence[int], *inputs: Tensor | None) -> Tensor:
        """The rows of each adapter are computed together, with its own modules, and put back where they were."""
        x, active = inputs[0], self.active
        if any(is_mixture(module) for module in self.hung()):
            raise IncompatibleError(
                f"{self.role}: a mixture routes by itself, so it cannot be chosen by row; run the rows apart"
            )
        batch = None if x is None or x.ndim < 2 else x.shape[0]
        self.now.check_batch(batch, self.role, None if x is None else x.shape)
        assert x is not None
        outs: list[Tensor] = []
        order: list[int] = []
        for names, own in _grouped(rows, self.now.names, active).items():
            with calling(at_hand().of_rows(own)):
                outs.append(self.made_by(names, *(None if each is None else chosen(each, own) for each in inputs)))
            order += own
        y = outs[0] if len(outs) == 1 else torch.cat(outs)
        if order == sorted(order):
            return y
        return y.index_select(0, table([order.index(row) for row in range(len(rows))], y.device))

    def mix(self, each: list[Tensor]) -> Tensor:
        """One tensor per active adapter -> their mean, or the chosen one for each row of the batch."""
        rows, active = self.now.rows, self.active
        if len(each) != len(active) or any(x.shape != each[0].shape for x in each):
            raise IncompatibleError(
                f"{self.role}: the active adapters must put in as many rows each, got shapes "
                f"{[tuple(x.shape) for x in each]}"
            )
        if rows is None:
            return torch.stack(each).mean(dim=0)
        chosen = [self.now.names[number] if number >= 0 else None for number in rows]
        if any(name not in active for name in chosen):
            raise IncompatibleError(
                f"{self.role}: a row without adapter beside rows with trained input rows; run the rows apart"
            )
        if each[0].ndim == 4:
            raise IncompatibleError(
                f"{self.role}: rows that differ by example cannot be chosen by row; run the rows apart"
            )
        return torch.stack([each[active.index(name)] for name in chosen])

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
        here = self._modules["adapters"]._modules  # type: ignore[union-attr]  # an attribute takes long, and this is asked at every pass
        for adapter in adapters or self.active:
            if adapter in here:
                yield from here[adapter]._modules.values()  # type: ignore[union-attr, misc]

    def acting(self, *adapters: str) -> Iterator[Acts]:
        """`hung`, each module at the scale of its adapter; a task head is not added to anything, and counts in full."""
        now, full = self.now, self.role.startswith("head.")
        for adapter in adapters or self.active:
            scale = 1.0 if full else now.scale(adapter)
            for module in self.hung(adapter):
                yield module if scale == 1 else Scaled(module, scale)

    def base(self) -> dict[str, nn.Parameter]:
        """The site's own parameters, without what is hung on it."""
        return dict(self.named_parameters(recurse=False))

    def composed_weight(self, modules: Sequence[Acts] | None = None) -> Tensor:
        """The site's weight as `weight` of the modules (default: the active ones) leaves it, rounded once to its
        dtype."""
        weight = cast(Tensor, self.weight)
        return self.passed("weight", weight, modules).to(weight.dtype)

    def composed_bias(self, modules: Sequence[Acts] | None = None) -> Tensor | None:
        """The site's bias, likewise; None when it has none."""
        bias = cast("Tensor | None", self.bias)
        return None if bias is None else self.passed("bias", bias, modules).to(bias.dtype)

    def passed(self, hook: Literal["weight", "bias"], tensor: Tensor, modules: Sequence[Acts] | None = None) -> Tensor:
        """The weight or bias as this hook of the modules leaves it, in the widest of their dtypes and its own."""
        for module in self.acting() if modules is None else modules:
            if opens(module, hook) and not is_mixture(module):
                tensor = getattr(module, hook)(
                    tensor.to(torch.promote_types(tensor.dtype, dtype_of(module) or tensor.dtype))
                )
        return tensor


def _grouped(rows: Sequence[int], names: Sequence[str], active: Sequence[str]) -> dict[tuple[str, ...], list[int]]:
    """The rows by what acts on them here: an adapter, or nothing."""
    found: dict[tuple[str, ...], list[int]] = {}
    for row, number in enumerate(rows):
        found.setdefault((names[number],) if number >= 0 and names[number] in active else (), []).append(row)
    return found


def suited(module: Acts, *tensors: Any) -> tuple[Any, ...]:
    """The tensors in the dtype that a module computes in: its own, which is wider than that of a base in half
    precision. Integers, and everything under autocast, stay as they are."""
    dtype = dtype_of(module)
    for x in tensors:
        if dtype is not None and x is not None and x.dtype != dtype:
            return tuple(
                [x if x is None or not x.is_floating_point() or autocasts(x) else x.to(dtype) for x in tensors]
            )
    return tensors  # as they are, which is the ordinary case: this is asked at every hook of every pass


def given(values: Iterable[T | None]) -> list[T]:
    """Those that are not None."""
    return [value for value in values if value is not None]
