"""Attaching adapters to a model of sites, by name: several side by side, any of them active.

An adapter is a union of methods under one name, together with its own copy of the task head (roles `head.*`), because a head belongs to
the task that the adapter learns. While an adapter is attached the base model is frozen; when the last one goes, the
base is as trainable as it was before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from effzoo.errors import AdapterError, IncompatiblePeft, OptionError, TargetError, UnknownNameError, did_you_mean, listing
from effzoo.peft.method import HEAD, Method
from effzoo.registry import peft as registry
from effzoo.sites import Site, sites
from effzoo.spec import Spec, parse

M = TypeVar("M", bound=nn.Module)


@dataclass
class Attachment:
    """One adapter of a model: its spec, and where each of its methods hangs, {method: [(path, role)]}.

    methods: each method with the paths where it hangs. finished: whether `effzoo.peft.finish` has dropped what only training needed. dtype: in which
    it was asked to be held; None for float32, or float64 where the base is.
    """

    name: str
    specs: tuple[Spec, ...]
    places: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    methods: list[tuple[Method, list[str]]] = field(default_factory=list)
    finished: bool = False
    dtype: torch.dtype | None = None

    @property
    def spec(self) -> str:
        return "|".join(map(str, self.specs))


@dataclass
class _State:
    attachments: dict[str, Attachment] = field(default_factory=dict)
    merged: list[Any] = field(default_factory=list)  # what `unmerge` puts back, the last one first
    frozen: set[str] = field(default_factory=set)  # the base parameters that attaching froze


def attach(model: M, peft: Any, *, name: str = "default", dtype: torch.dtype | str | None = None) -> M:
    """Hang the methods of a spec (`"lora[rank=4]|ia3"`) on a model under a name, make it the active adapter, return the model.

    The base is frozen; only the new adapter's parameters are trainable. Adapters attached before stay, inactive;
    `activate(model, "a", "b")` stacks several. dtype: of the adapter's tensors; None is float32 whatever the base is (float64 on a float64 base),
    since in half precision small updates are lost. It computes in that dtype, and what it gives back to the model is rounded once.

    Raises TargetError, AdapterError, OptionError; the model is then unchanged.
    """
    state = _state(model)
    if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
        raise AdapterError(f"an adapter name is a Python identifier that torch does not use itself, got {name!r}; try 'task_a'")
    if name in state.attachments or any(name == merged.name for merged in state.merged):
        raise AdapterError(f"an adapter named {name!r} is attached already (or merged); detach it first or choose another name")
    attachment, settled = Attachment(name, parse(peft), dtype=_dtype(dtype)), []
    try:
        for spec in attachment.specs:
            method = registry.create(spec)
            found = targets(model, method)
            method.prepare(model, found)
            settled.append(Spec(spec.name, {**spec.options, **method.settled_options}))
            _hang(model, method, attachment, found)
        heads = {path: site for path, site in sites(model) if fnmatchcase(site.role, HEAD) and name not in site.adapters and site.base()}
        if heads:
            _hang(model, registry.create("head"), attachment, heads)
        if not any(p.requires_grad for key, p in model.named_parameters() if f".adapters.{name}." in f".{key}"):
            raise AdapterError(f"{attachment.spec} has nothing to train on this model; choose other targets")
    except Exception:
        _remove(model, name)
        raise
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad and ".adapters." not in f".{parameter_name}":
            parameter.requires_grad_(False)
            state.frozen.add(parameter_name)
    attachment.specs = tuple(settled)
    state.attachments[name] = attachment
    activate(model, name)
    return model


def detach(model: M, name: str) -> M:
    """Take an adapter off; what is left is bit-identical to a model that never had it."""
    _known(model, name)
    state = _state(model)
    was_active = active(model)
    _remove(model, name)
    del state.attachments[name]
    if state.attachments:
        activate(model, *(other for other in was_active if other != name))
    else:
        for parameter_name, parameter in model.named_parameters():
            if parameter_name in state.frozen:
                parameter.requires_grad_(True)
        state.frozen.clear()
    return model


def activate(model: M, *names: str, combine: Literal["stack", "average"] = "stack", rows: Sequence[str | None] | None = None) -> M:
    """Make exactly these adapters active and trainable; none means the bare base model.

    combine: "stack", each acts on what the one before has made of its site, in the given order; "average", side by side, and the mean of
    their outputs counts, at every site. rows: instead of names, the adapter of each row of the batch (None: the bare base);
    adapters of one spec, which act in one gathered product. Then every batch must have as many rows.
    """
    if rows is not None:
        if names:
            raise AdapterError("give either adapter names or rows, not both")
        names = tuple(dict.fromkeys(name for name in rows if name is not None))
    if combine not in ("stack", "average"):
        raise AdapterError(f"combine is 'stack' or 'average', got {combine!r}")
    for name in names:
        _known(model, name)
    for _, site in sites(model):
        site.active = tuple(name for name in names if name in site.adapters)
        site.average = combine == "average" and len(names) > 1
        site.choice = None
        if rows is not None and site.active:
            site.choice = torch.tensor([site.active.index(name) if name in site.active else -1 for name in rows])
        for adapter in site.adapters:
            for module in site.hung(adapter):
                module.learn(adapter in names)
    return model


def attached(model: nn.Module) -> dict[str, Attachment]:
    """The adapters of a model by name, in the order in which they were attached."""
    return dict(_state(model).attachments)


def active(model: nn.Module) -> tuple[str, ...]:
    """The active adapters."""
    names: dict[str, None] = {}
    for _, site in sites(model):
        names.update(dict.fromkeys(site.active))
    return tuple(names)


def roles(model: nn.Module) -> dict[str, int]:
    """The roles of a model's sites, each with the number of sites that have it."""
    count: dict[str, int] = {}
    for _, site in sites(model):
        count[site.role] = count.get(site.role, 0) + 1
    return count


