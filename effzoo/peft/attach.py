"""Attaching adapters to a model of sites, by name: several side by side, any of them active.

An adapter is a union of methods under one name, together with its own copy of the task head (roles `head.*`), because a
head belongs to the task that the adapter learns. While an adapter is attached the base model is frozen; when the last
one goes, the base is as trainable as it was before.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from effzoo.annotations import Count, Number
from effzoo.errors import (
    AdapterError,
    IncompatibleError,
    IncompatiblePeft,
    OptionError,
    TargetError,
    did_you_mean,
    listing,
    shown,
)
from effzoo.memory import room
from effzoo.peft.method import ALL_LINEAR, HEAD, Method
from effzoo.peft.state import Adapters, Attachment, act, adapters_of, check_heads, label_layers, transition
from effzoo.peft.unread import trained_unread
from effzoo.registry import peft as registry
from effzoo.sharding import one_by_one
from effzoo.sites import Activity, Linear, OwnOutputs, PeftModule, Site, TiedLinear, has_scale, sites, unwrap
from effzoo.sites.dtypes import floating
from effzoo.spec import Spec, parse

M = TypeVar("M", bound=nn.Module)
Scale = Number | Mapping[str, Number]
LONGEST_NAME = 100  # of an adapter: its name is part of the names of files, which hold 255 bytes
_OF_DEVICES = re.compile("con|prn|aux|nul|(com|lpt)[0-9]", re.IGNORECASE)  # no file of Windows has such a name
Trained = str | Collection[str] | None
log = logging.getLogger("effzoo")


def attach(
    model: M,
    peft: Any,
    *,
    name: str = "default",
    dtype: torch.dtype | str | None = None,
    num_labels: Count | None = None,
) -> M:
    """Hang the methods of a spec (`"lora[rank=4]|ia3"`) on a model and make them its active adapter; return the model.

    model: built from sites, as effzoo's models are.
    peft: a spec, or several.
    name: of the adapter, a Python identifier of at most 100 bytes.
    dtype: of the adapter's tensors; None for float32 whatever the base is (float64 on a float64 base), since in half
        precision small updates are lost. It computes in that dtype, and what it gives back to the model is rounded
        once.
    num_labels: of the adapter's own task head, which is fresh where the model's has another number; None for the
        model's. While the adapter is active, `model.num_labels`, logits and losses are those of its head (1 is
        regression, as in a model).

    The base is frozen; only the new adapter's parameters are trainable. Adapters attached before stay, inactive;
    `activate(model, "a", "b")` stacks several.

    Raises TargetError, AdapterError, OptionError; the model is then unchanged.
    """
    with transition(model, reads_base=False) as state, one_by_one(inside := unwrap(model)):
        _check_name(name, state)
        attachment, specs = Attachment(name, parse(peft), dtype=floating(dtype)), []
        for spec in attachment.specs:
            with room(spec.options):
                method = registry.create(spec)
                wanted = targets(inside, method)
                specs.append(Spec(spec.name, {**spec.options, **(method.prepare(inside, wanted) or {})}))
                _hang(inside, method, attachment, wanted)
        heads = {path: site for path, site in sites(inside) if fnmatchcase(site.role, HEAD) and site.base()}
        if heads := {path: site for path, site in heads.items() if name not in site.adapters}:
            _hang(inside, registry.create("head"), attachment, heads)
        if num_labels is not None:
            _renew_head(inside, attachment, num_labels)
        if not any(p.requires_grad for key, p in inside.named_parameters() if f".adapters.{name}." in f".{key}"):
            raise AdapterError(f"{attachment.spec} has nothing to train on this model; choose other targets")
        freeze_base(inside, state)
        attachment.specs = tuple(specs)
        state.attachments[name] = attachment
        act(inside, state, Activity((name,), (1.0,), trained=frozenset({name})))
    for why in dict.fromkeys(why for why, _ in trained_unread(inside).values()):
        log.info("attach: some of what %s trains is %s; effzoo.account counts it", attachment.spec, why)
    return model


def _check_name(name: str, state: Adapters) -> None:
    """AdapterError for a name that is no identifier, that no folder can have, or that is taken."""
    if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict(), name):
        raise AdapterError(
            f"an adapter name is a Python identifier that torch does not use itself, got {shown(name)}; try 'task_a'"
        )
    if len(name.encode()) > LONGEST_NAME or _OF_DEVICES.fullmatch(name):
        raise AdapterError(
            f"an adapter name is also that of a folder: at most {LONGEST_NAME} bytes, and none that Windows keeps "
            f"for devices, got {shown(name)}; try 'task_a'"
        )
    if name in state.attachments or any(name == merged.name for merged in state.merged):
        raise AdapterError(
            f"an adapter named {name!r} is attached already (or merged); detach it first or choose another name"
        )


def _renew_head(model: nn.Module, attachment: Attachment, labels: int) -> None:
    """Give an adapter a task head of its own for so many labels, where the model's has another number."""
    layers = label_layers(model)
    if not layers:
        raise AdapterError(
            f"num_labels={labels}: this model has no classification head; build it with task='classification' or "
            "'token_classification'"
        )
    if getattr(model, "task", "") == "question_answering" and labels != 2:
        raise AdapterError(f"num_labels={labels}: a model for question_answering has two outputs; leave num_labels out")
    for path, site in layers.items():
        modules = list(site.hung(attachment.name))
        if labels == site.out_features:
            continue
        whole = len(modules) == 1 and set(modules[0].state_dict()) == {f"own_{key}" for key in site.base()}
        if not whole or not isinstance(modules[0], OwnOutputs) or modules[0].own_outputs is None:
            raise AdapterError(
                f"{attachment.spec} changes the model's own head for {site.out_features} labels ({path}), so the "
                "adapter cannot have one for "
                f"{labels}; leave {site.role!r} out of its targets, or build the model with num_labels={labels}"
            )
        with room(labels):
            modules[0].renew(labels)


