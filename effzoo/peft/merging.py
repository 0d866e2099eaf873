"""Merging: writing what an adapter changes into the base weights, so that inference costs nothing extra; and taking it out again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from effzoo.errors import AdapterError
from effzoo.peft.attach import Attachment, _known, _state, activate, active, detach
from effzoo.peft.training import finish
from effzoo.sites import PeftModule, Site, sites

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Rounding:
    """What storing one merged tensor in its dtype costs.

    delta: the norm of the change in float64. error: the norm of what rounding W + delta to the dtype changes, beside the rounding of W itself,
    which holds no error. relative: error / delta. lost: the share of the changed entries that the dtype cannot tell from before.
    """

    tensor: str
    dtype: torch.dtype
    delta: float
    error: float
    lost: float

    @property
    def relative(self) -> float:
        return self.error / self.delta if self.delta else 0.0


@dataclass(frozen=True)
class MergeReport:
    """The rounding error of every merged tensor."""

    rows: tuple[Rounding, ...]

    @property
    def worst(self) -> float:
        """The largest relative error."""
        return max((row.relative for row in self.rows), default=0.0)

    def __str__(self) -> str:
        width = max((len(row.tensor) for row in self.rows), default=0)
        lines = [f"{'tensor':{width}}  dtype     |delta|    |error|    relative  lost"]
        for row in sorted(self.rows, key=lambda row: -row.relative):
            dtype = str(row.dtype).removeprefix("torch.")
            lines.append(f"{row.tensor:{width}}  {dtype:8}  {row.delta:.3e}  {row.error:.3e}  {row.relative:8.2%}  {row.lost:.2%}")
        return "\n".join(lines)


@dataclass
class _Merged:
    """What `unmerge` needs: the adapter, and the tensors as they were."""

    name: str
    attachment: Attachment
    modules: dict[str, nn.Module]
    originals: dict[tuple[str, str], Tensor]
    before: tuple[str, ...]


@overload
def merge(model: M, name: str = "default", *, undo: bool = True, report: Literal[False] = False) -> M: ...
@overload
def merge(model: nn.Module, name: str = "default", *, undo: bool = True, report: Literal[True]) -> MergeReport: ...


def merge(model: M, name: str = "default", *, undo: bool = True, report: bool = False) -> M | MergeReport:
    """theta <- theta + delta for every site of the adapter, then take the adapter off; return the model, or the report when asked for.

    Computed in float64 and rounded once to the weight's dtype; `report` says what that rounding costs, layer by layer (in bfloat16 most
    of a small change can be lost). undo: keep what was overwritten, so that `unmerge` restores it bit by bit. Raises AdapterError, and
    changes nothing, when a module has no delta (prompt, prefix, bottleneck adapters: they are no change of a weight) or when a merged weight
    is not finite.
    """
    attachment = _known(model, name)
    for path, site in sites(model):
        for module in site.hung(name):
            if _no_weight(site, module):  # said before `finish`, which cannot be taken back
                raise _refusal(f"adapter {name!r} ({attachment.spec}) at {path}", module)
    finish(model, name)
    found = {path: (site, list(site.hung(name))) for path, site in sites(model) if name in site.adapters}
    merged: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    for path, (site, modules) in found.items():
        for parameter_name, value in merged_parameters(site, modules, f"adapter {name!r} ({attachment.spec}) at {path}").items() if modules else ():
            if not torch.isfinite(value).all():
                raise AdapterError(
                    f"merging adapter {name!r} would write NaN or infinity into {path}.{parameter_name} "
                    f"({int((~torch.isfinite(value)).sum())} of {value.numel()} entries); the model is unchanged"
                )
            merged[path, parameter_name] = (getattr(site, parameter_name), value)
    rows = tuple(_rounding(f"{path}.{key}", parameter, value) for (path, key), (parameter, value) in merged.items()) if report else ()
    kept = _Merged(name, attachment, {path: site.of(name) for path, (site, _) in found.items()}, {}, active(model))
    with torch.no_grad():
        for place, (parameter, value) in merged.items():
            if undo:
                kept.originals[place] = parameter.detach().clone()
            parameter.copy_(value)
    detach(model, name)
    if undo:
        _state(model).merged.append(kept)
    return MergeReport(rows) if report else model


def unmerge(model: M, name: str = "default") -> M:
    """Put back, bit by bit, the weights that `merge` overwrote, and attach the adapter again as it was; return the model.

    The adapters merged last come first. Raises AdapterError for a name that was not merged, or merged with undo=False.
    """
    state = _state(model)
    names = [merged.name for merged in state.merged]
    if name not in names:
        raise AdapterError(f"no merged adapter {name!r} can be taken out again; merged with undo: {', '.join(names) or '(none)'}")
    if names[-1] != name:
        raise AdapterError(f"{names[-1]!r} was merged after {name!r}; unmerge it first")
    kept: _Merged = state.merged.pop()
    known = dict(sites(model))
    with torch.no_grad():
        for (path, key), original in kept.originals.items():
            getattr(known[path], key).copy_(original)
    for path, modules in kept.modules.items():
        known[path].adapters[name] = modules
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad and ".adapters." not in f".{parameter_name}":
            parameter.requires_grad_(False)
            state.frozen.add(parameter_name)
    state.attachments[name] = kept.attachment
    return activate(model, *dict.fromkeys((*active(model), name)))


def merged_tensors(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The merged adapters that can be taken out again, each with the keys of the tensors that `unmerge` would put back."""
    return {merged.name: tuple(f"{path}.{key}" for path, key in merged.originals) for merged in _state(model).merged}


