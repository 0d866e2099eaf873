"""Two changes of one network: what they share, and their direction (Ansell et al. 2022, arXiv:2110.07560, section
3)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

Change = Mapping[str, Tensor]  # what an adapter adds to tensors of the base, by their key: `effzoo.peft.delta`


def support(change: Change) -> int:
    """How many entries a change touches."""
    return sum(int((x != 0).sum()) for x in change.values())


def shared(one: Change, other: Change) -> float:
    """The share of the entries touched by the smaller of two changes that the other touches too; 0 for none."""
    both = sum(int(((x != 0) & (other[key] != 0)).sum()) for key, x in one.items() if key in other)
    return both / max(1, min(support(one), support(other)))


def cosine(one: Change, other: Change) -> float:
    """The cosine between two changes, read as vectors of all entries; 0 where one is 0."""
    inner = sum(float((x.double() * other[key].double()).sum()) for key, x in one.items() if key in other)
    norms = [sum(float(x.double().square().sum()) for x in change.values()) ** 0.5 for change in (one, other)]
    return inner / (norms[0] * norms[1]) if all(norms) else 0.0