def detach(model: M, name: str) -> M:
    """Take an adapter off; what is left is bit-identical to a model that never had it.

    The other adapters act as before, in their order, scales and combination.
    """
    with transition(model, reads_base=False) as state:
        state.known(name)
        take_off(unwrap(model), state, name)
    return model


def activate(
    model: M,
    *names: str,
    combine: Literal["stack", "average"] = "stack",
    rows: Sequence[str | None] | None = None,
    scale: Scale = 1.0,
    train: Trained = None,
) -> M:
    """Make exactly these adapters active; none means the bare base model.

    names: of attached adapters, in the order in which they act.
    combine: "stack", each acts on what the one before has made of its site; "average", in parallel, and the mean of
        their outputs counts, at every site.
    rows: instead of names, the adapter of each row of the batch (None: the bare base), whatever its methods and
        options; then every batch must have as many rows.
    scale: s, or one by name: at every hook of a module s times what it adds acts. For a change of a weight that is s
        times the change, for a bottleneck s times its output, for attention with a gate s times the gate. Task heads
        count in full, as they replace a head and add nothing. Prompt tokens and a prefix in the joint softmax add
        nothing that could be multiplied: another scale than 1 is refused for them. A scale is not saved.
    train: which of them are trainable, the others act frozen; None for all, () for none.

    Task heads may be for different numbers of labels: in a stack the last one's counts; in an average and by row they
    have to agree.

    Raises UnknownNameError, AdapterError, OptionError, IncompatibleError (heads); the model is then unchanged.
    """
    with transition(model, reads_base=False) as state:
        act(unwrap(model), state, _chosen(unwrap(model), state, names, combine, rows, scale, train))
    return model


@contextmanager
def active(
    model: M,
    *names: str,
    combine: Literal["stack", "average"] = "stack",
    rows: Sequence[str | None] | None = None,
    scale: Scale = 1.0,
    train: Trained = None,
) -> Iterator[M]:
    """`activate` inside a `with` block; behind it, also after an error, what acts and what is trainable is as before.

    names, combine, rows, scale, train: as in `activate`.

    An adapter that was detached meanwhile is left out; one that was attached, or unmerged, meanwhile is inactive and
    frozen then. Raises IncompatibleError, and leaves the bare base, where the heads of those that are left cannot act
    together by row.
    """
    with _as_before(model, lambda: activate(model, *names, combine=combine, rows=rows, scale=scale, train=train)):
        yield model


