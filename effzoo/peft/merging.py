"""Merging: writing what an adapter changes into the base weights, so that inference costs nothing extra."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from effzoo.errors import AdapterError
from effzoo.peft.attach import _known, detach
from effzoo.sites import PeftModule, Site, sites

M = TypeVar("M", bound=nn.Module)


def merge(model: M, name: str = "default") -> M:
    """theta <- theta + delta for every site of the adapter, then take the adapter off; return the model.

    Computed in float64 and rounded once to the weight's dtype. Raises AdapterError, and changes nothing, when a module has no delta (prompt,
    prefix, bottleneck adapters: they are no change of a weight) or when a merged weight is not finite.
    """
    attachment = _known(model, name)
    merged: list[tuple[Tensor, Tensor]] = []
    for path, site in sites(model):
        modules = list(site.hung(name)) if name in site.adapters else []
        if not modules:
            continue
        for parameter_name, value in merged_parameters(site, modules, f"adapter {name!r} ({attachment.spec}) at {path}").items():
            if not torch.isfinite(value).all():
                raise AdapterError(
                    f"merging adapter {name!r} would write NaN or infinity into {path}.{parameter_name} "
                    f"({int((~torch.isfinite(value)).sum())} of {value.numel()} entries); the model is unchanged"
                )
            merged.append((getattr(site, parameter_name), value))
    with torch.no_grad():
        for parameter, value in merged:
            parameter.copy_(value)
    return detach(model, name)


def merged_parameters(site: Site, modules: list[PeftModule], where: str = "") -> dict[str, Tensor]:
    """The weight and bias, in float64, that make the site alone compute what it computes with the modules."""
    own = site.base()
    for module in modules:
        if not _mergeable(site, module):
            raise AdapterError(f"{where or site.role} cannot be merged: {type(module).__name__} is not a change of a weight; keep it attached")
    with torch.no_grad():
        now = {key: value.double() for key, value in own.items()}
        for module in modules:  # the same order as in the site's forward: parameter door, outputs, and then inputs
            if "weight" in now:
                now["weight"] = module.weight(now["weight"]).double()
            if "bias" in now:
                now["bias"] = module.bias(now["bias"]).double()
        for module in [m for m in modules if m.opens("after")] + [m for m in reversed(modules) if m.opens("before")]:
            change = module.delta(now["weight"], now.get("bias"))
            assert change is not None
            now["weight"] = now["weight"] + change[0]
            if change[1] is not None:
                now["bias"] = now["bias"] + change[1]
    return now


def _mergeable(site: Site, module: PeftModule) -> bool:
    if module.opens("rows", "memory"):
        return False
    if not module.opens("after", "before"):
        return bool(site.base())
    weight, bias = getattr(site, "weight", None), getattr(site, "bias", None)
    return weight is not None and module.delta(weight, bias) is not None
