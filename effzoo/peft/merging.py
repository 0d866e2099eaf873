"""Merging: writing what an adapter changes into the base weights, at no cost in inference; and taking it out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from effzoo.errors import AdapterError
from effzoo.peft.attach import _known, fitted, freeze_base, take_off
from effzoo.peft.method import HEAD
from effzoo.peft.state import Attachment, Merged, act, adapters_of, checksum, transition, trial
from effzoo.peft.training import finish
from effzoo.sites import Activity, Acts, Linear, PeftModule, Scaled, SideNetwork, Site, opens, sites, unwrap
from effzoo.tensors import is_coded

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Rounding:
    """What storing one merged tensor in its dtype costs.

    tensor: its key.
    dtype: in which it is stored.
    delta: the norm of the change in float64.
    error: the norm of what rounding W + delta to the dtype changes; W itself is in that dtype, and holds no error.
    lost: the share of the changed entries that are, rounded, what they were before.
    """

    tensor: str
    dtype: torch.dtype
    delta: float
    error: float
    lost: float

    @property
    def relative(self) -> float:
        """error / delta."""
        return self.error / self.delta if self.delta else 0.0


@dataclass(frozen=True)
class MergeReport:
    """The rounding error of every merged tensor."""

    tensors: tuple[Rounding, ...]

    @property
    def worst(self) -> float:
        """The largest relative error."""
        return max((one.relative for one in self.tensors), default=0.0)

    def __str__(self) -> str:
        width = max((len(one.tensor) for one in self.tensors), default=0)
        lines = [f"{'tensor':{width}}  dtype     |delta|    |error|    relative  lost"]
        for one in sorted(self.tensors, key=lambda one: -one.relative):
            dtype, errors = (
                str(one.dtype).removeprefix("torch."),
                f"{one.error:.3e}  {one.relative:8.2%}  {one.lost:.2%}",
            )
            lines.append(f"{one.tensor:{width}}  {dtype:8}  {one.delta:.3e}  {errors}")
        return "\n".join(lines)


@overload
def merge(model: M, name: str = "default", *, undo: bool = True, report: Literal[False] = False) -> M: ...
@overload
def merge(model: nn.Module, name: str = "default", *, undo: bool = True, report: Literal[True]) -> MergeReport: ...


def merge(model: M, name: str = "default", *, undo: bool = True, report: bool = False) -> M | MergeReport:
    """theta <- theta + delta for every site of the adapter, then take the adapter off; return the model, or the report.

    name: of the adapter.
    undo: keep what is overwritten, so that `unmerge` restores it bit by bit; undo=False for an adapter that is merged
        already gives that up.
    report: return a MergeReport instead, which says for each tensor what rounding to its dtype costs (in bfloat16 most
        of a small change can be lost).

    Computed in float64 and rounded once to the weight's dtype. What is merged is part of the base, for every row of the
    batch and before whatever else acts, which goes on as it was. An active adapter is merged at its scale, an inactive
    one at 1. One that was not finished is merged as it would be finished, and comes back, by `unmerge`, in the stage of
    its training where it was.

    Raises AdapterError, and changes nothing, when a module has no delta (prompt, prefix, bottleneck adapters: they are
    no change of a weight), when a merged weight is not finite, and when merging would change what an active adapter
    does: one of an average, one chosen by row, or one of a stack in which the order counts and another comes first.
    """
    with transition(model) as state:
        inside = unwrap(model)
        merged = [record for record in state.merged if record.name == name]
        if merged and not undo and not report:
            state.merged.remove(merged[0])
            return model
        attachment, now = state.known(name), state.roster.now
        if name in now.names and now.combine != "stack":
            how = "on some rows of the batch" if now.combine == "rows" else "in an average"
            raise AdapterError(
                f"adapter {name!r} acts {how}, and a merged one acts in full on every row; activate it alone first "
                f"(effzoo.activate(model, {name!r})), or merge what effzoo.combine makes of several"
            )
        for path, site in sites(inside):
            for module in site.hung(name):
                if _no_weight(site, module):  # said first, before anything is computed
                    raise _refusal(f"adapter {name!r} ({attachment.spec}) at {path}", module)
            weight = getattr(site, "weight", None)
            if name in site.adapters and isinstance(weight, Tensor) and is_coded(weight):
                raise AdapterError(
                    f"adapter {name!r} cannot be merged: {path}.weight is of {type(weight).__name__}, whose codes take "
                    "no sum; keep it attached, or give the site weight.dequantize() as its weight first"
                )
        with trial(model, name):  # unmerged, it is in the stage of its training where it was
            finish(model, name)
            values = _values(inside, attachment)
        hung_at = {path: site for path, site in sites(inside) if name in site.adapters}
        tensors = {(path, key): getattr(hung_at[path], key) for path, key in values}
        rounding = [_rounding(f"{path}.{key}", tensors[path, key], values[path, key]) for path, key in values if report]
        place, modules = list(state.attachments).index(name), {path: site.of(name) for path, site in hung_at.items()}
        thawed = take_off(inside, state, name)
        assert state.rewriting is not None
        originals = {at: state.rewriting.write(tensors[at], value) for at, value in values.items()}
        if undo:
            written = {at: checksum(tensors[at]) for at in values}
            state.merged.append(Merged(attachment, place, modules, originals, written, now, state.roster.now, thawed))
    return MergeReport(tuple(rounding)) if report else model


def _values(model: nn.Module, attachment: Attachment) -> dict[tuple[str, str], Tensor]:
    """What merging an adapter makes of each tensor of the base, by path and name, in float64."""
    name, values = attachment.name, {}
    for path, site in sites(model):
        if name not in site.adapters:
            continue
        where = f"adapter {name!r} ({attachment.spec}) at {path}"
        _check_outputs(site, name, path)
        for key, value in merged_parameters(site, list(site.acting(name)), where).items() if len(site.of(name)) else ():
            if value.is_meta:
                raise AdapterError(
                    f"{where} cannot be merged: it is on the meta device, which holds shapes alone; "
                    "give the model its weights first"
                )
            if not torch.isfinite(value).all():
                raise AdapterError(
                    f"merging adapter {name!r} would write NaN or infinity into {path}.{key} "
                    f"({int((~torch.isfinite(value)).sum())} of {value.numel()} entries); the model is unchanged"
                )
            values[path, key] = value.detach().clone()  # it may be a tensor of the adapter's own
        _check_order(site, path, name)
    return values


def unmerge(model: M, name: str = "default") -> M:
    """Put back, bit by bit, the weights that `merge` overwrote, and attach the adapter again as it was.

    name: of the adapter; those merged last come first.

    What acts, its order, combination and scales, and what is trainable are again as before merging, if nothing was
    activated since. If something was, that goes on: an adapter that acted when it was merged then comes first in the
    stack, where it has acted since; in an average or by row it comes back inactive. The adapter takes the mode, dtype
    and device that the model has now. Returns the model.

    Raises AdapterError for a name that was not merged, or merged with undo=False, and when merged weights were changed
    since (trained, loaded, quantised), which would be lost; what `unmerge` needs is then kept.
    """
    with transition(model) as state:
        inside, names = unwrap(model), [merged.name for merged in state.merged]
        if name not in names:
            raise AdapterError(
                f"no merged adapter {name!r} can be taken out again; merged with undo: {', '.join(names) or '(none)'}"
            )
        if names[-1] != name:
            raise AdapterError(f"{names[-1]!r} was merged after {name!r}; unmerge it first")
        record, known = state.merged.pop(), dict(sites(inside))
        for (path, key), original in record.originals.items():
            _check_untouched(
                f"{path}.{key}", name, getattr(known.get(path), key, None), original, record.written[path, key]
            )
        for path, hung in record.modules.items():
            for module in hung.values():
                fitted(inside, known[path], cast(PeftModule, module), record.attachment.dtype)
            known[path].adapters[name] = hung.train(known[path].training)
        attachments = list(state.attachments.items())
        attachments.insert(record.place, (name, record.attachment))
        state.attachments.clear()
        state.attachments.update(attachments)
        if len(state.attachments) == 1:  # the base was thawed when the last one went, be it this one or another since
            freeze_base(inside, state)
        since, before = state.roster.now, record.before
        if since == record.after:
            state.roster.now = before
        elif name in before.names and since.combine == "stack":
            trained = since.trained | (before.trained & {name})
            state.roster.now = Activity((name, *since.names), (before.scale(name), *since.scales), trained=trained)
        if since != record.after or record.thawed:
            act(inside, state, state.roster.now)
        assert state.rewriting is not None
        for (path, key), original in record.originals.items():
            state.rewriting.write(getattr(known[path], key), original)
    return model


def check_nothing_merged(model: nn.Module, change: str, touches: Callable[[str], bool]) -> None:
    """AdapterError where a change of the model would make it impossible to take a merged adapter out again.

    change: in words, as in "quantising".
    touches: whether the change concerns the site at a path.
    """
    for record in adapters_of(model).merged:
        if any(touches(path) for path in record.modules):
            raise AdapterError(
                f"{change} would make it impossible to take the merged adapter {record.name!r} out again; unmerge it "
                f"first (effzoo.unmerge(model, {record.name!r})), or give that up (effzoo.merge(model, "
                f"{record.name!r}, undo=False))"
            )


def _check_untouched(key: str, name: str, tensor: Tensor | None, original: Tensor, written: int) -> None:
    """AdapterError unless a tensor is what merging has written; in another dtype its shape alone can be compared."""
    if tensor is None or tensor.shape != original.shape:
        now = "is gone" if tensor is None else f"has shape {tuple(tensor.shape)} instead of {tuple(original.shape)}"
        raise AdapterError(f"adapter {name!r} cannot be taken out again: {key} {now}; what unmerging needs is kept")
    if type(tensor) is not torch.nn.Parameter:
        raise AdapterError(
            f"adapter {name!r} cannot be taken out again: {key} is quantised; call "
            "effzoo.dequantise(model) and load the weights"
        )
    if tensor.dtype == original.dtype and not tensor.is_meta and checksum(tensor) != written:
        raise AdapterError(
            f"adapter {name!r} cannot be taken out again: {key} was changed after merging, by training or loading, "
            "and unmerging would lose that; "
            "put the merged weights back first, or keep them (effzoo.merge(model, undo=False))"
        )


def _check_outputs(site: Site, name: str, path: str) -> None:
    """AdapterError for an adapter whose task head is for another number of labels than the model's."""
    if isinstance(site, Linear) and (outputs := site.outputs(name)) != site.out_features:
        raise AdapterError(
            f"adapter {name!r} has a task head for {outputs} labels, and the model's own ({path}) is for "
            f"{site.out_features}: there is nothing that it could be merged into; load it into a model that was built "
            f"with num_labels={outputs} and merge it there, or keep it attached"
        )


