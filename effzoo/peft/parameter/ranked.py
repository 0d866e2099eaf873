"""What low-rank changes of single linear layers share: a rank, and a scale alpha / rank."""

from __future__ import annotations

from typing import ClassVar

from effzoo.annotations import Count, Positive
from effzoo.peft.method import Layers, Method, Targets
from effzoo.sites import Linear, Site


class Ranked(Method):
    """A method with the options `rank` and `alpha`; None of alpha is the rank, so that the scale is 1."""

    accepts: ClassVar[tuple[type[Site], ...]] = (Linear,)
    default_targets = ("attn.q*", "attn.v*")
    size = "rank"

    def __init__(
        self, *, rank: Count = 8, alpha: Positive | None = None, targets: Targets = None, layers: Layers = None
    ):
        super().__init__(targets=targets, layers=layers)
        self.rank, self.alpha = rank, alpha

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank
