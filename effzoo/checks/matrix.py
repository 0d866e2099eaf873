"""Every fine-tuning method on every attention kind in every architecture: what works, and what is refused and why.

Each cell is a tiny model in float64 on which one method is attached, trained for two steps, saved, loaded into a fresh
base, merged where it can be, and detached; the laws are checked on the way. Driven by the registry.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

import torch

from effzoo.architectures.encoder_decoder_config import EncoderDecoderConfig
from effzoo.checks.attention import Subject as Kind
from effzoo.checks.facts import reads_all
from effzoo.checks.models import LABELS, TinyModel, logits, silent, train
from effzoo.checks.peft import Subject as Tuned
from effzoo.checks.peft.subject import copied
from effzoo.checks.runner import Failed
from effzoo.errors import AdapterError, IncompatibleError, TargetError
from effzoo.peft import account, activate, attach, combine, delta, detach, load_adapter, merge, save_adapter
from effzoo.peft.attach import adapter_tensors, attached, base_tensors
from effzoo.peft.method import HEAD
from effzoo.peft.modular.mixture import MixtureMethod
from effzoo.registry import attention, peft
from effzoo.sites import sites

Status = Literal["works", "refused", "fails"]
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "encoder": ("bert", {}),
    "decoder": ("gpt2", {}),
    "reversible": ("bert", {"norm": "pre", "residual": "reversible"}),
    "encoder-decoder": ("bart", {}),
    "perceiver": (
        "perceiver-io",
        {"channels": 12, "latents": 10, "head_dim": 4, "value_dim": 8, "cross_heads": 1, "cross_head_dim": 8,
        "cross_value_dim": 16,
         "decoder_head_dim": 4, "decoder_value_dim": 4},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One combination. reason: why it is refused, or what fails."""

    method: str
    attention: str
    architecture: str
    status: Status
    reason: str = ""


@dataclass
class Matrix:
    """All cells, and the refusals by reason."""

    cells: list[Cell] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return bool(self.cells) and all(cell.status != "fails" for cell in self.cells)

    def refusals(self) -> dict[str, list[Cell]]:
        """The refused cells by their reason."""
        by_reason: dict[str, list[Cell]] = {}
        for cell in self.cells:
            if cell.status == "refused":
                by_reason.setdefault(cell.reason, []).append(cell)
        return by_reason

    def cell(self, method: str, kind: str, architecture: str) -> Cell:
        return next(c for c in self.cells if (c.method, c.attention, c.architecture) == (method, kind, architecture))


def matrix(
    methods: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
    architectures: Iterable[str] = tuple(ARCHITECTURES),
    experts: bool = False,
    on_cell: Callable[[Cell], None] = lambda cell: None,
) -> Matrix:
    """Try every combination (default: of everything registered).

    methods, kinds, architectures: their names.
    experts: each method as two experts of a routed adapter.
    on_cell: called with each cell as soon as it is known.
    """
    tried = Matrix()
    tuned = {name: Tuned.of(as_expert(name) if experts else name) for name in methods or candidates(experts)}
    subjects = {name: Kind.of(name) for name in kinds or attention.names()}
    for name, method in tuned.items():
        for kind in subjects.values():
            for architecture in architectures:
                tried.cells.append(replace(cell(method, kind, architecture), method=name))
                on_cell(tried.cells[-1])
    return tried


def candidates(experts: bool = False) -> list[str]:
    """Every method; for experts those that are no mixture themselves."""
    return [name for name in peft.names() if not (experts and issubclass(peft.get(name), MixtureMethod))]


def as_expert(method: str) -> str:
    """The spec of a routed adapter with two experts of a method, with the small options it is checked with."""
    return f"routed[of='{Tuned.of(method).spec}', experts=2]"


def case(kind: Kind, architecture: str) -> TinyModel:
    """The tiny model of an architecture with an attention kind."""
    name, choices = ARCHITECTURES[architecture]
    return TinyModel(
        name, str(kind.spec), kind.cls.knows_globals() and architecture != "perceiver", tuple(choices.items())
    )


