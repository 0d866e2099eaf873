"""Sites: the places of a model where a PEFT module can be hung.

Each layer with a weight is a site (Linear, LayerNorm, RMSNorm, Embedding, TiedLinear). A block has two Branch sites,
which see what a sub-layer adds to the residual stream, and a Stream site behind them; an attention layer has a
MemorySite for additional keys and values, and a Keys site where it normalises keys. A site is a thin subclass with an
empty ModuleDict: a module that hangs on it has keys with `.adapters.ADAPTER.METHOD.`, and no key of the base changes.

A module acts by overriding hooks (`effzoo/sites/hooks.py`). Which adapters act, and in which order, all sites of a
model read from one `Roster` (`effzoo/peft/state.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from effzoo.sites.activity import Activity, Roster
from effzoo.sites.extras import Counted, Growing, OwnOutputs, Packed, Positionwise, longer, own_outputs
from effzoo.sites.hooks import (
    NOWHERE,
    Acts,
    HookContext,
    KeysValues,
    Memory,
    Mixture,
    PeftModule,
    Scaled,
    SideNetwork,
    calling,
    has_scale,
    learn,
    memories,
    opens,
)
from effzoo.sites.layers import (
    Branch,
    Conv2d,
    Embedding,
    Keys,
    LayerNorm,
    Linear,
    Norm,
    RMSNorm,
    RMSNormPlusOne,
    Stream,
    TiedLinear,
)
from effzoo.sites.memory import MemorySite, Side
from effzoo.sites.site import Site
from effzoo.wrappers import Around, Model, refuse_compiled, unwrap

__all__ = [
    "NOWHERE", "Activity", "Acts", "Around", "Branch", "Conv2d", "Counted", "Embedding", "Growing", "HookContext",
    "Keys", "KeysValues", "LayerNorm", "Linear", "Memory", "MemorySite", "Mixture", "Model", "Norm", "OwnOutputs",
    "Packed", "PeftModule", "Positionwise", "RMSNorm", "RMSNormPlusOne", "Roster", "Scaled", "Side", "SideNetwork",
    "Site", "Stream", "TiedLinear", "calling", "has_scale", "learn", "longer", "memories", "opens", "overruled",
    "own_outputs", "prompt_length", "sites", "unwrap",
]  # fmt: skip


def sites(model: nn.Module) -> Iterator[tuple[str, Site]]:
    """Every site of a model with its dotted path, also under `torch.compile` and the like; not those of adapters."""
    yield from _sites(unwrap(model), "", set())


def _sites(module: nn.Module, path: str, seen: set[nn.Module]) -> Iterator[tuple[str, Site]]:
    if module in seen:
        return
    seen.add(module)
    refuse_compiled(module, path)
    if isinstance(module, Site):
        yield path, module
    for name, child in module.named_children():
        if not (isinstance(module, Site) and name == "adapters"):
            yield from _sites(child, f"{path}.{name}" if path else name, seen)


@contextmanager
def overruled(activities: Mapping[Site, Activity]) -> Iterator[None]:
    """Inside, these activities hold at their sites, instead of that of the model."""
    before = {site: site.roster for site in activities}
    try:
        for site, activity in activities.items():
            site.roster = Roster(activity)
        yield
    finally:
        for site, roster in before.items():
            site.roster = roster


def prompt_length(model: nn.Module) -> int:
    """The number of prompt tokens that active adapters put in front of every input; they count towards its length."""
    prompt = cast(Any, unwrap(model)).embeddings.prompt()
    return 0 if prompt is None else int(prompt.shape[-2])