def targets(model: nn.Module, method: Method) -> dict[str, Site]:
    """The sites on which a method hangs, by path. TargetError for what matches nothing or only partly, and for misfits."""
    everything = dict(sites(model))
    if not everything:
        raise TargetError(f"{type(model).__name__} has no sites; build it from effzoo.sites (Linear, LayerNorm, Embedding, ...)")
    layers = _layers(method, everything)
    patterns = method.targets or method.default_targets
    found: dict[str, Site] = {}
    for pattern in patterns:
        matched = {path: site for path, site in everything.items() if fnmatchcase(site.role, pattern)}
        if not matched and method.targets:
            known = roles(model)
            raise TargetError(f"{method.name}: target {pattern!r} matches no role{did_you_mean(pattern, known)} Roles: {listing(known)}.")
        matched = {path: site for path, site in matched.items() if site.layer in layers or (site.layer is None and method.layers is None)}
        missing = layers - {site.layer for site in matched.values()} if any(site.layer is not None for site in matched.values()) else set()
        if missing and method.targets:
            raise TargetError(
                f"{method.name}: target {pattern!r} matches only some layers, not {sorted(missing)}; "  # type: ignore[type-var]
                f"give layers={tuple(sorted(layers - missing))} to mean that, or another pattern"  # type: ignore[type-var]
            )
        found.update(matched)
    if not found and not method.targets and not any(isinstance(site, method.accepts) for site in everything.values()):
        kinds = " or ".join(cls.__name__ for cls in method.accepts)
        suggestion = "use it on a model that has them, or another method"
        raise IncompatiblePeft(method.name, "this model", f"it hangs on {kinds} sites, of which there are none", suggestion)
    if not found:
        raise TargetError(f"{method.name}: nothing in this model matches {listing(patterns)}. Roles: {listing(roles(model))}.")
    for path, site in found.items():
        if not isinstance(site, method.accepts):
            accepted = " or ".join(cls.__name__ for cls in method.accepts)
            raise TargetError(f"{method.name} hangs on {accepted} sites; {site.role!r} ({path}) is {type(site).__name__}")
    return found