def cell(method: Tuned, kind: Kind, architecture: str) -> Cell:
    """Try one combination."""
    names = (method.cls.name, kind.cls.name, architecture)
    one = case(kind, architecture)
    try:
        one.model()
    except IncompatibleError as refusal:
        return Cell(*names, "refused", str(refusal))
    try:
        method.attached(one)
    except (IncompatibleError, TargetError) as refusal:
        return Cell(*names, "refused", str(refusal))
    try:
        laws(method, one)
    except Failed as problem:
        return Cell(*names, "fails", str(problem))
    except Exception as error:  # the checked code's own
        return Cell(*names, "fails", f"{type(error).__name__}: {error}")
    return Cell(*names, "works")


def laws(method: Tuned, one: TinyModel) -> None:
    """Attach, train, save, load, combine, merge or refuse to, detach; Failed for the first law that does not hold."""
    model, batch = one.model(), one.batch()
    before, frozen = logits(model, batch), copied(base_tensors(model))
    attach(model, method.spec)
    at_start = logits(model, batch)
    starts_equal = bool((at_start - before).abs().max() <= 1e-10)
    same_at_start = bool(torch.equal(at_start, before))
    if method.identity_at_init and not starts_equal:
        raise Failed(f"the output right after attaching is off by {float((at_start - before).abs().max()):.2g}")
    if not method.identity_at_init and same_at_start:
        raise Failed("identity_at_init is False, yet attaching changes nothing")
    start = copied(adapter_tensors(model, "default"))
    if wrong := silent(model, train(model, batch)):
        raise Failed(wrong)
    if all(torch.equal(start[name], tensor) for name, tensor in adapter_tensors(model, "default").items()):
        raise Failed("no tensor of the adapter moved")
    now = base_tensors(model)
    if changed := [name for name, tensor in frozen.items() if not torch.equal(now[name], tensor)]:
        raise Failed(f"{changed[0]} of the frozen base has changed")
    trained = logits(model, batch)
    if not any(reads_all(inner) for inner, _ in attached(model)["default"].methods):
        earlier_stay(model, batch, trained)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        other = load_adapter(one.model(), folder)
    if not torch.equal(logits(other, batch), trained):
        raise Failed(
            f"saved and loaded, the output is off by {float((logits(other, batch) - trained).abs().max()):.2g}"
        )
    mergeable = account(other).changed is not None
    if mergeable:
        aggregated(other, batch, trained)
    try:
        merge(other)
    except AdapterError as refusal:
        if mergeable:
            raise Failed(f"the account says that it can be merged, but {refusal}") from refusal
    else:
        if not mergeable or (logits(other, batch) - trained).abs().max() > 1e-10:
            raise Failed("merged, it computes something else")
    detach(model, "default")
    if not torch.equal(logits(model, batch), before) or {*model.state_dict()} != {*frozen}:
        raise Failed("detaching does not restore the model")


def earlier_stay(model: torch.nn.Module, batch: dict[str, torch.Tensor], before: torch.Tensor) -> None:
    """What a decoder writes at a position does not change with the tokens after it, in the first example, which is the
    longest; a kind whose outputs may change with later values says so."""
    config = cast(Any, model).config
    written = "labels" if isinstance(config, EncoderDecoderConfig) else "input_ids" if config.causal else None
    if written is None or any(core.later_values_matter for core in cast(Any, model).cores()):
        return
    at = before.shape[1] // 2
    changed = batch[written].clone()
    changed[0, at] = (changed[0, at] + 1) % LABELS
    moved = (logits(model, {**batch, written: changed}) - before)[0, :at].abs().max()
    if moved > 1e-10:
        raise Failed(f"outputs before the token {at} change by {float(moved):.2g} with it")


def aggregated(model: torch.nn.Module, batch: dict[str, torch.Tensor], trained: torch.Tensor) -> None:
    """The sum of one adapter with weight 1 is the adapter; afterwards it alone is active again."""
    heads = {path for path, site in sites(model) if fnmatchcase(site.role, HEAD)}
    if not any(
        bool(change.any()) and key.rpartition(".")[0] not in heads for key, change in delta(model, "default").items()
    ):
        return  # nothing of the network has changed: gates that are all open, or a head alone
    combine(model, {"default": 1.0}, name="combined", head="default")
    if (worst := float((logits(model, batch) - trained).abs().max())) > 1e-10:
        raise Failed(f"combined alone with weight 1, the output is off by {worst:.2g}")
    detach(model, "combined")
    activate(model, "default")
