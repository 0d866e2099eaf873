"""Past one device: one sequence over several ranks, at the cost of its attention kind."""

from effzoo.parallel import blocks, cost
from effzoo.parallel.hashing import Hashed, hashed
from effzoo.parallel.kinds import attention, multiple_of
from effzoo.parallel.model import OverRanks
from effzoo.parallel.ranks import Split, Traffic, counted

__all__ = [
    "Hashed", "OverRanks", "Split", "Traffic", "attention", "blocks", "cost", "counted", "hashed", "multiple_of",
]  # fmt: skip
