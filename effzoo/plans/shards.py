"""What one of several ranks holds of a model that is split over them (`effzoo.sharding.shard`)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

from torch import Tensor, nn

from effzoo.plans.optimizers import states


@dataclass(frozen=True)
class Shards:
    """Bytes of the first rank, which holds the most rows.

    ranks: over which the model is split.
    weights: its rows of the base's parameters; adapters and buffers whole.
    gradients: of what is trained of these.
    optimizer: states of the same.
    gathered: what is whole at once beside the rows in a forward or backward pass: all outside the blocks, a block, and
        the next one, which is fetched meanwhile; a reversible model is one unit.
    loading: the most while a checkpoint is read with `shard="full"`: weights, and the largest tensor, which is whole
        for a moment where the layout transposes, joins or cuts it (GPT-2's).
    """

    ranks: int
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    loading: int


def shards(model: nn.Module, ranks: int, optimizer: str, state: int | None) -> Shards:
    """The part of each rank, by closed forms: of a tensor with n rows, ceil(n / ranks).

    optimizer: a name in `effzoo.plans.optimizers.STATES`.
    state: bytes of one of its numbers; None for those of the parameter.
    """
    named = dict(model.named_parameters())
    adapters = {id(parameter) for name, parameter in named.items() if ".adapters." in f".{name}"}

    def here(parameter: Tensor) -> tuple[int, ...]:
        if id(parameter) in adapters:
            return tuple(parameter.shape)
        return (-(-parameter.shape[0] // ranks), *parameter.shape[1:])

    def size(shape: tuple[int, ...], width: int) -> int:
        numbers = 1
        for length in shape:
            numbers *= length
        return numbers * width

    weights = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    weights += sum(size(here(p), p.element_size()) for p in named.values())
    trained = [parameter for parameter in named.values() if parameter.requires_grad]
    return Shards(
        ranks=ranks,
        weights=weights,
        gradients=sum(size(here(p), p.element_size()) for p in trained),
        optimizer=states(optimizer, ((here(p), state or p.element_size()) for p in trained)),
        gathered=_gathered(model, adapters),
        loading=weights + max(p.numel() * p.element_size() for p in named.values()),
    )


def _gathered(model: nn.Module, adapters: set[int]) -> int:
    def whole(module: nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in module.parameters() if id(p) not in adapters)

    blocks = list(dict.fromkeys(cast(Any, getattr(model, "blocks", ()))))
    if getattr(getattr(model, "config", None), "residual", "plain") == "reversible" or not blocks:
        return whole(model)
    sizes = [whole(block) for block in blocks]
    return whole(model) - sum(sizes) + max((one + other for one, other in pairwise(sizes)), default=sizes[0])
