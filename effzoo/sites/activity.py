"""Which adapters act: one value per model that all of its sites read, and what a scale makes of a module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from effzoo.errors import IncompatibleError
from effzoo.sites.doors import KeysValues, Mixture, PeftModule, Seen


@dataclass(frozen=True)
class Activity:
    """Which adapters act and how; never changed, only replaced.

    names: in the order in which they act. scales: one for each. average: side by side, and the mean of their outputs counts. rows: for each row of
    the batch the number of its adapter among `names`, -1 for the bare base. trained: those that learn; the others act as they are.
    """

    names: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()
    average: bool = False
    rows: tuple[int, ...] | None = None
    trained: frozenset[str] = frozenset()

    @property
    def combine(self) -> str:
        """ "stack", "average" or "rows"."""
        return "rows" if self.rows is not None else "average" if self.average else "stack"

    def scale(self, name: str) -> float:
        """The scale of an adapter; 1 for one that does not act."""
        return self.scales[self.names.index(name)] if name in self.names else 1.0

    def by_row(self) -> tuple[str | None, ...] | None:
        """The adapter of each row, or None where they are not chosen by row."""
        return None if self.rows is None else tuple(None if number < 0 else self.names[number] for number in self.rows)

    def without(self, name: str) -> Activity:
        """The same for all others: a mean over those that are left, and the bare base in the rows that had this one."""
        kept = [number for number, other in enumerate(self.names) if other != name]
        rows = None if self.rows is None or not kept else tuple(kept.index(number) if number in kept else -1 for number in self.rows)
        names, scales = tuple(self.names[number] for number in kept), tuple(self.scales[number] for number in kept)
        return Activity(names, scales, self.average and len(kept) > 1, rows, self.trained - {name})

    def check_batch(self, batch: int | None, role: str, shape: Sequence[int] | None) -> None:
        """IncompatibleError unless what comes to a site has as many rows as adapters were chosen for."""
        if self.rows is not None and batch != len(self.rows):
            found = "no rows" if batch is None else f"{batch} rows" if shape is None else f"{batch} rows, shape {tuple(shape)}"
            raise IncompatibleError(
                f"{role}: adapters were chosen for {len(self.rows)} rows, but what comes here has {found}; give as many choices as the batch "
                "has rows, and where the first axis is not the batch, leave this role out of such adapters"
            )


class Roster:
    """What the sites of one model hold in common: the activity of the moment."""

    def __init__(self, now: Activity = Activity()):
        self.now = now


class Scaled:
    """A module at a scale s: at each door, s times what it adds there.

        theta + s (theta' - theta),   x + s (x' - x),   y + s (y' - y),   a gate times s

    For a change of weights that is s times the change. Trained rows, keys and values add nothing that could be multiplied: they have no scale.
    """

    def __init__(self, module: PeftModule, scale: float):
        self.module, self.scale = module, scale

    @property
    def dtype(self) -> torch.dtype | None:
        return self.module.dtype

    def between(self, before: Tensor, after: Tensor) -> Tensor:
        """before + s (after - before)."""
        return before if after is before else before + self.scale * (after - before)

    def weight(self, weight: Tensor) -> Tensor:
        return self.between(weight, self.module.weight(weight))

    def bias(self, bias: Tensor) -> Tensor:
        return self.between(bias, self.module.bias(bias))

    def before(self, x: Tensor) -> Tensor:
        return self.between(x, self.module.before(x))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return self.between(y, self.module.after(x, y))

    def joined(self, x: Tensor, y: Tensor, valid: Tensor | None) -> Tensor:
        return self.between(y, self.module.joined(x, y, valid))

    def rows(self) -> Tensor | None:
        return self.module.rows()

    def remember(self, seen: Seen) -> KeysValues | None:
        return self.module.remember(seen)

    def apart(self, seen: Seen) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [(keys, values, self.scale * gate) for keys, values, gate in self.module.apart(seen)]

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        change = self.module.delta(weight, bias)
        if change is None:
            return None
        return self.scale * change[0], None if change[1] is None else self.scale * change[1]

    def opens(self, *doors: str) -> bool:
        return self.module.opens(*doors)

    def at_hand(self) -> list[tuple[PeftModule, ...]]:
        return cast(Mixture, self.module).at_hand()

    def mix(self, site: object, x: Tensor, plain: Tensor, outs: Sequence[Tensor]) -> Tensor:
        return self.between(plain, cast(Mixture, self.module).mix(site, x, plain, outs))  # type: ignore[arg-type]


Acts = PeftModule | Scaled
WITHOUT_SCALE = ("rows", "memory", "remember", "beside")  # doors at which nothing is added that a scale could multiply


def is_mixture(module: Acts) -> bool:
    """Whether a module mixes what experts make, at a scale or not."""
    return isinstance(module.module if isinstance(module, Scaled) else module, Mixture)
