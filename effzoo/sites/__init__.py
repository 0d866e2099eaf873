"""Sites: the places of a model where a PEFT module can be hung.

Everything with a weight is a site (Linear, LayerNorm, RMSNorm, Embedding, TiedLinear); two weightless Branch sites per block see what a
sub-layer adds to the residual stream, and one Memory site per attention layer holds extra keys and values (where keys are normalised, a Keys
site sees them afterwards). A site is a thin subclass that owns an empty ModuleDict, so hanging a module on it renames no base key: new keys contain
`.adapters.<adapter name>.<method name>.`.

Which of them act, in which order and how, is no matter of a site: all sites of a model read it from one `Roster`, which `effzoo/peft/state.py` keeps.

A module enters a site through a door, by overriding its method (unified view: He et al. 2022, arXiv:2110.04366):

    door        method                          composition
    parameter   weight(w) -> w', bias(b) -> b'  f(theta + phi)
    input       rows() -> rows, memory() -> k,v f([phi, x])
    function    before(x) -> x', after(x, y) -> y'   phi(f(x))

Three doors more are for methods that need to see more than their site: `joined` (after, with the padding), `remember` and `beyond` (memory, with the
layer's input), and `beside`, the one escape hatch, for a second network beside the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from effzoo.sites.activity import WITHOUT_SCALE, Activity, Acts, Roster, Scaled
from effzoo.sites.doors import KeysValues, Mixture, PeftModule, Seen, longer
from effzoo.sites.layers import Branch, Conv2d, Embedding, Keys, LayerNorm, Linear, Norm, RMSNorm, TiedLinear
from effzoo.sites.memory import Memory, Side
from effzoo.sites.site import Site
from effzoo.wrappers import Model, refuse_compiled, unwrap

__all__ = [
    "WITHOUT_SCALE", "Activity", "Acts", "Branch", "Conv2d", "Embedding", "Keys", "KeysValues", "LayerNorm", "Linear", "Memory", "Mixture", "Model",
    "Norm", "PeftModule", "RMSNorm", "Roster", "Scaled", "Seen", "Side", "Site", "TiedLinear", "longer", "overruled", "prompt_rows", "sites",
    "unwrap",
]  # fmt: skip


def sites(model: nn.Module) -> Iterator[tuple[str, Site]]:
    """Every site of a model with its dotted path; what is hung on a site is not looked into, and `torch.compile` and the like are seen through."""
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
