"""MemorySite and Side: where a module gives an attention layer more to look at, and where a second network stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effzoo.errors import IncompatibleError
from effzoo.sites.hooks import Acts, HookContext, KeysValues, Memory, SideNetwork, memories
from effzoo.sites.site import Site, suited


class MemorySite(Site):
    """Extra keys and values of one attention layer, seen by every query: what prefix tuning trains."""

    def __init__(self, heads: int, head_dim: int, *, value_dim: int | None = None, role: str, layer: int | None = None):
        super().__init__()
        self._open(role, layer)
        self.heads, self.head_dim, self.value_dim = heads, head_dim, value_dim or head_dim

    def forward(self, context: HookContext) -> tuple[KeysValues | None, list[Memory]]:
        """What joins the softmax of the layer, keys [heads, r, head_dim] and values [heads, r, value_dim] or None, and
        memories with a gate.

        With an axis of the batch in front where they differ by example.
        """
        if not self.active:
            return None, []
        each = [
            [one for module in self.acting(name) for one in memories(module, _shown(module, context))]
            for name in self.active
        ]
        gated = [one for of_adapter in each for one in of_adapter if one.gate is not None]
        joining = [[one for one in of_adapter if one.gate is None] for of_adapter in each]
        if not self.mixed:
            together = [one for of_adapter in joining for one in of_adapter]
            return _joined(together) if together else None, gated
        if gated:
            raise IncompatibleError(
                f"{self.role}: gated attention to trained rows can neither be averaged nor "
                "chosen by row; activate one adapter"
            )
        found = [_joined(of_adapter) for of_adapter in joining if of_adapter]
        if not found:
            return None, []
        assert context.x is not None
        self.now.check_batch(context.x.shape[0], self.role, context.x.shape)
        return (self.mix([keys for keys, _ in found]), self.mix([values for _, values in found])), []


class Side(Site):
    """The one place for a second network beside the blocks (ladder side-tuning).

    width: of the states between the blocks.
    depth: how many blocks there are.
    narrow: factor, layers -> blocks `factor` times narrower with the attention of these layers, and their width;
        what the blocks share is in the first that uses it.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        narrow: Callable[[int, Sequence[int]], tuple[nn.ModuleList, int]],
        *,
        role: str = "side",
    ):
        super().__init__()
        self._open(role, None)
        self.width, self.depth, self.narrow = width, depth, narrow

    @property
    def replaces(self) -> bool:
        """Whether an active module computes the output in place of the last block."""
        return any(isinstance(module, SideNetwork) for module in self.hung())

    def forward(self, states: Sequence[Tensor], mask: Any) -> Tensor:
        """The mean of what the active networks make of the states."""
        if self.now.rows is not None:
            raise IncompatibleError("a side network cannot be chosen by row; run the rows apart")
        outs = [module(suited(module, *states), mask) for module in self.hung() if isinstance(module, SideNetwork)]
        return torch.stack(outs).mean(dim=0).to(states[-1].dtype)


def _shown(module: Acts, context: HookContext) -> HookContext:
    """The context in the dtype that the module computes in; rows that it gives meet the projections in that of the
    layer's input."""
    (x,) = suited(module, context.x)
    given, layer = context.x, context.keys_values
    if x is given or given is None or layer is None:
        return context
    return HookContext(context.valid, context.mask, x, lambda rows: layer(rows.to(given.dtype)))


def _joined(found: Sequence[Memory]) -> KeysValues:
    """Several memories as one; those that differ by example spread the others over the batch."""
    pairs = [(one.keys, one.values) for one in found]
    batch = {len(keys) for keys, _ in pairs if keys.ndim == 4}
    if batch:
        pairs = [(_spread(keys, *batch), _spread(values, *batch)) for keys, values in pairs]
    return torch.cat([keys for keys, _ in pairs], dim=-2), torch.cat([values for _, values in pairs], dim=-2)


def _spread(x: Tensor, batch: int) -> Tensor:
    return x if x.ndim == 4 else x.expand(batch, *x.shape)
