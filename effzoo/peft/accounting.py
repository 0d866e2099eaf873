"""What an adapter costs, three times: trained, stored on disk, changed in the base; and the rank of the change."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from effzoo.annotations import Count, NotNegative
from effzoo.errors import InputError
from effzoo.peft.attach import acting, activate, attached, base_tensors
from effzoo.peft.budget import without_memory
from effzoo.peft.merging import delta, mergeable
from effzoo.peft.method import HEAD
from effzoo.peft.state import label_layers
from effzoo.peft.stored import stored_tensors
from effzoo.peft.unread import trained_unread
from effzoo.sharding import counted
from effzoo.sites import Counted, PeftModule, Site, opens, sites, unwrap


@dataclass(frozen=True)
class Account:
    """Numbers of parameters, unless the name says bytes.

    trainable: with requires_grad.
    stored, stored_bytes: in the files of the active adapters.
    total: of the base.
    changed: base entries that merging may change; None when some module is no change of a weight, and cannot be merged.
    rank: the largest rank that the change of a matrix of the network (not of the task head) can have; "full" when
        nothing bounds it, 0 when only vectors change.
    by_role: (method, role, sites, parameters) of the active adapters.
    unread: {why: (tensors, parameters)}, trainable ones that get no gradient from usual batches, as far as the
        structure shows; `finetune` says which got none.
    """

    trainable: int
    stored: int
    stored_bytes: int
    total: int
    changed: int | None
    rank: int | str | None
    by_role: list[tuple[str, str, int, int]] = field(default_factory=list)
    unread: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of the base's."""
        return 100 * self.trainable / self.total

    def __str__(self) -> str:
        changed = "not mergeable"
        if self.changed is not None:
            changed = f"{self.changed:,} ({100 * self.changed / self.total:.3f} %)"
        lines = [
            f"trainable {self.trainable:,} of {self.total:,} ({self.percent:.3f} %)",
            f"stored    {self.stored:,} numbers, {self.stored_bytes:,} bytes",
            f"changed   {changed}",
            f"rank      {'-' if self.rank is None else self.rank}",
        ]
        lines += [
            f"unread    {numbers:,} numbers in {tensors} tensors: {why}"
            for why, (tensors, numbers) in self.unread.items()
        ]
        width = max((len(f"{method} {role}") for method, role, _, _ in self.by_role), default=0)
        lines += [
            f"  {f'{method} {role}':{width}}  {count:3} site{'s' if count != 1 else ' '}  {numbers:>12,}"
            for method, role, count, numbers in self.by_role
        ]
        return "\n".join(lines)


