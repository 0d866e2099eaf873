"""The adapters of a model as one object, and transitions of it, which succeed or leave everything as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effzoo.errors import AdapterError, UnknownNameError
from effzoo.peft.method import LABELS, Method
from effzoo.sharding import gathered, is_sharded
from effzoo.sites import Activity, Linear, Roster, learn, sites, unwrap
from effzoo.spec import Spec
from effzoo.wrappers import inside

HERE = "_effzoo_adapters"  # where a model holds its own; copied, pickled and saved with it


@dataclass
class Attachment:
    """One adapter of a model: its spec, its methods and where they hang.

    name: of the adapter.
    specs: one for each method of the union.
    places: {method: [(path, role)]} of the sites.
    methods: each method with the paths of its sites.
    begun: {method: stage}, for methods with stages that have begun one.
    finished: whether `effzoo.peft.finish` has dropped what only training needed.
    dtype: that `attach` was asked for; None for float32, or float64 where the base is.
    rounding: the difference between this base and that of its file (`effzoo.peft.rounded`); None where there is none.
    """

    name: str
    specs: tuple[Spec, ...]
    places: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    methods: list[tuple[Method, list[str]]] = field(default_factory=list)
    begun: dict[str, str] = field(default_factory=dict)
    finished: bool = False
    dtype: torch.dtype | None = None
    rounding: Any = None

    @property
    def spec(self) -> str:
        return "|".join(map(str, self.specs))


@dataclass
class Merged:
    """An adapter that was merged, and what `unmerge` needs.

    attachment: the adapter.
    place: its number among the attached.
    modules: what it had hung, by path.
    originals: the tensors of the base as they were, by path and name.
    written: a checksum of each tensor as it was merged, so that what was trained or loaded since is not overwritten.
    before, after: what acted before and after merging.
    thawed: the base parameters that became trainable, as it was the last one.
    """

    attachment: Attachment
    place: int
    modules: dict[str, nn.ModuleDict]
    originals: dict[tuple[str, str], Tensor]
    written: dict[tuple[str, str], int]
    before: Activity
    after: Activity
    thawed: frozenset[str]

    @property
    def name(self) -> str:
        return self.attachment.name


@dataclass
class Adapters:
    """The adapters of a model, and what is done with them.

    roster: what acts and learns; the sites read it.
    attachments: by name, in the order in which they were attached.
    merged: those that `unmerge` can take out, the last one last.
    frozen: the base parameters that attaching froze.
    untouched: {tensor: why} of the last training, see `Status`.
    rewriting: inside a transition, what it overwrites.
    """

    roster: Roster = field(default_factory=Roster)
    attachments: dict[str, Attachment] = field(default_factory=dict)
    merged: list[Merged] = field(default_factory=list)
    frozen: set[str] = field(default_factory=set)
    untouched: dict[str, str] | None = None
    rewriting: Rewriting | None = None

    def known(self, name: str) -> Attachment:
        """The adapter of this name. Raises UnknownNameError."""
        if not isinstance(name, str) or name not in self.attachments:
            raise UnknownNameError("adapter", name, self.attachments)
        return self.attachments[name]


def adapters_of(model: nn.Module) -> Adapters:
    """The adapters of a model, also through a wrapper of torch. Raises AdapterError as `unwrap` does."""
    at_hand = vars(model).get(HERE) if isinstance(model, nn.Module) else None
    state: Adapters = at_hand or vars(unwrap(model)).get(HERE) or Adapters()
    return state


def noted(model: nn.Module, untouched: dict[str, str]) -> None:
    """Keep what a training has not reached, for `effzoo.status`."""
    model = unwrap(model)
    state = adapters_of(model)
    state.untouched = untouched
    vars(model)[HERE] = state


@contextmanager
def transition(model: nn.Module, *rewritten: str, reads_base: bool = True) -> Iterator[Adapters]:
    """Inside the block a model and its adapters may be changed; an error puts everything back.

    model: with or without wrappers.
    rewritten: adapters whose tensors may be written to; they are copied for this. Who writes to tensors of the base
        uses `state.rewriting`, which keeps what it overwrites.
    reads_base: whether the change looks at tensors of the base; those that are split over processes are whole then.

    What is put back: what is attached, merged, active and trained, modules and their modes, tensors, and the state of
    torch's random generators.

    Raises AdapterError where a part of the model carries adapters of another model. So it does outside of
    `torch.inference_mode` for a model that was made inside, which cannot learn; inside, an adapter of any other model
    can learn later.
    """
    outer, model = model, unwrap(model)
    state = adapters_of(model)
    made_inside = next((key for key, p in model.named_parameters() if p.is_inference()), None)
    if made_inside is not None and not torch.is_inference_mode_enabled():
        raise AdapterError(
            f"{made_inside} was made inside torch.inference_mode and cannot take part in training; build the model "
            "outside, or under torch.no_grad (or change its adapters inside torch.inference_mode too, to infer alone)"
        )
    whole = gathered(model) if reads_base and is_sharded(model) else contextlib.nullcontext()
    with whole, _transition(outer, model, state, made_inside is not None, rewritten):
        yield state


@contextmanager
def _transition(
    outer: nn.Module, model: nn.Module, state: Adapters, made_inside: bool, rewritten: tuple[str, ...]
) -> Iterator[None]:
    before, outermost = _Snapshot(model, state, rewritten), state.rewriting is None
    rewriting = state.rewriting = state.rewriting or Rewriting()
    begun = len(rewriting.done)
    try:
        vars(model)[HERE] = state
        _adopt(model, state)
        with contextlib.ExitStack() as modes:
            if not made_inside and torch.is_inference_mode_enabled():
                modes.enter_context(torch.inference_mode(False))
                modes.enter_context(torch.no_grad())
            yield
        _adopt(model, state)
        check_heads(model)
        _check_synchronised(outer, before.learning)
    except BaseException:
        rewriting.restore(begun)
        before.restore()
        raise
    finally:
        if outermost:
            state.rewriting = None


class _Over(Exception):
    """The end of a trial."""


@contextmanager
def trial(model: nn.Module, *rewritten: str) -> Iterator[None]:
    """A transition that is taken back: behind the block everything is as it was."""
    with contextlib.suppress(_Over), transition(model, *rewritten):
        yield
        raise _Over


def act(model: nn.Module, state: Adapters, activity: Activity) -> None:
    """Let exactly these adapters act and learn."""
    state.roster.now = activity
    for _, site in sites(model):
        for adapter in site.adapters:
            for module in site.hung(adapter):
                learn(module, adapter in activity.trained)


def label_layers(model: nn.Module) -> dict[str, Linear]:
    """The layers of the task head that have an output for each label, by path."""
    return {path: site for path, site in sites(model) if site.role == LABELS and isinstance(site, Linear)}


def check_heads(model: nn.Module) -> None:
    """IncompatibleError where task heads of unequal sizes would have to act together."""
    for site in label_layers(model).values():
        site.outputs_now()


class Rewriting:
    """Tensors of the base that a transition overwrites, with what they were."""

    def __init__(self) -> None:
        self.done: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def write(self, tensor: Tensor, value: Tensor) -> Tensor:
        """Overwrite a tensor; returns what it was."""
        original = tensor.detach().clone()
        self.done.append((tensor, original))
        tensor.copy_(value)
        return original

    @torch.no_grad()
    def restore(self, begun: int = 0) -> None:
        """Write back what was overwritten since there were `begun` entries."""
        for tensor, original in reversed(self.done[begun:]):
            tensor.copy_(original)
        del self.done[begun:]


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """A number that changes when a tensor does; 0 on the meta device, where there is no content.

    It is the sum of the entries as integers, each times a number of its place, modulo 2^64.
    """
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    total = 0
    if tensor.is_meta:
        return total
    for part in torch.split(tensor.detach().reshape(-1).view(whole), 1 << 22):
        factors = torch.arange(len(part), device=part.device) * 2_654_435_761 + 1
        total += int((part.long() * factors).sum()) + 3 * total
    return total


class _Snapshot:
    """Everything that a transition may change, and how to put it back."""

    def __init__(self, model: nn.Module, state: Adapters, rewritten: tuple[str, ...]):
        self.model, self.state = model, state
        aside = [module for record in state.merged for hung in record.modules.values() for module in hung.modules()]
        modules = [*model.modules(), *aside]
        owners = (*modules, state, state.roster, *state.attachments.values())
        self.owners = [(owner, type(owner), _attributes(owner)) for owner in owners]
        tensors = {id(p): p for module in modules for p in module.parameters(recurse=False)}.values()
        self.flags = {id(p): (p, p.requires_grad) for p in tensors}
        self.learning = {id(p) for p in model.parameters() if p.requires_grad}
        self.data = [(p, p.data) for p in tensors]
        hung = [site.of(name) for _, site in sites(model) for name in rewritten if name in site.adapters]
        parts = [part for adapter in hung for part in adapter.modules()]
        own = {
            id(x): x for part in parts for x in (*part._parameters.values(), *part._buffers.values()) if x is not None
        }
        self.content = [(x, x.detach().clone()) for x in own.values()]
        self.random = torch.get_rng_state()
        self.random_cuda: list[Tensor] = []
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self.random_cuda = torch.cuda.get_rng_state_all()

    @torch.no_grad()
    def restore(self) -> None:
        for owner, cls, attributes in self.owners:
            if type(owner) is not cls:
                owner.__class__ = cls
            _put_back(owner, attributes)
        for p, flag in self.flags.values():
            p.requires_grad_(flag)
        for p, data in self.data:
            if p.data_ptr() != data.data_ptr() or p.dtype != data.dtype:
                p.data = data
        for x, content in self.content:
            if not x.is_meta and not torch.equal(x, content):
                x.copy_(content)
        torch.set_rng_state(self.random)
        if self.random_cuda:
            torch.cuda.set_rng_state_all(self.random_cuda)


def _attributes(owner: object) -> dict[str, tuple[Any, Any]]:
    """The attributes of an object, and of those that are containers the content."""
    return {key: (value, _content(value)) for key, value in vars(owner).items()}


def _content(value: object) -> dict[Any, Any] | list[Any] | set[Any] | None:
    """A copy of a container, as a plain one; None for anything else.

    `copy.copy` of an OrderedDict, of which each module has a dozen, takes ten times as long.
    """
    for container in (dict, list, set):
        if isinstance(value, container):
            return container(value)
    return None


def _put_back(owner: object, attributes: dict[str, tuple[Any, Any]]) -> None:
    current = vars(owner)
    for key in [key for key in current if key not in attributes]:
        del current[key]
    for key, (value, content) in attributes.items():
        current[key] = value
        if isinstance(value, list):
            value[:] = content
        elif isinstance(value, (dict, set)) and value is not content:
            value.clear()
            value.update(content)


def _adopt(model: nn.Module, state: Adapters) -> None:
    """Let every site read from the model's roster, also those that have come since."""
    for path, site in sites(model):
        if site.roster is not state.roster:
            if len(site.adapters):
                raise AdapterError(
                    f"{path or site.role} carries adapters of another model ({', '.join(site.adapters)}); give that "
                    "model, or detach them there"
                )
            site.roster = state.roster


def _check_synchronised(outer: nn.Module | None, learning: Set[int]) -> None:
    """AdapterError where DistributedDataParallel would not synchronise what now learns.

    It synchronises what learned when it was made.

    learning: the ids of the parameters that the model had and trained before; what was merged is none of them.
    """
    while outer is not None and not isinstance(outer, nn.parallel.DistributedDataParallel):
        outer = inside(outer)
    if outer is None or outer.process_group.size() == 1:
        return
    if new := {id(p): key for key, p in unwrap(outer).named_parameters() if p.requires_grad and id(p) not in learning}:
        known = {id(p) for bucket in outer.reducer._get_zeros_like_grad_buckets() for p in bucket.parameters()}
        if unknown := [key for at, key in new.items() if at not in known]:
            raise AdapterError(
                "DistributedDataParallel synchronises what was trainable when it was made, and this would make "
                f"{unknown[0]} trainable too ({len(unknown)} such tensors): processes would diverge. Take the "
                "model out of it (wrapper.module), change the model first, and wrap it then"
            )