@contextmanager
def disabled(model: M) -> Iterator[M]:
    """Inside the block no adapter acts: the bare base model, with its own task head; what is trainable stays so.

    Behind the block, also after an error, what acts and what is trainable is as before, as after `active`.
    """

    def bare() -> None:
        with transition(model, reads_base=False) as state:
            state.roster.now = Activity(trained=state.roster.now.trained)

    with _as_before(model, bare):
        yield model


@contextmanager
def _as_before(model: nn.Module, enter: Callable[[], object]) -> Iterator[None]:
    """Behind the block what acts and learns is as before, of what is still there; what has come since does neither.

    The base is frozen as long as adapters are attached: where the first one has come inside, or the last one has gone,
    its flags are not put back.
    """
    inside, state = unwrap(model), adapters_of(model)
    before, had_adapters = state.roster.now, bool(state.attachments)
    flags = [(p, p.requires_grad) for p in inside.parameters()]
    enter()
    try:
        yield
    finally:
        state = adapters_of(model)
        for name in {*before.names, *before.trained} - state.attachments.keys():
            before = before.without(name)
        act(inside, state, before)
        changed = had_adapters != bool(state.attachments)
        there = {id(p) for key, p in inside.named_parameters() if not changed or ".adapters." in f".{key}"}
        for p, flag in flags:
            if id(p) in there:  # a merged adapter keeps those with which it comes back
                p.requires_grad_(flag)
        try:
            check_heads(inside)
        except IncompatibleError:  # by row: those of a detached adapter would have the model's head, of another size
            state.roster.now = Activity(trained=before.trained)
            raise


def _chosen(
    model: nn.Module,
    state: Adapters,
    names: tuple[str, ...],
    combine: str,
    rows: Sequence[str | None] | None,
    scale: Scale,
    train: Trained,
) -> Activity:
    """What `activate` was asked for. Raises what it raises."""
    if rows is not None:
        if names:
            raise AdapterError("give either adapter names or rows, not both")
        if isinstance(rows, str) or not len(rows):
            raise AdapterError(
                f"rows is a list with the name of an adapter, or None, for each row of the batch, got {rows!r}"
            )
        if combine != "stack":
            raise AdapterError(f"give either combine={combine!r} or rows, not both: each row has one adapter")
        names = tuple(dict.fromkeys(name for name in rows if name is not None))
    if combine not in ("stack", "average"):
        raise AdapterError(f"combine is 'stack' or 'average', got {combine!r}")
    for name in names:
        state.known(name)
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise AdapterError(
            f"adapter {twice[0]!r} is named twice; name each once (scale={{{twice[0]!r}: 2.0}} doubles what it adds)"
        )
    given = scale if isinstance(scale, Mapping) else dict.fromkeys(names, scale)
    for name, number in given.items():
        if name not in names:
            raise AdapterError(
                f"a scale is given for {name!r}, which is not among the adapters to activate ({listing(names)})"
            )
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) < float("inf"):
            raise OptionError(f"the scale of {name!r} is a finite number, got {number!r}")
        _check_scale(model, state, name, float(number))
    trained = names if train is None else (train,) if isinstance(train, str) else tuple(train)
    for name in trained:
        state.known(name)
        if name not in names:
            raise AdapterError(f"train names {name!r}, which is not among the adapters to activate ({listing(names)})")
    numbers = None if rows is None or not names else tuple(-1 if name is None else names.index(name) for name in rows)
    scales = tuple(float(given.get(name, 1.0)) for name in names)
    return Activity(names, scales, combine == "average" and len(names) > 1, numbers, frozenset(trained))


def _check_scale(model: nn.Module, state: Adapters, name: str, scale: float) -> None:
    for path, site in sites(model) if scale != 1 else ():
        for module in site.hung(name):
            if not has_scale(module):
                raise AdapterError(
                    f"adapter {name!r} ({state.attachments[name].spec}) has no scale of {scale:g}: what "
                    f"{type(module).__name__} puts in at {path} is "
                    "there or not, and adds nothing that could be multiplied; use scale 1"
                )


