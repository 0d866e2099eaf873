"""What a memory site's own attention layer looks like, and what it sees of real tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effzoo.errors import IncompatibleError, IncompatiblePeft
from effzoo.peft.method import Batches, Modules
from effzoo.sites import Linear, PeftModule, Seen, Site, sites


@dataclass(frozen=True)
class Layer:
    """width: of what keys and values are made of. heads: of the queries."""

    width: int
    heads: int


def layers_of(method: str, model: nn.Module, found: Mapping[str, Site]) -> dict[int, Layer]:
    """The attention layer of each memory site, by the site's id."""
    layers = {}
    for path, site in found.items():
        beside = {near.role: near for _, near in sites(model.get_submodule(path.rpartition(".")[0])) if isinstance(near, Linear)}
        values, out = (beside.get(f"{site.role.rpartition('.')[0]}.{name}") for name in ("v", "o"))
        if values is None or out is None:
            raise IncompatiblePeft(method, path, "its layer projects no values and no output", "use prefix, which needs the memory site alone")
        layers[id(site)] = Layer(values.in_features, out.heads)
    return layers


@dataclass
class Looking:
    """The rows [.., width] of tokens that a layer has seen so far, until `missing` is 0, and the last sight of it."""

    missing: int
    rows: list[Tensor]
    seen: Seen | None = None


class Starts(PeftModule):
    """A module of a memory site that can start from what its layer sees of real tokens; while it looks, it adds nothing."""

    looking: Looking | None = None

    def looks(self, seen: Seen) -> bool:
        """Whether the module only looks now; it then takes the tokens that it still misses."""
        if self.looking is None:
            return False
        rows = seen.x.flatten(0, 1) if seen.valid is None else seen.x[seen.valid]
        rows = rows[: self.looking.missing].detach()
        self.looking.missing -= len(rows)
        self.looking.rows.append(rows)
        self.looking.seen = seen
        return True

    def start(self, rows: Tensor, seen: Seen) -> None:
        """Begin from the layer's inputs [length, width]."""
        raise NotImplementedError


@torch.no_grad()
def start_from_activations(method: str, model: nn.Module, modules: Modules, length: int, batches: Batches) -> None:
    """Every module starts from the first `length` tokens of the batches, one example after the other; repeated where there are fewer."""
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
            if looking.seen is None or looking.missing == length:
                raise IncompatibleError(f"{method}: the layer of {path} has seen no token of the batches; give other batches, or another init")
            rows = torch.cat(looking.rows)
            module.start(rows[torch.arange(length, device=rows.device) % len(rows)], looking.seen)
    finally:
        for module in starting.values():
            module.looking = None
