"""Recomputing tensors in the backward pass, instead of storing them.

    model.recompute = "nothing"   store everything: the fastest
                      "hidden"    recompute the outputs of norms and activations, and the hidden units of frozen
                                  feed-forwards: at most an eighth more arithmetic
                      "blocks"    store the input of each block alone: gradient checkpointing (Chen et al. 2016,
                                  arXiv:1604.06174)

Formulas are written as in the papers. Inside `made_again()` a TorchFunctionMode sees which functions are called; where
autograd would store the result of a cheap one, or a view of it, it stores a note of how it was made, and the backward
pass computes it again, bit for bit. A norm's output is computed from its input, which is stored anyway; hidden units
from that output; and an adapter between the two stores nothing more.

Only functions without randomness are recomputed. Other hooks on saved tensors get the tensors that are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from effzoo.errors import OptionError, UnknownNameError, listing

Function = Callable[..., Tensor]
Level = Literal["nothing", "hidden", "blocks"]
LEVELS: tuple[str, ...] = get_args(Level)
ALWAYS = {F.layer_norm, F.rms_norm, F.gelu, F.silu}  # cheap, and store their input anyway; relu stores its result
SUMS, PRODUCTS = {Tensor.add, torch.add}, {Tensor.mul, torch.mul}
_weak: Callable[[Any], Any] = StorageWeakRef  # typed
_in_force: ContextVar[Recompute | None] = ContextVar("_in_force", default=None)


class Note:
    """How a tensor was made: function and sources. Sources are saved once autograd saves the tensor; parameters by
    reference, with their version."""

    def __init__(self, out: Tensor, function: Function, sources: tuple[Tensor | None, ...]):
        self.storage, self.version = _weak(out.untyped_storage()), out._version
        self.function, self.sources = function, sources
        self.saved: list[Any] | None = None
        self.uses = 0
        self.value: Tensor | None = None
        kind = out.device.type
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def save(self, pack: Callable[[Tensor], Any]) -> None:
        """Called for each place in the graph that needs the tensor."""
        if self.saved is None:
            self.saved = [None if x is None else pack(x) for x in self.sources]
            self.sources = ()
        self.uses += 1

    def make(self, unpack: Callable[[Any], Tensor]) -> Tensor:
        """The tensor, stored until the last place has had it."""
        value = self.value
        if value is None:
            assert self.saved is not None
            sources = [None if x is None else unpack(x) for x in self.saved]
            kind, dtype, enabled = self.autocast
            with torch.no_grad(), torch.autocast(kind, dtype, enabled):
                value = self.function(*sources).contiguous()
        self.uses -= 1
        self.value = value if self.uses > 0 else None
        return value


class SavedParameter(NamedTuple):
    """A parameter by reference, with the version that it had."""

    parameter: Tensor
    version: int


class SavedView:
    """What autograd stores in place of a tensor with a note: the note, and the strides of the tensor."""

    __slots__ = ("note", "offset", "size", "stride")

    def __init__(self, note: Note, tensor: Tensor):
        self.note, self.size, self.stride, self.offset = note, tensor.size(), tensor.stride(), tensor.storage_offset()


class Recompute(TorchFunctionMode):
    """Takes notes of functions inside `made_again()`, so that autograd does not store their results."""

    def __init__(self, copied: bool = False) -> None:
        super().__init__()
        self.copied = copied
        self.notes: dict[int, Note] = {}
        self.watching, self.products = False, False
        # torch calls the innermost hooks alone, so these call the outer ones
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
            self.take_note(out, again, tuple(sources))
        return out

    def worth(self, func: Any, args: Any, out: Tensor) -> bool:
        """Whether recomputing the result of a function saves memory."""
        if func in ALWAYS:
            return True
        # of tensors that are recomputed, or stored anyway: a factor is, where the other has a gradient
        if func in SUMS or func in PRODUCTS:
            tensors = [x for x in args if isinstance(x, Tensor)]
            factors = func in PRODUCTS and len(tensors) == 2
            stored = [factors and tensors[1 - i].requires_grad for i in range(len(tensors))]
            return all(
                is_stored or isinstance(x, nn.Parameter) or self.note(x) is not None
                for is_stored, x in zip(stored, tensors, strict=True)
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

    def take_note(self, out: Tensor, function: Function, sources: tuple[Tensor | None, ...]) -> None:
        """Note that out = function(*sources)."""
        for name in [name for name, note in self.notes.items() if note.storage.expired()]:
            del self.notes[name]
        whole = out.untyped_storage().nbytes() == out.numel() * out.itemsize and out.is_contiguous()
        if self.copied:
            sources = tuple(x.detach().clone() if isinstance(x, nn.Parameter) and x.ndim == 1 else x for x in sources)
        if whole and not torch._C._functorch.is_functorch_wrapped_tensor(out):
            self.notes[out.untyped_storage()._cdata] = Note(out, function, sources)

    def note(self, tensor: Tensor) -> Note | None:
        """The note of a tensor, or of the tensor of which it is a view."""
        note = self.notes.get(tensor.untyped_storage()._cdata)
        if note is None or note.version != tensor._version or isinstance(tensor, nn.Parameter):
            return None
        return note

    def pack(self, tensor: Tensor) -> Any:
        note = self.note(tensor)
        if note is not None:
            note.save(self.pack_source)
            return SavedView(note, tensor)
        return tensor if self.outer_pack is None else self.outer_pack(tensor)

    def pack_source(self, tensor: Tensor) -> Any:
        """A parameter by reference with its version, everything else by `pack`."""
        return SavedParameter(tensor, tensor._version) if isinstance(tensor, nn.Parameter) else self.pack(tensor)

    def unpack(self, saved: Any) -> Tensor:
        if isinstance(saved, SavedParameter):
            return _unchanged(*saved)
        if isinstance(saved, SavedView):
            return saved.note.make(self.unpack).as_strided(saved.size, saved.stride, saved.offset)
        tensor: Tensor = saved if self.outer_unpack is None else self.outer_unpack(saved)
        return tensor


def check_level(level: str) -> None:
    """Raise UnknownNameError for an unknown level."""
    if level == "projections":
        raise OptionError(
            "recompute='projections' is no longer one of its levels; 'blocks' stores less, and 'hidden' is faster"
        )
    if level not in LEVELS:
        raise UnknownNameError("recompute", level, LEVELS)


def save_memory(model: nn.Module, level: Level) -> dict[str, Any]:
    """Set what `finetune` sets: the level, and that the last block computes only what the head reads.

    Returns the settings before, by attribute; the model of a Perceiver has no `only_what_is_read`.
    """
    check_level(level)
    settings = {"recompute": level, "only_what_is_read": True}
    before = {name: getattr(model, name) for name in settings if hasattr(model, name)}
    for name in before:
        setattr(model, name, settings[name])
    return before


class Recomputing:
    """A model with a level of recomputing; transformers and its Trainer set it as gradient checkpointing."""

    recompute: Level = "nothing"

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """recompute = "blocks": gradient checkpointing (Chen et al. 2016, arXiv:1604.06174).

        The arguments are those of transformers. Blocks are recomputed without reentrant autograd, all of them, from
        inputs that stay on the device; OptionError for what asks for anything else.
        """
        asked = {"every_n_layers": every_n_layers, "offload": offload} | dict(activation_checkpointing_kwargs or {})
        neutral = {"every_n_layers": 1, "offload": False, "use_reentrant": False, "preserve_rng_state": True}
        for name, value in asked.items():
            if name not in neutral or value != neutral[name]:
                takes = f"{name}={neutral[name]}" if name in neutral else listing(neutral)
                raise OptionError(f"gradient checkpointing takes {takes} here, got {name}={value!r}; leave it out")
        self.recompute = "blocks"

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        """`activation_checkpointing_enable` under its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **more)

    def activation_checkpointing_disable(self) -> None:
        """recompute = "nothing", where it was "blocks"."""
        if self.recompute == "blocks":
            self.recompute = "nothing"

    def gradient_checkpointing_disable(self) -> None:
        """`activation_checkpointing_disable` under its older name."""
        self.activation_checkpointing_disable()

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether only the inputs of blocks are stored."""
        return self.recompute == "blocks"

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether only the inputs of blocks are stored."""
        return self.recompute == "blocks"

    @property
    def checkpointing(self) -> bool:
        """Whether only the inputs of blocks are stored."""
        return self.recompute == "blocks"

    @checkpointing.setter
    def checkpointing(self, wanted: bool) -> None:
        raise OptionError(
            f"checkpointing is one level of recompute now: model.recompute = {'blocks' if wanted else 'nothing'!r}"
        )


