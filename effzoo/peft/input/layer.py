"""What a memory site's own attention layer looks like, and what it sees of real tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effzoo.errors import IncompatibleError, IncompatiblePeft
from effzoo.peft.method import Batches, Modules
from effzoo.sites import HookContext, Linear, Memory, PeftModule, Site, sites


@dataclass(frozen=True)
class Layer:
    """width: of what keys and values are made of. heads: of the queries."""

    width: int
    heads: int


def layers_of(method: str, model: nn.Module, found: Mapping[str, Site]) -> dict[int, Layer]:
    """The attention layer of each memory site, by the site's id."""
    layers = {}
    for path, site in found.items():
        beside = {
            near.role: near
            for _, near in sites(model.get_submodule(path.rpartition(".")[0]))
            if isinstance(near, Linear)
        }
        values, out = (beside.get(f"{site.role.rpartition('.')[0]}.{name}") for name in ("v", "o"))
        if values is None or out is None:
            raise IncompatiblePeft(
                method,
                path,
                "its layer projects no values and no output",
                "use prefix, which needs the memory site alone",
            )
        layers[id(site)] = Layer(values.in_features, out.heads)
    return layers


def read_through(context: HookContext, tokens: Tensor, gate: Tensor | None = None) -> Memory:
    """Prompt tokens [length, width] read through the layer's own projections: keys p W_k and values p W_v."""
    assert context.keys_values is not None  # they hang on an attention layer's memory
    keys, values = context.keys_values(tokens)
    return Memory(keys, values, gate)


@dataclass
class Looking:
    """The rows [.., width] of tokens that a layer has seen so far, until `missing` is 0, and what it was told last."""

    missing: int
    rows: list[Tensor]
    context: HookContext | None = None


class Starts(PeftModule):
    """A module of a memory site that can start from what its layer sees of real tokens; while it looks, it adds
    nothing."""

    looking: Looking | None = None

    def looks(self, context: HookContext) -> bool:
        """Whether the module only looks now; it then takes the tokens that it still misses."""
        if self.looking is None:
            return False
        x, valid = context.x, context.valid
        assert x is not None
        rows = x.flatten(0, 1) if valid is None else x[valid]
        rows = rows[: self.looking.missing].detach()
        self.looking.missing -= len(rows)
        self.looking.rows.append(rows)
        self.looking.context = context
        return True

    def start(self, rows: Tensor, context: HookContext) -> None:
        """Begin from the layer's inputs [length, width]."""
        raise NotImplementedError


@torch.no_grad()
def start_from_activations(method: str, model: nn.Module, modules: Modules, length: int, batches: Batches) -> None:
    """Every module starts from the first `length` tokens of the batches, one example after the other; repeated where
    there are fewer."""
    starting = {path: module for path, module in modules.items() if isinstance(module, Starts)}
    try:
        for module in starting.values():
            module.looking = Looking(length, [])
        for batch in batches:
            model(**batch)
            if not any(module.looking is not None and module.looking.missing for module in starting.values()):
                break
        for path, module in starting.items():
            looking = module.looking
            assert looking is not None
            if looking.context is None or looking.missing == length:
                raise IncompatibleError(
                    f"{method}: the layer of {path} has seen no token of the batches; give other "
                    "batches, or another init"
                )
            rows = torch.cat(looking.rows)
            module.start(rows[torch.arange(length, device=rows.device) % len(rows)], looking.context)
    finally:
        for module in starting.values():
            module.looking = None
