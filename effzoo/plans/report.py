"""The memory of one training step by part, as numbers and as a table to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from effzoo.errors import OptionError
from effzoo.plans.saved import Saved
from effzoo.plans.shards import Shards
from effzoo.plans.spread import Spread

MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """Memory of one training step, in bytes.

    weights: parameters and buffers.
    gradients: of the trainable parameters.
    optimizer: its states.
    master: float32 copies of trainable half weights.
    activations: what autograd keeps from the forward to the backward pass, by cause: which site or kind of operation
        saved it; what several saved is listed once, under all their names, `attn.q + attn.k + attn.v`. total: the
        sum of these.
    peak: the most that lives at any moment of forward and backward: weights, optimizer and master, and of
        activations, gradients and temporary results what lives then; blocks that are computed again, with all that
        they save then, included. The optimizer's step and what a kernel allocates inside and frees before it returns
        are left out.
    shards: of a model that is split over ranks, what one holds; weights, gradients and optimizer are of that rank then.
    spread: what a rank sends and computes, of a sequence that is spread over several; all else is of one rank then.
    """

    title: str
    weights: int
    gradients: int
    optimizer: int
    master: int
    activations: Mapping[str, int]
    peak: int
    parameters: int
    trainable: int
    saved: tuple[Saved, ...] = field(default=(), repr=False)
    shards: Shards | None = None
    spread: Spread | None = None

    @property
    def kept(self) -> int:
        """All activations together."""
        return sum(self.activations.values())

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.master + self.kept

    def parts(self) -> dict[str, int]:
        """The parts in the order of the table."""
        return {
            "weights": self.weights, "gradients": self.gradients, "optimizer states": self.optimizer,
            "float32 copies": self.master, "activations": self.kept,
        }  # fmt: skip

    def lines(self, smallest: float = 0.001) -> list[tuple[str, int]]:
        """The lines of the table; causes of activations below this share of the total are one line."""
        shown = [item for item in self.activations.items() if item[1] >= smallest * self.total]
        few = len(self.activations) - len(shown)
        if few:
            shown.append((f"{few} smaller", self.kept - sum(nbytes for _, nbytes in shown)))
        parts = [part for part in self.parts().items() if part[1] or part[0] != "float32 copies"]
        return [
            *parts,
            *((f"  {cause}", nbytes) for cause, nbytes in shown),
            ("total", self.total),
            ("peak in the step", self.peak),
        ]

    def rows(self, smallest: float = 0.001) -> NoReturn:
        """The name of `lines` in 0.2."""
        raise OptionError("the lines of a plan are plan.lines() now; rows are those of a batch")

    def __str__(self) -> str:
        entries = self.lines()
        width = max(len(name) for name, _ in entries)
        lines = [
            self.title,
            f"{self.trainable:,} of {self.parameters:,} parameters are trained",
            "",
            f"{'':{width}}  {'MiB':>12}  {'%':>5}",
        ]
        for name, nbytes in entries:
            lines.append(f"{name:{width}}  {nbytes / MIB:12,.2f}  {100 * nbytes / max(self.total, 1):5.1f}")
        if self.spread is not None:
            lines += ["", str(self.spread)]
        return "\n".join(lines)
