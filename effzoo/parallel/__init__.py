"""Past one device: one sequence over several ranks, at the cost of its attention kind."""

from effzoo.parallel.kinds import attention, multiple_of
from effzoo.parallel.model import OverRanks
from effzoo.parallel.ranks import Split, Traffic, counted

__all__ = ["OverRanks", "Split", "Traffic", "attention", "counted", "multiple_of"]
