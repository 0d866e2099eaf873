"""The attention layer of a memory site: its sizes, its projections, and its inputs at real tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effzoo.errors import IncompatibleError, IncompatiblePeft
from effzoo.peft.method import Batches, Modules, examples
from effzoo.sharding import one_by_one
from effzoo.sites import HookContext, Linear, Memory, PeftModule, Site, sites


@dataclass(frozen=True)
class Layer:
    """The sizes of an attention layer.

    width: of the input of keys and values.
    heads: of the queries.
    """

    width: int
    heads: int


def layers_of(method: str, model: nn.Module, found: Mapping[str, Site]) -> dict[int, Layer]:
    """The attention layer of each memory site, by the site's id."""
    layers = {}
    for path, site in found.items():
        inside = sites(model.get_submodule(path.rpartition(".")[0]))
        linear = {near.role: near for _, near in inside if isinstance(near, Linear)}
        attention = site.role.rpartition(".")[0]
        values, out = linear.get(f"{attention}.v"), linear.get(f"{attention}.o")
        if values is None or out is None:
            reason = "its layer projects no values and no output"
            raise IncompatiblePeft(method, path, reason, "use prefix, which needs the memory site alone")
        layers[id(site)] = Layer(values.in_features, out.heads)
    return layers


def keys_and_values(context: HookContext, tokens: Tensor, gate: Tensor | None = None) -> Memory:
    """Keys p W_k and values p W_v of prompt tokens p [length, width], by the layer's own projections."""
    assert context.keys_values is not None  # they hang on an attention layer's memory
    keys, values = context.keys_values(tokens)
    return Memory(keys, values, gate)


@dataclass
class Collected:
    """Inputs of an attention layer, collected from real data.

    missing: how many tokens are still wanted.
    tokens: [.., width], one tensor a pass.
    context: of the last pass.
    """

    missing: int
    tokens: list[Tensor]
    context: HookContext | None = None


class StartsFromActivations(PeftModule):
    """A module of a memory site that can start from the layer's inputs at real tokens; while it collects, it adds none.

    collected: what it has collected so far; None when it does not collect.
    """

    collected: Collected | None = None

    def collects(self, context: HookContext) -> bool:
        """Whether the module only collects now; it then takes the tokens that are still missing."""
        if self.collected is None:
            return False
        x, valid = context.x, context.valid
        assert x is not None
        tokens = x.flatten(0, 1) if valid is None else x[valid]
        tokens = tokens[: self.collected.missing].detach()
        self.collected.missing -= len(tokens)
        self.collected.tokens.append(tokens)
        self.collected.context = context
        return True

    def start(self, tokens: Tensor, context: HookContext) -> None:
        """Begin from the layer's inputs [length, width]."""
        raise NotImplementedError


@torch.no_grad()
def start_from_activations(method: str, model: nn.Module, modules: Modules, length: int, batches: Batches) -> None:
    """Every module starts from the first `length` tokens of the batches, which are repeated where there are fewer.

    Examples go one by one: a layer computes packed documents of like lengths together, in an order that depends on all
    rows of a batch.
    """
    starting = {path: module for path, module in modules.items() if isinstance(module, StartsFromActivations)}
    collecting = {path: Collected(length, []) for path in starting}
    try:
        for path, module in starting.items():
            module.collected = collecting[path]
        for example in examples(batches):
            model(**example)
            if not any(collected.missing for collected in collecting.values()):
                break
        with one_by_one(model):
            for path, module in starting.items():
                collected = collecting[path]
                if collected.context is None or collected.missing == length:
                    raise IncompatibleError(
                        f"{method}: the layer of {path} has seen no token of the batches; give others, or another init"
                    )
                tokens = torch.cat(collected.tokens)
                module.start(tokens[torch.arange(length, device=tokens.device) % len(tokens)], collected.context)
    finally:
        for module in starting.values():
            module.collected = None
