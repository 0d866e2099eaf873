"""MemorySite and Side: where modules add keys and values to an attention layer, and where a second network hangs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effzoo.errors import IncompatibleError
from effzoo.sites.hooks import Acts, HookContext, KeysValues, Memory, SideNetwork, memories
from effzoo.sites.site import Site, cast_for


class MemorySite(Site):
    """Additional keys and values of an attention layer, which every query sees (prefix tuning)."""

    def __init__(self, heads: int, head_dim: int, *, value_dim: int | None = None, role: str, layer: int | None = None):
        super().__init__()
        self._open(role, layer)
        self.heads, self.head_dim, self.value_dim = heads, head_dim, value_dim or head_dim

    def forward(self, context: HookContext) -> tuple[KeysValues | None, list[Memory]]:
        """The memory in the softmax of the layer or None, keys [heads, r, head_dim] and values [heads, r, value_dim];
        and memories with a gate. With an axis of the batch in front where examples differ.
        """
        if not self.active:
            return None, []
        by_adapter = []
        for name in self.active:
            modules = self.acting(name)
            by_adapter.append([memory for module in modules for memory in memories(module, _shown(module, context))])
        gated = [memory for of_adapter in by_adapter for memory in of_adapter if memory.gate is not None]
        joining = [[memory for memory in of_adapter if memory.gate is None] for of_adapter in by_adapter]
        if not self.mixed:
            every = [memory for of_adapter in joining for memory in of_adapter]
            return _joined(every) if every else None, gated
        if gated:
            raise IncompatibleError(
                f"{self.role}: gated attention to prompt tokens can neither be averaged nor chosen by row; activate "
                "one adapter"
            )
        pairs = [_joined(of_adapter) for of_adapter in joining if of_adapter]
        if not pairs:
            return None, []
        x = context.layer_input
        assert x is not None
        self.now.check_batch(x.shape[0], self.role, x.shape)
        return (self.mix([keys for keys, _ in pairs]), self.mix([values for _, values in pairs])), []


class Side(Site):
    """The site of a second network next to the blocks (ladder side-tuning).

    width: of the states between the blocks.
    depth: number of blocks.
    narrow: (factor, layers) -> blocks that are `factor` times narrower, with the attention of these layers, and their
        width; the first block that uses a shared parameter owns it.
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
        """Whether an active module replaces the output of the last block."""
        return any(isinstance(module, SideNetwork) for module in self.hung())

    def forward(self, states: Sequence[Tensor], mask: Any) -> Tensor:
        """The mean of the active networks' outputs."""
        if self.now.rows is not None:
            raise IncompatibleError("a side network cannot be chosen by row; run the rows one by one")
        outs = [module(cast_for(module, *states), mask) for module in self.hung() if isinstance(module, SideNetwork)]
        return torch.stack(outs).mean(dim=0).to(states[-1].dtype)


def _shown(module: Acts, context: HookContext) -> HookContext:
    """The context in the dtype of the module; the layer's projections get tokens in that of the layer's input."""
    (x,) = cast_for(module, context.layer_input)
    given, layer = context.layer_input, context.keys_values
    if x is given or given is None or layer is None:
        return context
    return HookContext(context.valid, context.mask, x, lambda tokens: layer(tokens.to(given.dtype)))


def _joined(several: Sequence[Memory]) -> KeysValues:
    """Several memories as one, with an axis of the batch if one of them has it."""
    keys, values = [memory.keys for memory in several], [memory.values for memory in several]
    batch = {len(x) for x in keys if x.ndim == 4}
    if batch:
        keys, values = [_spread(x, *batch) for x in keys], [_spread(x, *batch) for x in values]
    return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)


def _spread(x: Tensor, batch: int) -> Tensor:
    return x if x.ndim == 4 else x.expand(batch, *x.shape)
