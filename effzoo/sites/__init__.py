"""Sites: the places of a model where a PEFT module can be hung.

Everything with a weight is a site (Linear, LayerNorm, RMSNorm, Embedding, TiedLinear); two weightless Branch sites per
block see what a sub-layer adds to the residual stream, and one MemorySite per attention layer holds extra keys and
values (where keys are normalised, a Keys site sees them afterwards). A site is a thin subclass that owns an empty
ModuleDict, so hanging a module on it renames no base key: new keys contain
`.adapters.<adapter name>.<method name>.`.

Which of them act, in which order and how, is no matter of a site: all sites of a model read it from one `Roster`, which
`effzoo/peft/state.py` keeps.

A module acts at a site by overriding a hook; `effzoo/sites/hooks.py` has them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

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
from effzoo.sites.layers import Branch, Conv2d, Embedding, Keys, LayerNorm, Linear, Norm, RMSNorm, TiedLinear
from effzoo.sites.memory import MemorySite, Side
from effzoo.sites.site import Site
from effzoo.wrappers import Model, refuse_compiled, unwrap

__all__ = [
    "NOWHERE", "Activity", "Acts", "Branch", "Conv2d", "Counted", "Embedding", "Growing", "HookContext", "Keys",
    "KeysValues", "LayerNorm", "Linear", "Memory", "MemorySite", "Mixture", "Model", "Norm", "OwnOutputs", "Packed",
    "PeftModule", "Positionwise", "RMSNorm", "Roster", "Scaled", "Side", "SideNetwork", "Site", "TiedLinear", "calling",
    "has_scale", "learn", "longer", "memories", "opens", "overruled", "own_outputs", "prompt_rows", "sites", "unwrap",
]  # fmt: skip


def sites(model: nn.Module) -> Iterator[tuple[str, Site]]:
    """Every site of a model with its dotted path; what is hung on a site is not looked into, and `torch.compile` and
    the like are seen through."""
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
    """Inside the block other adapters act at these sites than the model says."""
    before = {site: site.roster for site in activities}
    try:
        for site, activity in activities.items():
            site.roster = Roster(activity)
        yield
    finally:
        for site, roster in before.items():
            site.roster = roster


def prompt_rows(model: nn.Module) -> int:
    """How many rows the active adapters put in front of every input of a model; they count towards its length."""
    prompt = unwrap(model).embeddings.prompt()  # type: ignore[union-attr, operator]
    return 0 if prompt is None else int(prompt.shape[-2])