def _layers(method: Method, everything: dict[str, Site]) -> set[int | None]:
    present = {site.layer for site in everything.values() if site.layer is not None}
    if method.layers is None:
        return set(present)
    depth = max(present, default=-1) + 1
    outside = [layer for layer in method.layers if not -depth <= layer < depth]
    if outside:
        raise TargetError(f"{method.name}: layers {outside} do not exist; this model has {depth} (0 to {depth - 1}, or -{depth} to -1)")
    return {layer % depth for layer in method.layers}


def _hang(model: nn.Module, method: Method, attachment: Attachment, found: dict[str, Site]) -> None:
    like = next(p for p in model.parameters() if p.is_floating_point())
    places = []
    for path, site in found.items():
        module = method.make(site)
        if module is None:
            continue
        parameter = next(iter(site.base().values()), like)
        module = module.to(device=parameter.device, dtype=held_in(parameter.dtype, attachment.dtype))
        site.hang(attachment.name, method.name, module.train(site.training))
        places.append((path, site.role))
    if not places:
        raise TargetError(
            f"{method.name}: none of the {len(found)} sites has anything to adapt ({listing(sorted({s.role for s in found.values()}))})"
        )
    attachment.places.setdefault(method.name, []).extend(places)
    attachment.methods.append((method, [path for path, _ in places]))


def held_in(base: torch.dtype, asked: torch.dtype | None = None) -> torch.dtype:
    """The dtype of an adapter's tensors: the one that was asked for, else float32, or the base's where that is wider."""
    return torch.promote_types(base, torch.float32) if asked is None else asked


def recast(model: M, *names: str, dtype: torch.dtype | str | None = None) -> M:
    """Hold the tensors of the named adapters (all, when none is named) in another dtype, the base left as it is; return the model.

    dtype: None is what `attach` gives: float32, or float64 on a float64 base. For an adapter that `model.to(torch.bfloat16)` has cast with the base;
    what that has rounded stays rounded. Raises UnknownNameError, OptionError.
    """
    wanted = _dtype(dtype)
    for name in names:
        _known(model, name)
    like = next(tensor for tensor in base_tensors(model).values() if tensor.is_floating_point())
    for name in names or tuple(_state(model).attachments):
        for _, site in sites(model):
            if name in site.adapters:
                parameter = next(iter(site.base().values()), like)
                site.of(name).to(dtype=held_in(parameter.dtype, wanted))
        _state(model).attachments[name].dtype = wanted
    return model


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if given is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise OptionError(f"dtype is a floating-point type such as torch.bfloat16 or 'float32', or None for float32 or better, got {given!r}")
    return found


def _remove(model: nn.Module, name: str) -> None:
    for _, site in sites(model):
        if name in site.adapters:
            del site.adapters[name]
        site.active = tuple(other for other in site.active if other != name)
        if not site.active:
            site.average, site.choice = False, None


def _known(model: nn.Module, name: str) -> Attachment:
    state = _state(model)
    if name not in state.attachments:
        raise UnknownNameError("adapter", name, state.attachments)
    return state.attachments[name]


def _state(model: nn.Module) -> _State:
    if not isinstance(model, nn.Module):
        raise AdapterError(f"expected a model (torch.nn.Module), got {type(model).__name__}")
    if "_effzoo_adapters" not in model.__dict__:
        model.__dict__["_effzoo_adapters"] = _State()
    state: _State = model.__dict__["_effzoo_adapters"]
    return state


def base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's own weights: its state dict without what adapters added."""
    return {key: value for key, value in model.state_dict().items() if ".adapters." not in f".{key}"}


def adapter_tensors(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The tensors of one adapter, by their key in the model; what several modules share appears once."""
    _known(model, name)
    own = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    identity = {key: id(tensor) for key, tensor in own}
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for key, value in model.state_dict().items():
        if f".adapters.{name}." in f".{key}" and identity[key] not in seen:
            seen.add(identity[key])
            tensors[key] = value
    return tensors