@torch.no_grad()
def _check_order(site: Site, path: str, name: str) -> None:
    """AdapterError where an active adapter shares a site with others in such a way that it cannot be the first."""
    order = site.active
    others = [other for other in order if other != name]
    if name not in order or not others:
        return
    of_adapter = list(site.acting(name))
    fixed = [other for other in others if not all(mergeable(site, module) for module in site.acting(other))]
    changes = [other for other in order if other not in fixed]
    if isinstance(site, Linear) and site.outputs(*order) != site.out_features:
        return  # the task head of another one, for other labels, takes the place of whatever is merged
    now = merged_parameters(site, list(site.acting(*changes)))
    behind = [module for other in changes if other != name for module in site.acting(other)]
    then = merged_parameters(site, behind, start=merged_parameters(site, of_adapter))
    same = all(
        now[key].shape == then[key].shape
        and torch.allclose(now[key], then[key], rtol=0, atol=1e-10 * (1 + float(now[key].abs().max())))
        for key in now
    )
    if fixed:  # what is no change of the weight has to come behind it, and must not see the weight
        first = all(order.index(name) < order.index(other) for other in fixed)
        inputs = any(opens(module, "before") for module in of_adapter) or any(
            opens(m, "weight", "bias") for m in site.acting(*fixed)
        )
        same = same and first and not inputs
    if not same:
        raise AdapterError(
            f"merging {name!r} would change what the model computes: at {path} it acts in the stack "
            f"{', '.join(order)}, whose order counts, and a merged adapter comes first; activate it alone to say that "
            "it is to come first, or merge what effzoo.combine makes of all"
        )