def attached(model: nn.Module) -> dict[str, Attachment]:
    """The adapters of a model by name, in the order in which they were attached."""
    return dict(adapters_of(model).attachments)


def acting(model: nn.Module) -> tuple[str, ...]:
    """The active adapters, in their order."""
    return adapters_of(model).roster.now.names


def roles(model: nn.Module) -> dict[str, int]:
    """The roles of a model's sites, each with the number of sites that have it."""
    count: dict[str, int] = {}
    for _, site in sites(model):
        count[site.role] = count.get(site.role, 0) + 1
    return count


def targets(model: nn.Module, method: Method) -> dict[str, Site]:
    """The sites on which a method hangs, by path.

    Raises TargetError for a pattern that matches nothing, or only some layers, and for sites of another type.
    """
    everything = dict(sites(model))
    if not everything:
        raise TargetError(
            f"{type(model).__name__} has no sites; convert a model of transformers with "
            "effzoo.convert.from_transformers(model), or build yours from effzoo.sites (Linear, LayerNorm, ...)"
        )
    layers = _layers(method, everything)
    patterns = method.targets or method.default_targets
    wanted: dict[str, Site] = {}
    for pattern in patterns:
        matched = {path: site for path, site in everything.items() if _matches(site, pattern)}
        if not matched and method.targets:
            known = roles(model)
            raise TargetError(
                f"{method.name}: target {pattern!r} matches no role{did_you_mean(pattern, known)} "
                f"Roles: {listing(known)}."
            )
        anywhere = method.layers is None
        numbered = {site.layer for site in matched.values() if site.layer is not None}
        # a decoder behind an encoder has cross-attention, and the encoder has none
        inside = {_stack(path) for path in matched}
        there = {site.layer for path, site in everything.items() if _stack(path) in inside}
        matched = {
            path: site for path, site in matched.items() if site.layer in layers or (site.layer is None and anywhere)
        }
        has = {site.layer for site in matched.values() if site.layer is not None}
        if numbered and not has and method.targets:
            raise TargetError(
                f"{method.name}: target {pattern!r} is in none of the layers {sorted(layers)}, but in "
                f"{sorted(numbered)}"
            )
        if has and method.targets and (missing := (layers & there) - has):
            raise TargetError(
                f"{method.name}: target {pattern!r} matches only some layers, not {sorted(missing)}; "
                f"give layers={tuple(sorted(has))} to mean that, or another pattern"
            )
        wanted.update(matched)
    if not wanted and not method.targets and not any(isinstance(site, method.accepts) for site in everything.values()):
        reason = f"it hangs on {_site_types(method)} sites, of which there are none"
        raise IncompatiblePeft(method.name, "this model", reason, "use it on a model that has them, or another method")
    if not wanted:
        raise TargetError(
            f"{method.name}: nothing in this model matches {listing(patterns)}. Roles: {listing(roles(model))}."
        )
    for path, site in wanted.items():
        if not isinstance(site, method.accepts):
            what = f"{site.role!r} ({path}) is {type(site).__name__}"
            raise TargetError(f"{method.name} hangs on {_site_types(method)} sites; {what}")
    return wanted


def _stack(path: str) -> str:
    """The stack of blocks that a site is in: "encoder.", "decoder.", or "" where there is one."""
    return path[: max(0, path.find("blocks."))]


def _matches(site: Site, pattern: str) -> bool:
    """Whether a site is meant by a pattern of roles, or by "all-linear"."""
    if pattern == ALL_LINEAR:
        return isinstance(site, Linear) and site.layer is not None
    return fnmatchcase(site.role, pattern)


def _site_types(method: Method) -> str:
    """The types of sites that a method hangs on, in words; a tied head is a linear layer to whoever names sites."""
    return " or ".join(dict.fromkeys("Linear" if cls is TiedLinear else cls.__name__ for cls in method.accepts))


