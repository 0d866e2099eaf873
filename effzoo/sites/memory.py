"""Memory and Side: where a module gives an attention layer more to look at, and where a second network stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effzoo.errors import IncompatibleError
from effzoo.sites.activity import Acts
from effzoo.sites.doors import KeysValues, Seen
from effzoo.sites.site import Site, given, suited


class Memory(Site):
    """Extra keys and values of one attention layer, seen by every query: what prefix tuning trains."""

    def __init__(self, heads: int, head_dim: int, *, value_dim: int | None = None, role: str, layer: int | None = None):
        super().__init__()
        self._open(role, layer)
        self.heads, self.head_dim, self.value_dim = heads, head_dim, value_dim or head_dim

    def forward(self, seen: Seen) -> KeysValues | None:
        """Keys [heads, rows, head_dim] and values [heads, rows, value_dim], or None when nothing is hung here; with an axis of the batch in front
        where they differ by example."""
        each = [given(module.remember(_shown(module, seen)) for module in self.acting(name)) for name in self.active]
        if not self.mixed:
            put_in = [found for of_adapter in each for found in of_adapter]
            return _joined(put_in) if put_in else None
        memories = [_joined(found) for found in each if found]
        if not memories:
            return None
        self.now.check_batch(seen.x.shape[0], self.role, seen.x.shape)
        return self.mix([keys for keys, _ in memories]), self.mix([values for _, values in memories])

    def extras(self, seen: Seen) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Keys, values and gates that have a softmax of their own."""
        found = [each for module in self.acting() for each in module.apart(_shown(module, seen))]
        if found and self.mixed:
            raise IncompatibleError(f"{self.role}: gated attention to trained rows can neither be averaged nor chosen by row; activate one adapter")
        return found


class Side(Site):
    """The one place for a second network beside the blocks (ladder side-tuning).

    width: of the states between the blocks. depth: how many blocks there are. narrow: factor, layers -> blocks `factor` times narrower with the
    attention of these layers, and their width; what the blocks share is in the first that uses it.
    """

    def __init__(self, width: int, depth: int, narrow: Callable[[int, Sequence[int]], tuple[nn.ModuleList, int]], *, role: str = "side"):
        super().__init__()
        self._open(role, None)
        self.width, self.depth, self.narrow = width, depth, narrow

    @property
    def replaces(self) -> bool:
        """Whether an active module computes the output in place of the last block."""
        return any(module.opens("beside") for module in self.hung())

    def forward(self, states: Sequence[Tensor], mask: Any) -> Tensor:
        """The mean of what the active networks make of the states."""
        if self.now.rows is not None:
            raise IncompatibleError("a side network cannot be chosen by row; run the rows apart")
        outs = [module.beside(suited(module, *states), mask) for module in self.hung() if module.opens("beside")]
        return torch.stack(outs).mean(dim=0).to(states[-1].dtype)


def _shown(module: Acts, seen: Seen) -> Seen:
    """What the layer shows, in the dtype that the module computes in; rows that it gives meet the projections in that of the layer's input."""
    (x,) = suited(module, seen.x)
    return seen if x is seen.x else Seen(x, seen.valid, lambda rows: seen.keys_values(rows.to(seen.x.dtype)))


def _joined(memories: Sequence[KeysValues]) -> KeysValues:
    """Several memories as one; those that differ by example spread the others over the batch."""
    batch = {len(keys) for keys, _ in memories if keys.ndim == 4}
    if batch:
        memories = [tuple(x if x.ndim == 4 else x.expand(*batch, *x.shape) for x in memory) for memory in memories]  # type: ignore[misc]
    return torch.cat([keys for keys, _ in memories], dim=-2), torch.cat([values for _, values in memories], dim=-2)
