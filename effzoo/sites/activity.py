"""Which adapters act: one value per model that all of its sites read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from effzoo.errors import IncompatibleError


@dataclass(frozen=True)
class Activity:
    """Which adapters act and how; never changed, only replaced.

    names: in the order in which they act.
    scales: one for each.
    average: side by side, and the mean of their outputs counts.
    rows: for each row of the batch the number of its adapter among `names`, -1 for the bare base.
    trained: those that learn; the others act as they are.
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
        rows = (
            None
            if self.rows is None or not kept
            else tuple(kept.index(number) if number in kept else -1 for number in self.rows)
        )
        names, scales = tuple(self.names[number] for number in kept), tuple(self.scales[number] for number in kept)
        return Activity(names, scales, self.average and len(kept) > 1, rows, self.trained - {name})

    def check_batch(self, batch: int | None, role: str, shape: Sequence[int] | None) -> None:
        """IncompatibleError unless what comes to a site has as many rows as adapters were chosen for."""
        if self.rows is not None and batch != len(self.rows):
            found = (
                "no rows"
                if batch is None
                else f"{batch} rows"
                if shape is None
                else (f"{batch} rows, shape {tuple(shape)}")
            )
            raise IncompatibleError(
                f"{role}: adapters were chosen for {len(self.rows)} rows, but what comes here has {found}; give as "
                "many choices as the batch "
                "has rows, and where the first axis is not the batch, leave this role out of such adapters"
            )


class Roster:
    """What the sites of one model hold in common: the activity of the moment."""

    def __init__(self, now: Activity = Activity()):
        self.now = now