def _layers(method: Method, everything: dict[str, Site]) -> set[int]:
    present = {site.layer for site in everything.values() if site.layer is not None}
    if method.layers is None:
        return present
    depth = max(present, default=-1) + 1
    outside = [layer for layer in method.layers if not -depth <= layer < depth]
    if outside:
        raise TargetError(
            f"{method.name}: layers {outside} do not exist; this model has {depth} (0 to {depth - 1}, "
            f"or -{depth} to -1)"
        )
    return {layer % depth for layer in method.layers}


def _hang(model: nn.Module, method: Method, attachment: Attachment, wanted: dict[str, Site]) -> None:
    places = []
    for path, site in wanted.items():
        module = method.make(site)
        if module is None:
            continue
        site.hang(attachment.name, method.name, fitted(model, site, module, attachment.dtype))
        places.append((path, site.role))
    if not places:
        raise TargetError(
            f"{method.name}: none of the {len(wanted)} sites has anything to adapt "
            f"({listing(sorted({s.role for s in wanted.values()}))})"
        )
    attachment.places.setdefault(method.name, []).extend(places)
    attachment.methods.append((method, [path for path, _ in places]))


def adapter_dtype(base: torch.dtype, asked: torch.dtype | None = None) -> torch.dtype:
    """The dtype of an adapter's tensors: the one asked for, else float32, or the base's where that is wider."""
    return torch.promote_types(base, torch.float32) if asked is None else asked


def recast(model: M, *names: str, dtype: torch.dtype | str | None = None) -> M:
    """Store the tensors of the named adapters (all, when none is named) in another dtype; return the model.

    dtype: None for that of `attach`: float32, or float64 on a float64 base.

    The base is left as it is. For an adapter that `model.to(torch.bfloat16)` has cast with the base; what that has
    rounded stays rounded. Raises UnknownNameError, OptionError.
    """
    wanted = floating(dtype)
    with transition(model) as state:
        for name in names:
            state.known(name)
        for name in names or tuple(state.attachments):
            for _, site in sites(model):
                for module in site.hung(name):
                    fitted(unwrap(model), site, module, wanted)
            state.attachments[name].dtype = wanted
    return model


def fitted(model: nn.Module, site: Site, module: PeftModule, dtype: torch.dtype | None = None) -> PeftModule:
    """A module on the device and in the mode of the site where it is to hang, in the dtype of `adapter_dtype`."""
    like = next(iter(site.base().values()), None)
    if like is None:
        like = next(p for p in model.parameters() if p.is_floating_point())
    return module.to(device=like.device, dtype=adapter_dtype(like.dtype, dtype)).train(site.training)


def freeze_base(model: nn.Module, state: Adapters) -> None:
    """Freeze what is trainable of the base; `state.frozen` lists it."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".adapters." not in f".{name}":
            parameter.requires_grad_(False)
            state.frozen.add(name)


def take_off(model: nn.Module, state: Adapters, name: str) -> frozenset[str]:
    """Take an adapter off, in a transition; where it was the last one, the base parameters that become trainable."""
    for _, site in sites(model):
        if name in site.adapters:
            del site.adapters[name]
    del state.attachments[name]
    state.roster.now = state.roster.now.without(name)
    if state.attachments:
        return frozenset()
    thawed = frozenset(state.frozen)
    for key, parameter in model.named_parameters():
        if key in thawed:
            parameter.requires_grad_(True)
    state.frozen.clear()
    return thawed


def _known(model: nn.Module, name: str) -> Attachment:
    return adapters_of(model).known(name)


def base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's own weights: its state dict without what adapters added."""
    return {key: value for key, value in unwrap(model).state_dict().items() if ".adapters." not in f".{key}"}


def adapter_tensors(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The tensors of one adapter, by their key in the model; what several modules share appears once."""
    _known(model, name)
    model = unwrap(model)
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    identity = {key: id(tensor) for key, tensor in named}
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for key, value in model.state_dict().items():
        if f".adapters.{name}." in f".{key}" and identity[key] not in seen:
            seen.add(identity[key])
            tensors[key] = value
    return tensors
