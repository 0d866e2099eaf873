"""Making tensors again instead of keeping them: what the backward pass needs and what follows from something that is kept anyway.

A layer that has computed `out = function(*sources)` says so with `follows(out, function, *sources)`. While `Recompute` is in force, autograd then
keeps in place of `out`, or of any view of it, a note of how it was made; the backward pass makes it again, to the same bits. So a norm's output
follows from its input, which the norm keeps anyway; the hidden units of a feed-forward follow from that output; and a method that hangs on
a site in between keeps nothing more, without knowing of it (Chen et al. 2016, arXiv:1604.06174, with the choice made by tensor, not by layer).

How much is told: "hidden", the outputs of norms and activations and the hidden units of feed-forwards (an eighth more arithmetic at most);
"projections", also those of frozen projections, so that a block keeps little more than its two residual sums and what attention gave.

Only functions without randomness may be told. Other hooks on saved tensors stay in force: they are given the tensors that are really kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from effzoo.errors import UnknownNameError

Function = Callable[..., Tensor]
Level = Literal["nothing", "hidden", "projections"]
LEVELS: tuple[str, ...] = get_args(Level)
_in_force: ContextVar[Recompute | None] = ContextVar("_in_force", default=None)


class Note:
    """How a tensor was made. Sources are held once the tensor is asked for; parameters by reference, with the version that they had."""

    def __init__(self, out: Tensor, function: Function, sources: tuple[Tensor | None, ...]):
        self.storage, self.version = StorageWeakRef(out.untyped_storage()), out._version  # type: ignore[no-untyped-call]
        self.function, self.sources = function, sources
        self.held: list[Any] | None = None
        self.uses = 0
        self.value: Tensor | None = None
        kind = out.device.type
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def hold(self, pack: Callable[[Tensor], Any]) -> None:
        """One more place in the graph needs the tensor."""
        if self.held is None:
            self.held = [x if x is None else (x, x._version) if isinstance(x, nn.Parameter) else pack(x) for x in self.sources]
            self.sources = ()
        self.uses += 1

    def make(self, unpack: Callable[[Any], Tensor]) -> Tensor:
        """The tensor, kept while others need it too."""
        value = self.value
        if value is None:
            assert self.held is not None
            sources = [x if x is None else _unchanged(*x) if isinstance(x, tuple) else unpack(x) for x in self.held]
            kind, dtype, enabled = self.autocast
            with torch.no_grad(), torch.autocast(kind, dtype, enabled):
                value = self.function(*sources).contiguous()
        self.uses -= 1
        self.value = value if self.uses > 0 else None
        return value


class View:
    """What autograd keeps in place of a tensor that has a note: which part of it."""

    __slots__ = ("note", "offset", "size", "stride")

    def __init__(self, note: Note, tensor: Tensor):
        self.note, self.size, self.stride, self.offset = note, tensor.size(), tensor.stride(), tensor.storage_offset()


class Recompute:
    """While it is in force, tensors of which something is told are not kept for the backward pass."""

    def __init__(self, level: Level) -> None:
        self.level = level
        self.notes: dict[int, Note] = {}
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)  # of torch's hooks only the innermost are called: they are passed on to
        self.outer_pack, self.outer_unpack = outer if outer is not None else (None, None)

    def told(self, out: Tensor, function: Function, sources: tuple[Tensor | None, ...]) -> None:
        for name in [name for name, note in self.notes.items() if note.storage.expired()]:  # type: ignore[no-untyped-call]
            del self.notes[name]  # and with it what it was made of
        whole = out.untyped_storage().nbytes() == out.numel() * out.itemsize and out.is_contiguous()
        if whole and not torch._C._functorch.is_functorch_wrapped_tensor(out):
            self.notes[out.untyped_storage()._cdata] = Note(out, function, sources)

    def note(self, tensor: Tensor) -> Note | None:
        """What has been told of a tensor, or of what it is a view of."""
        note = self.notes.get(tensor.untyped_storage()._cdata)
        return note if note is not None and note.version == tensor._version and not isinstance(tensor, nn.Parameter) else None

    def pack(self, tensor: Tensor) -> Any:
        note = self.note(tensor)
        if note is not None:
            note.hold(self.pack)
            return View(note, tensor)
        return tensor if self.outer_pack is None else self.outer_pack(tensor)

    def unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, View):
            return kept.note.make(self.unpack).as_strided(kept.size, kept.stride, kept.offset)
        found: Tensor = kept if self.outer_unpack is None else self.outer_unpack(kept)
        return found


def check_level(level: str) -> None:
    """Raise UnknownNameError for what is no level."""
    if level not in LEVELS:
        raise UnknownNameError("recompute", level, LEVELS)


def spare(model: nn.Module, level: Level) -> dict[str, Any]:
    """Set what `finetune` sets, the level and that the last block computes only what the head reads; what was set before, by attribute."""
    check_level(level)
    wanted = {"recompute": level, "only_what_is_read": True}
    before = {name: getattr(model, name) for name in wanted if hasattr(model, name)}  # the head of a Perceiver reads all latents
    for name in before:
        setattr(model, name, wanted[name])
    return before


@contextmanager
def recompute(level: Level = "hidden") -> Iterator[None]:
    """Put `Recompute` in force, if something is to be recomputed and a graph is recorded."""
    check_level(level)
    if level == "nothing" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        yield
        return
    running = Recompute(level)
    token = _in_force.set(running)
    try:
        with torch.autograd.graph.saved_tensors_hooks(running.pack, running.unpack):
            yield
    finally:
        _in_force.reset(token)


def follows(out: Tensor, function: Function, *sources: Tensor | None, level: Level = "hidden", of: Tensor | Sequence[Tensor] = ()) -> Tensor:
    """Tell that out = function(*sources), without randomness, bit for bit; out itself.

    level: from which on it is worth it. of: what must itself be told: else nothing would be saved by making `out` again.
    """
    running = None if torch.compiler.is_compiling() else _in_force.get()
    if running is None or not torch.is_grad_enabled():
        return out
    needed = (of,) if isinstance(of, Tensor) else of
    if LEVELS.index(running.level) >= LEVELS.index(level) and all(running.note(source) is not None for source in needed):
        running.told(out, function, sources)
    return out


def in_dtype(x: Tensor, dtype: torch.dtype, of: Tensor | None = None) -> Tensor:
    """x in another dtype. What is kept for the backward pass is x, where that is the narrower of both or a parameter; or, with `of`, what x follows
    from, where both are told."""
    if x.dtype == dtype:
        return x
    out = x.to(dtype)
    if of is None and out.element_size() < x.element_size() and not isinstance(x, nn.Parameter):
        return out
    return follows(out, partial(Tensor.to, dtype=dtype), x, of=() if of is None else (x, of))


def _unchanged(parameter: Tensor, version: int) -> Tensor:
    if parameter._version != version:
        raise RuntimeError(
            f"a parameter of shape {tuple(parameter.shape)} was modified between the forward and the backward pass that needs it to compute "
            "activations again; step the optimizer after backward, or set model.recompute = 'nothing'"
        )
    return parameter