@contextmanager
def recompute(level: Level = "hidden", *, copied: bool = False) -> Iterator[None]:
    """Inside, what `made_again()` marks is recomputed, if the level is "hidden" and gradients are recorded.

    copied: keep copies of weights of norms, as those of another block are gone in the backward pass when a model is
        split over processes.
    """
    check_level(level)
    if level != "hidden" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        yield
        return
    running = Recompute(copied)
    token = _in_force.set(running)
    try:
        with torch.autograd.graph.saved_tensors_hooks(running.pack, running.unpack):
            yield
    finally:
        _in_force.reset(token)


@contextmanager
def made_again(products: bool = False) -> Iterator[None]:
    """Inside, results of cheap functions are recomputed; products: also those with frozen weights (hidden units)."""
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
    """out, with the note that it is function(*sources), bit for bit: for an autograd.Function, which torch does not
    show."""
    running = None if torch.compiler.is_compiling() else _in_force.get()
    if running is not None and running.products and torch.is_grad_enabled():
        running.take_note(out, function, sources)
    return out


def _unchanged(parameter: Tensor, version: int) -> Tensor:
    if parameter._version != version:
        raise RuntimeError(
            f"a parameter of shape {tuple(parameter.shape)} was modified between the forward and the backward pass, "
            "which computes activations from it; step the optimizer after backward, or set model.recompute = 'nothing'"
        )
    return parameter
