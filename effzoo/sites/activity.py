"""Which adapters act: one value per model that all of its sites read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from effzoo.errors import IncompatibleError


@dataclass(frozen=True)
class Activity:
    """Which adapters act, and how; a change makes a new one.

    names: of the adapters, in the order in which they act.
    scales: of each adapter.
    average: the mean of their outputs, instead of one after the other.
    rows: for each row of the batch, the index of its adapter in `names`, -1 for the bare base.
    trained: names of the adapters that learn.
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
        """The activity of the others: a mean over the rest, and the bare base in the rows that had this adapter."""
        kept = [number for number, other in enumerate(self.names) if other != name]
        rows = None
        if self.rows is not None and kept:
            rows = tuple(kept.index(number) if number in kept else -1 for number in self.rows)
        names, scales = tuple(self.names[number] for number in kept), tuple(self.scales[number] for number in kept)
        return Activity(names, scales, self.average and len(kept) > 1, rows, self.trained - {name})

    def check_batch(self, batch: int | None, role: str, shape: Sequence[int] | None) -> None:
        """Raise IncompatibleError unless the input of a site has as many rows as adapters were chosen for."""
        if self.rows is not None and batch != len(self.rows):
            rows = "no rows" if batch is None else f"{batch} rows"
            got = rows if shape is None or batch is None else f"{rows}, shape {tuple(shape)}"
            raise IncompatibleError(
                f"{role}: adapters were chosen for {len(self.rows)} rows, but what comes here has {got}; give as many "
                "choices as the batch has rows, and where the first axis is not the batch, leave this role out of such "
                "adapters"
            )


class Roster:
    """The current activity, which all sites of a model share."""

    def __init__(self, now: Activity = Activity()):
        self.now = now