def merged_tensors(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The keys of the tensors that `unmerge` would put back, for each merged adapter that can be taken out."""
    return {
        merged.name: tuple(f"{path}.{key}" for path, key in merged.originals) for merged in adapters_of(model).merged
    }


@torch.no_grad()
def delta(model: nn.Module, name: str = "default", *, heads: bool = True) -> dict[str, Tensor]:
    """What merging the adapter at scale 1 would add to each tensor of the base, by its key, in float64.

    heads: with the task head's.

    Raises AdapterError for what is no change, such as a task head for another number of labels.
    """
    attachment = _known(model, name)
    changes: dict[str, Tensor] = {}
    for path, site in sites(model):
        modules = list(site.hung(name))
        if modules and (heads or not fnmatchcase(site.role, HEAD)):
            _check_outputs(site, name, path)
            base = {key: value.detach().double() for key, value in site.base().items()}
            merged = merged_parameters(site, modules, f"adapter {name!r} ({attachment.spec}) at {path}")
            changes |= {f"{path}.{key}": merged[key] - base[key] for key in base}
    return changes


def merged_parameters(
    site: Site, modules: Sequence[Acts], where: str = "", start: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The weight and bias, in float64, with which the site alone computes what it computes with the modules.

    modules: in the order in which they act; they are in evaluation mode meanwhile, because some of them draw in
        training.
    where: for errors, what and where they are.
    start: weight and bias to begin with, instead of the site's own.
    """
    base: Mapping[str, Tensor] = site.base() if start is None else start
    for module in modules:
        if not mergeable(site, module):
            raise _refusal(where or site.role, module)
    with torch.no_grad(), _evaluating(module.module if isinstance(module, Scaled) else module for module in modules):
        now = {key: value.double() for key, value in base.items()}
        for module in modules:  # the same order as in the site's forward: `weight` and `bias`, outputs, and then inputs
            if "weight" in now:
                now["weight"] = module.weight(now["weight"]).double()
            if "bias" in now:
                now["bias"] = module.bias(now["bias"]).double()
        for module in [m for m in modules if opens(m, "after")] + [m for m in reversed(modules) if opens(m, "before")]:
            change = module.delta(now["weight"], now.get("bias"))
            assert change is not None
            now["weight"] = now["weight"] + change[0]
            if change[1] is not None:
                now["bias"] = now["bias"] + change[1]
    return now


@contextmanager
def _evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block these are in evaluation mode."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def mergeable(site: Site, module: Acts) -> bool:
    """Whether what the module does at the site is a change of the site's weight and bias."""
    if _no_weight(site, module):
        return False
    if not opens(module, "after", "before"):
        return bool(site.base())
    base = site.base()
    return module.delta(base["weight"], base.get("bias")) is not None


def _no_weight(site: Site, module: Acts) -> bool:
    """Whether there is no weight that the module could be a change of, whatever its numbers are."""
    inner = module.module if isinstance(module, Scaled) else module
    if opens(module, "prompt", "memory") or isinstance(inner, SideNetwork):
        return True
    return opens(module, "after", "before") and getattr(site, "weight", None) is None


def _refusal(where: str, module: Acts) -> AdapterError:
    inner = module.module if isinstance(module, Scaled) else module
    why = getattr(inner, "not_mergeable", "is not a change of a weight")
    return AdapterError(f"{where} cannot be merged: {type(inner).__name__} {why}; keep it attached")


def _rounding(tensor: str, parameter: Tensor, value: Tensor) -> Rounding:
    before, value = parameter.detach().double(), value.detach()
    stored = value.to(parameter.dtype).double()
    changed = value != before
    lost = ((stored == before) & changed).sum() / changed.sum().clamp(min=1)
    delta, error = float((value - before).norm()), float((stored - value).norm())
    return Rounding(tensor, parameter.dtype, delta, error, float(lost))