@torch.no_grad()
def delta(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """What merging the adapter would add to each tensor of the base, by its key, in float64. Raises AdapterError where `merge` does."""
    attachment = _known(model, name)
    changes: dict[str, Tensor] = {}
    for path, site in sites(model):
        modules = list(site.hung(name))
        if modules:
            own = {key: value.detach().double() for key, value in site.base().items()}
            merged = merged_parameters(site, modules, f"adapter {name!r} ({attachment.spec}) at {path}")
            changes |= {f"{path}.{key}": merged[key] - own[key] for key in own}
    return changes


def merged_parameters(site: Site, modules: Sequence[PeftModule], where: str = "") -> dict[str, Tensor]:
    """The weight and bias, in float64, that make the site alone compute what it computes with the modules."""
    own = site.base()
    for module in modules:
        if not mergeable(site, module):
            raise _refusal(where or site.role, module)
    with torch.no_grad():
        now = {key: value.double() for key, value in own.items()}
        for module in modules:  # the same order as in the site's forward: parameter door, outputs, and then inputs
            if "weight" in now:
                now["weight"] = module.weight(now["weight"]).double()
            if "bias" in now:
                now["bias"] = module.bias(now["bias"]).double()
        for module in [m for m in modules if m.opens("after", "joined")] + [m for m in reversed(modules) if m.opens("before")]:
            change = module.delta(now["weight"], now.get("bias"))
            assert change is not None
            now["weight"] = now["weight"] + change[0]
            if change[1] is not None:
                now["bias"] = now["bias"] + change[1]
    return now


def mergeable(site: Site, module: PeftModule) -> bool:
    """Whether what the module does at the site is a change of the site's weight and bias."""
    if _no_weight(site, module):
        return False
    if not module.opens("after", "before", "joined"):
        return bool(site.base())
    return module.delta(site.weight, getattr(site, "bias", None)) is not None  # type: ignore[arg-type]


def _no_weight(site: Site, module: PeftModule) -> bool:
    """Whether there is no weight that the module could be a change of, whatever its numbers are."""
    if module.opens("rows", "memory", "remember", "beyond", "beside"):
        return True
    return module.opens("after", "before", "joined") and getattr(site, "weight", None) is None


def _refusal(where: str, module: PeftModule) -> AdapterError:
    return AdapterError(f"{where} cannot be merged: {type(module).__name__} is not a change of a weight; keep it attached")


def _rounding(tensor: str, parameter: Tensor, value: Tensor) -> Rounding:
    before, value = parameter.detach().double(), value.detach()
    stored = value.to(parameter.dtype).double()
    changed = value != before
    lost = ((stored == before) & changed).sum() / changed.sum().clamp(min=1)
    return Rounding(tensor, parameter.dtype, float((value - before).norm()), float((stored - value).norm()), float(lost))