def ranks(model: nn.Module, name: str = "default", tolerance: NotNegative | None = None) -> dict[str, int]:
    """The numerical rank of the change of every matrix that merging the adapter would change, by its key.

    name: of the adapter.
    tolerance: singular values up to it count as 0; None for torch's, the largest one times max(shape) times the float64
        epsilon.

    By singular value decomposition in float64.
    """
    # else the head is another one, and no change
    same = all(site.outputs(name) == site.out_features for site in label_layers(model).values())
    limits = {} if tolerance is None else {"atol": float(tolerance), "rtol": 0.0}
    changes = {key: change.flatten(1) for key, change in delta(model, name, heads=same).items() if change.ndim >= 2}
    return {key: int(torch.linalg.matrix_rank(x, **limits)) for key, x in changes.items() if bool(x.any())}


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one forward pass: matrix products, convolutions and attention.

    A multiplication and an addition are two.

    base: without adapters.
    attached: with the active ones.
    merged: with them merged, where they can be.
    """

    base: int
    attached: int
    merged: int

    @property
    def extra(self) -> float:
        """What the adapter adds at inference when it is merged if it can be, in percent of the base."""
        return 100 * (self.merged / self.base - 1)


def flops(model: nn.Module, length: Count = 128) -> Flops:
    """Count one forward pass: the base, with the active adapters, and with them merged where that is possible.

    length: of the sequence, in tokens.

    Nothing is computed: the model runs on shapes alone. Elementwise work is not counted, so (IA)3 or BitFit seem free
    while attached.
    """
    model = unwrap(model)
    if "input_ids" not in inspect.signature(model.forward).parameters:
        what = f"which {type(model).__name__} does not read; give a model that effzoo built"
        raise InputError(f"flops counts a pass over token ids, {what}")
    names, shadow = acting(model), without_memory(model).eval()
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    with_adapters = _flops(shadow, ids)
    same_head = all(site.outputs_now() == site.out_features for site in label_layers(shadow).values())
    can_merge = bool(names) and same_head and _change(shadow, names)[0] is not None
    activate(shadow)
    base = _flops(shadow, ids)
    return Flops(base, with_adapters, base if can_merge else with_adapters)


def _flops(model: nn.Module, ids: torch.Tensor) -> int:
    # takes a twentieth of the time that torch itself takes to import
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    return int(counter.get_total_flops())


def account(model: nn.Module) -> Account:
    """Count the active adapters of a model; without any, the model as it is. One that is split counts as a whole."""
    model = unwrap(model)
    with counted(model):
        return _account(model)


def _account(model: nn.Module) -> Account:
    total = _total(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    names = acting(model)
    tensors = [t for name in names for t in stored_tensors(model, name).values()]
    changed, rank = _change(model, names) if names else (trainable, "full" if trainable else 0)
    return Account(
        trainable=trainable, stored=sum(t.numel() for t in tensors),
        stored_bytes=sum(t.numel() * t.element_size() for t in tensors), total=total, changed=changed, rank=rank,
        by_role=_by_role(model, names), unread=_unread(model),
    )  # fmt: skip


def _unread(model: nn.Module) -> dict[str, tuple[int, int]]:
    counts: dict[str, tuple[int, int]] = {}
    for why, numbers in trained_unread(model).values():
        tensors, total = counts.get(why, (0, 0))
        counts[why] = tensors + 1, total + numbers
    return counts


def _total(model: nn.Module) -> int:
    """The numbers of the base; codes of a quantised weight stand for as many as the weight has."""
    coded = {path: site for path, site in sites(model) if getattr(site, "bits", None)}
    codes = {f"{path}.{name}" for path in coded for name in ("codes", "scales")}
    dense = sum(tensor.numel() for key, tensor in base_tensors(model).items() if key not in codes)
    return dense + sum(site.base()["weight"].numel() for site in coded.values())


def _by_role(model: nn.Module, names: tuple[str, ...]) -> list[tuple[str, str, int, int]]:
    known = dict(sites(model))
    parameters: dict[tuple[str, str], list[int]] = {}
    seen: set[int] = set()  # what several modules share counts where it is met first
    for name in names:
        for method, places in attached(model)[name].places.items():
            for path, role in places:
                module = known[path].of(name)[method]
                own = {id(p): p.numel() for p in module.parameters() if id(p) not in seen}
                seen |= own.keys()
                parameters.setdefault((method, role), []).append(sum(own.values()))
    return [(method, role, len(numbers), sum(numbers)) for (method, role), numbers in parameters.items()]


def _change(model: nn.Module, names: tuple[str, ...]) -> tuple[int | None, int | str | None]:
    changed = 0
    ranks: list[int | None] = [0]
    for _, site in sites(model):
        modules = list(site.hung(*names)) if site.active else []
        if not modules:
            continue
        numbers = _changed_entries(site, modules)
        if numbers is None:
            return None, None
        changed += numbers
        if not fnmatchcase(site.role, HEAD):
            ranks += [m.delta_rank for m in modules if _changes_matrix(site, m)]
    return changed, "full" if None in ranks else max(rank for rank in ranks if rank is not None)


def _changed_entries(site: Site, modules: list[PeftModule]) -> int | None:
    """At most how many entries of the site the modules change together; None when one is no change of a weight."""
    weight, bias = getattr(site, "weight", None), getattr(site, "bias", None)
    numbers, whole = 0, dict.fromkeys(site.base(), False)
    entries = {key: parameter.numel() for key, parameter in site.base().items()}
    for module in modules:
        if not mergeable(site, module):
            return None
        said = module.changed(weight, bias) if isinstance(module, Counted) else None
        if said is not None:
            numbers += said
            continue
        for key, parameter in site.base().items():
            hook = "weight" if key == "weight" else "bias"
            if opens(module, "after", "before"):
                change = None if weight is None else module.delta(weight, bias)
                whole[key] |= change is not None and change[0 if hook == "weight" else 1] is not None
            else:
                passed = getattr(module, hook)(parameter)
                whole[key] |= passed is not parameter
                entries[key] = passed.numel()  # a task head for another number of labels has another size
    return min(sum(entries.values()), numbers + sum(entries[key] for key in entries if whole[key]))


def _changes_matrix(site: Site, module: PeftModule) -> bool:
    weight = getattr(site, "weight", None)
    if weight is None or weight.ndim < 2:
        return False
    return opens(module, "after", "before") or module.weight(weight) is not weight
