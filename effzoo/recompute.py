"""Making tensors again instead of keeping them: what the backward pass needs and what follows from something that is
kept anyway.

    model.recompute = "nothing"   keep everything: the fastest
                      "hidden"    make outputs of norms and activations again, and the hidden units of frozen
                      feed-forwards: an eighth more
                                  arithmetic at most
                      "blocks"    keep the input of each block alone (Chen et al. 2016, arXiv:1604.06174), which is
                      gradient checkpointing

Layers and methods write their formulas as the papers do. Inside `made_again()` torch says which functions are called (a
TorchFunctionMode), and autograd keeps, in place of what such a function gave, or of any view of it, a note of how it
was made; the backward pass makes it again, to the same bits. So a norm's output follows from its input, which the norm
keeps anyway; the hidden units of a feed-forward follow from that output; and a method that hangs on a site in between
keeps nothing more, without knowing of it.

Only functions without randomness are made again. Other hooks on saved tensors stay in force: they are given the tensors
that are really kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from effzoo.errors import OptionError, UnknownNameError

Function = Callable[..., Tensor]
Level = Literal["nothing", "hidden", "blocks"]
LEVELS: tuple[str, ...] = get_args(Level)
ALWAYS = {F.layer_norm, F.rms_norm, F.gelu, F.silu}  # cheap, and of an input that they keep; relu keeps its result
SUMS, PRODUCTS = {Tensor.add, torch.add}, {Tensor.mul, torch.mul}
_in_force: ContextVar[Recompute | None] = ContextVar("_in_force", default=None)


class Note:
    """How a tensor was made. Sources are held once the tensor is asked for; parameters by reference, with the version
    that they had."""

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
            self.held = [
                x if x is None else (x, x._version) if isinstance(x, nn.Parameter) else pack(x) for x in self.sources
            ]
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


class Recompute(TorchFunctionMode):
    """While it is in force, tensors that are made inside `made_again()` are not kept for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: dict[int, Note] = {}
        self.watching, self.products = False, False
        # of torch's hooks only the innermost are called: they are passed on to
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self.outer_pack, self.outer_unpack = outer if outer is not None else (None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (
            isinstance(out, Tensor)
            and torch.is_grad_enabled()
            and not any(out is x for x in args)
            and self.worth(func, args, out)
        ):
            places = [i for i, x in enumerate(args) if isinstance(x, Tensor)]
            named = [name for name, x in (kwargs or {}).items() if isinstance(x, Tensor)]

            def again(*tensors: Tensor) -> Tensor:
                given, more = list(args_without), dict(kwargs_without)
                for place, x in zip(places, tensors, strict=False):
                    given[place] = x
                more.update(zip(named, tensors[len(places) :], strict=True))
                made: Tensor = func(*given, **more)
                return made

            sources = [*(args[i] for i in places), *((kwargs or {})[name] for name in named)]
            args_without = [None if isinstance(x, Tensor) else x for x in args]
            kwargs_without = {name: x for name, x in (kwargs or {}).items() if not isinstance(x, Tensor)}
            self.told(out, again, tuple(sources))
        return out

    def worth(self, func: Any, args: Any, out: Tensor) -> bool:
        """Whether less is kept where the result of a function is made again."""
        if func in ALWAYS:
            return True
        # of what is made again itself, or is kept anyway: a factor, where the other one has a gradient
        if func in SUMS or func in PRODUCTS:
            tensors = [x for x in args if isinstance(x, Tensor)]
            factors = func in PRODUCTS and len(tensors) == 2
            kept = [factors and tensors[1 - i].requires_grad for i in range(len(tensors))]
            return all(
                own or isinstance(x, nn.Parameter) or self.note(x) is not None
                for own, x in zip(kept, tensors, strict=True)
            )
        if func is Tensor.index_select:
            return self.note(args[0]) is not None
        if func is Tensor.to:
            return (
                self.note(args[0]) is not None
                or isinstance(args[0], nn.Parameter)
                or args[0].element_size() < out.element_size()
            )
        # B z of a narrow z, and hidden units W x + b of a frozen W
        if func is F.linear and len(args) > 1 and args[1].ndim == 2:
            outputs, inputs = args[1].shape
            return 8 * inputs <= outputs or (self.products and not args[1].requires_grad)
        return False

    def told(self, out: Tensor, function: Function, sources: tuple[Tensor | None, ...]) -> None:
        for name in [name for name, note in self.notes.items() if note.storage.expired()]:  # type: ignore[no-untyped-call]
            del self.notes[name]  # and with it what it was made of
        whole = out.untyped_storage().nbytes() == out.numel() * out.itemsize and out.is_contiguous()
        if whole and not torch._C._functorch.is_functorch_wrapped_tensor(out):
            self.notes[out.untyped_storage()._cdata] = Note(out, function, sources)

    def note(self, tensor: Tensor) -> Note | None:
        """What has been told of a tensor, or of what it is a view of."""
        note = self.notes.get(tensor.untyped_storage()._cdata)
        return (
            note
            if note is not None and note.version == tensor._version and not isinstance(tensor, nn.Parameter)
            else None
        )

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
    if level == "projections":
        raise OptionError(
            "recompute='projections' is no longer one of its steps; 'blocks' keeps less, and 'hidden' is faster"
        )
    if level not in LEVELS:
        raise UnknownNameError("recompute", level, LEVELS)


def spare(model: nn.Module, level: Level) -> dict[str, Any]:
    """Set what `finetune` sets, the level and that the last block computes only what the head reads; what was set
    before, by attribute."""
    check_level(level)
    wanted = {"recompute": level, "only_what_is_read": True}
    # the head of a Perceiver reads all latents
    before = {name: getattr(model, name) for name in wanted if hasattr(model, name)}
    for name in before:
        setattr(model, name, wanted[name])
    return before


class Recomputing:
    """A model with a level of recomputing, which transformers and its Trainer call gradient checkpointing."""

    recompute: Level = "nothing"  # in training: what is computed again for the backward pass instead of kept

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """recompute = "blocks": keep only the input of each block for the backward pass and compute the rest again
        (Chen et al. 2016)."""
        self.recompute = "blocks"

    def gradient_checkpointing_disable(self) -> None:
        """recompute = "nothing", where it was "blocks"."""
        if self.recompute == "blocks":
            self.recompute = "nothing"

    @property
    def checkpointing(self) -> bool:
        """Whether only the inputs of blocks are kept."""
        return self.recompute == "blocks"

    @checkpointing.setter
    def checkpointing(self, wanted: bool) -> None:
        raise OptionError(
            f"checkpointing is one step of recompute now: model.recompute = {'blocks' if wanted else 'nothing'!r}"
        )


@contextmanager
def recompute(level: Level = "hidden") -> Iterator[None]:
    """Put `Recompute` in force, if something inside blocks is to be made again and a graph is recorded."""
    check_level(level)
    if level != "hidden" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        yield
        return
    running = Recompute()
    token = _in_force.set(running)
    try:
        with torch.autograd.graph.saved_tensors_hooks(running.pack, running.unpack):
            yield
    finally:
        _in_force.reset(token)


@contextmanager
def made_again(products: bool = False) -> Iterator[None]:
    """Inside, cheap functions are watched: what they give is made again. products: those with frozen weights, too, as
    of hidden units."""
    running = None if torch.compiler.is_compiling() else _in_force.get()
    if running is None:
        yield
        return
    before = running.watching, running.products
    running.watching, running.products = True, products or running.products
    try:
        if before[0]:
            yield
        else:
            with running:
                yield
    finally:
        running.watching, running.products = before


def follows(out: Tensor, function: Function, *sources: Tensor | None) -> Tensor:
    """Say that out = function(*sources), without randomness, bit for bit, where torch does not see it: in an
    autograd.Function. out itself."""
    running = None if torch.compiler.is_compiling() else _in_force.get()
    if running is not None and running.products and torch.is_grad_enabled():
        running.told(out, function, sources)
    return out


def _unchanged(parameter: Tensor, version: int) -> Tensor:
    if parameter._version != version:
        raise RuntimeError(
            f"a parameter of shape {tuple(parameter.shape)} was modified between the forward and the backward pass "
            "that needs it to compute "
            "activations again; step the optimizer after backward, or set model.recompute = 'nothing'"
        )
    return parameter
