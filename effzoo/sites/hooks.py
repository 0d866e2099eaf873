"""The hooks of a PEFT module: what it may do at the site where it hangs, and what it is told of the call.

    composition              hook                            at the site
    parameter, f(theta+phi)  weight(w) -> w', bias(b) -> b'  y = x w'^T + b'
    function, phi(f(x))      before(x, context) -> x'        y = f(x')
                             after(x, y, context) -> y'
    input, f([phi, x])       prompt() -> rows                in front of every input
                             memory(context) -> Memory       keys and values that every query of the layer also sees

Three compositions: He et al. 2022, Towards a unified view of parameter-efficient transfer learning, arXiv:2110.04366.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from effzoo.devices import chosen
from effzoo.errors import OptionError
from effzoo.sites.extras import Positionwise

KeysValues = tuple[Tensor, Tensor]
FORMER = {  # hooks of before, and how it is said now
    "rows": "rows in front of every input are the hook `prompt(self)`",
    "joined": "`after(self, x, y, context)` sees the padding: context.valid",
    "remember": "`memory(self, context)` sees the layer's input, context.x, and its projections, context.keys_values",
    "beyond": "keys and values with a softmax of their own are a Memory with a gate: `memory(self, context)` returns "
    "Memory(keys, values, gate)",
    "apart": "keys and values with a softmax of their own are a Memory with a gate: `memory(self, context)` returns "
    "Memory(keys, values, gate)",
    "by_position": "a module whose hooks compute each position from that position alone derives from Positionwise of "
    "effzoo.sites",
    "grows": "a module whose site may get more rows derives from Growing of effzoo.sites",
    "learn": "what stays frozen of a module is `requires_grad_(False)` where it is made, or no parameter",
    "opens": "`effzoo.sites.opens(module, hook)` tells which hooks a module overrides",
    "dtype": "`effzoo.sites.hooks.dtype_of(module)` tells in which dtype a module computes",
    "beside": "a second network is a `SideNetwork`, whose `forward(self, states, mask)` replaces the output of the "
    "last block",
}
BESIDE = {  # what few modules need, by the class of `effzoo/sites/extras.py` that has it
    "packed": "Packed", "unpack": "Packed", "changed": "Counted", "grow": "Growing", "replaces": "Growing",
    "own_outputs": "OwnOutputs", "renew": "OwnOutputs",
}  # fmt: skip
TAKES = {"before": "(self, x, context)", "after": "(self, x, y, context)", "memory": "(self, context)"}


class HookContext:
    """What the call at hand tells a hook besides the tensors of its site; what is None there is not known where the
    site stands.

    valid bool[batch, n]: which positions of the layer's input hold a token; None where all do.
    mask: of the batch (`effzoo.attention.Mask`); in cross-attention it speaks of the keys.
    x [batch, n, dim]: the input of the attention layer.
    keys_values: rows [..., r, source_dim] -> the keys [..., heads, r, head_dim] and values that this attention layer's
        own projections make of them (not rotated, with the bias).
    rows: of the batch, where adapters are chosen by row; all that it says is then of these.
    """

    def __init__(
        self,
        valid: Tensor | None = None,
        mask: Any = None,
        x: Tensor | None = None,
        keys_values: Callable[[Tensor], KeysValues] | None = None,
        rows: Sequence[int] | None = None,
    ):
        self._valid, self._mask, self._x, self.keys_values, self.rows = valid, mask, x, keys_values, rows

    def _part(self, x: Tensor | None) -> Tensor | None:
        return x if x is None or self.rows is None or len(x) == 1 else chosen(x, self.rows)

    @property
    def valid(self) -> Tensor | None:
        return self._part(self._valid)

    @property
    def x(self) -> Tensor | None:
        return self._part(self._x)

    @property
    def mask(self) -> Any:
        mask = self._mask
        if mask is None or self.rows is None:
            return mask
        own = {name: self._part(getattr(mask, name)) for name in ("valid", "is_global", "positions", "tasks", "start")}
        decisions = None if mask.decisions is None else mask.decisions.setdefault(("rows", tuple(self.rows)), {})
        return dataclasses.replace(mask, **own, decisions=decisions, _memo={})

    @property
    def task_ids(self) -> Tensor | None:
        """The number of each example's task, [batch]."""
        return None if self._mask is None else self._part(self._mask.tasks)

    @property
    def start(self) -> Tensor | None:
        """The embeddings with which the blocks start, [batch, n, dim]."""
        return None if self._mask is None else self._part(self._mask.start)

    def of_rows(self, rows: Sequence[int]) -> HookContext:
        """The same, of some rows of the batch; they are taken out where a hook asks for them."""
        return HookContext(self._valid, self._mask, self._x, self.keys_values, rows)


NOWHERE = HookContext()
_at_hand: ContextVar[HookContext] = ContextVar("_at_hand", default=NOWHERE)


class _Traced:
    """The context while torch.compile traces, which knows no ContextVar; compiled code reads none."""

    context = NOWHERE


@contextmanager
def calling(context: HookContext) -> Iterator[None]:
    """Inside the block, hooks are given this context. Nothing is registered: a thread that computes something else does
    not see it."""
    if torch.compiler.is_compiling():
        before, _Traced.context = _Traced.context, context
        try:
            yield
        finally:
            _Traced.context = before
        return
    token = _at_hand.set(context)
    try:
        yield
    finally:
        _at_hand.reset(token)


def at_hand() -> HookContext:
    """The context of the call at hand."""
    return _Traced.context if torch.compiler.is_compiling() else _at_hand.get()


@dataclass(frozen=True)
class Memory:
    """Keys [(batch,) heads, r, head_dim] and values that every query of an attention layer also sees.

    gate None: in the softmax of the layer, head_i = Attn(q, [keys, K], [values, V]).
    gate [(batch,) heads]: with a softmax of its own, head_i = Attn(q, K, V) + gate_i Attn(q, keys, values).
    """

    keys: Tensor
    values: Tensor
    gate: Tensor | None = None


class PeftModule(nn.Module):
    """What is hung on a site; every hook does nothing until it is overridden.

    delta_rank: the largest rank that the change of the site's matrix can have; None where nothing bounds it.

    What few modules need besides is beside it (`effzoo/sites/extras.py`): files that hold less than the state dict,
    sites that get more rows, heads of another size.
    """

    delta_rank: int | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, now in FORMER.items():
            if hasattr(cls, name):
                raise OptionError(f"{cls.__name__} defines `{name}`, which is no longer called: {now}")
        for name, extra in BESIDE.items():
            if hasattr(cls, name) and not any(parent.__name__ == extra for parent in cls.__mro__):
                raise OptionError(
                    f"{cls.__name__} defines `{name}`, which is read where a module is also {extra}: class "
                    f"{cls.__name__}({extra}, PeftModule)"
                )
        for name, takes in TAKES.items():
            if not _takes(getattr(cls, name), takes.count(",") + 1):
                raise OptionError(
                    f"{cls.__name__} defines `{name}` with other arguments than it is called with: def {name}{takes}"
                )

    def weight(self, weight: Tensor) -> Tensor:
        """The site's weight as it acts."""
        return weight

    def bias(self, bias: Tensor) -> Tensor:
        """The site's bias as it acts."""
        return bias

    def before(self, x: Tensor, context: HookContext) -> Tensor:
        """What the site computes with in place of its input x."""
        return x

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        """What takes the place of the site's output y for its input x."""
        return y

    def prompt(self) -> Tensor | None:
        """Embedding rows put in front of every input, [rows, dim]."""
        return None

    def memory(self, context: HookContext) -> Memory | None:
        """Keys and values that every query of the attention layer also sees; with a batch axis where they differ by
        example.

        What has a gate can be given a scale (`effzoo.activate`), if the module holds a tensor `gate`.
        """
        return None

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """What merging adds to the site's weight and bias so that `before` and `after` are no longer needed.

        None when no such change exists. Computed in the dtype of `weight`, which `merge` makes float64. Modules that
        override `weight` or
        `bias` need not override it: these hooks themselves say what the merged tensors are.
        """
        return None


def _takes(function: Any, arguments: int) -> bool:
    """Whether a hook can be called with so many arguments, `self` among them."""
    if not inspect.isfunction(function):
        return True
    try:
        inspect.signature(function).bind(*range(arguments))
    except TypeError:
        return False
    return True


class SideNetwork(PeftModule):
    """A second network beside the blocks (ladder side-tuning), which hangs on the site `side`."""

    def forward(self, states: Sequence[Tensor], mask: Any) -> Tensor:
        """What replaces the output of the last block, of the states [batch, n, width] before, between and after the
        blocks."""
        raise NotImplementedError


class Mixture(PeftModule):
    """Several experts at one site, each of them modules; the site computes with each, and `mix` makes one output of
    theirs.

    experts: the modules of each expert at this site, by method; an expert may have none here, and then leaves the
        output as it is.
    frozen: whether they stay as they are.
    """

    def __init__(self, experts: Sequence[nn.ModuleDict], frozen: bool = False):
        super().__init__()
        self.experts, self.frozen = nn.ModuleList(experts), frozen

    def each(self) -> list[tuple[PeftModule, ...]]:
        """The modules of each expert."""
        return [tuple(cast("Iterable[PeftModule]", expert.values())) for expert in self.experts]  # type: ignore[operator]

    @staticmethod
    def at_the_output(modules: Sequence[PeftModule]) -> bool:
        """Whether these change the output alone, so that the product need not be computed again."""
        return not any(opens(module, "weight", "bias", "before") for module in modules)

    def mix(self, site: nn.Module, x: Tensor, plain: Tensor, outs: Sequence[Tensor], context: HookContext) -> Tensor:
        """One output of the experts' `outs`; plain: the output without any. x: the site's input."""
        raise NotImplementedError

    def memories(self, context: HookContext) -> list[Memory]:
        """What the experts give an attention layer to see."""
        return []


class Scaled:
    """A module at a scale s: at each hook, s times what it adds there.

        theta + s (theta' - theta),   x + s (x' - x),   y + s (y' - y),   a gate times s

    For a change of weights that is s times the change. Prompts, and keys and values without a gate, add nothing that
    could be multiplied: they have no scale.
    """

    def __init__(self, module: PeftModule, scale: float):
        self.module, self.scale = module, scale

    def between(self, before: Tensor, after: Tensor) -> Tensor:
        """before + s (after - before)."""
        return before if after is before else before + self.scale * (after - before)

    def weight(self, weight: Tensor) -> Tensor:
        return self.between(weight, self.module.weight(weight))

    def bias(self, bias: Tensor) -> Tensor:
        return self.between(bias, self.module.bias(bias))

    def before(self, x: Tensor, context: HookContext) -> Tensor:
        return self.between(x, self.module.before(x, context))

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        return self.between(y, self.module.after(x, y, context))

    def prompt(self) -> Tensor | None:
        return self.module.prompt()

    def memories(self, context: HookContext) -> list[Memory]:
        found = memories(self.module, context)
        return [dataclasses.replace(one, gate=None if one.gate is None else self.scale * one.gate) for one in found]

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        change = self.module.delta(weight, bias)
        if change is None:
            return None
        return self.scale * change[0], None if change[1] is None else self.scale * change[1]

    def each(self) -> list[tuple[PeftModule, ...]]:
        return cast(Mixture, self.module).each()

    def mix(self, site: nn.Module, x: Tensor, plain: Tensor, outs: Sequence[Tensor], context: HookContext) -> Tensor:
        return self.between(plain, cast(Mixture, self.module).mix(site, x, plain, outs, context))


Acts = PeftModule | Scaled


def is_mixture(module: Acts) -> bool:
    """Whether a module mixes what experts make, at a scale or not."""
    return isinstance(module.module if isinstance(module, Scaled) else module, Mixture)


def memories(module: Acts, context: HookContext) -> list[Memory]:
    """What a module gives an attention layer to see; experts of a mixture may each have a softmax of their own."""
    if isinstance(module, (Scaled, Mixture)):
        return module.memories(context)
    found = module.memory(context)
    return [] if found is None else [found]


def opens(module: Acts, *hooks: str) -> bool:
    """Whether a module, its class, or an expert of a mixture overrides one of the named hooks. A mixture mixes outputs,
    so it has `after`."""
    if isinstance(module, Scaled):
        return opens(module.module, *hooks)
    if isinstance(module, Mixture):
        return "after" in hooks or any(opens(own, *hooks) for expert in module.each() for own in expert)
    kind, own = type(module), vars(module)  # either may have been changed since
    return any(hook in own or getattr(kind, hook) is not getattr(PeftModule, hook) for hook in hooks)


def positionwise(module: PeftModule) -> bool:
    """Whether the classes that define a module's `before` and `after` are `Positionwise`; a mixture routes, and may
    read a whole example."""
    if isinstance(module, Mixture):
        return False
    for hook in ("before", "after"):
        if opens(module, hook):
            owner = next(cls for cls in type(module).__mro__ if hook in vars(cls))
            # `effzoo.plan` wraps hooks to watch them
            own = inspect.unwrap(vars(module)[hook]) if hook in vars(module) else None
            replaced = own is not None and getattr(own, "__func__", None) is not vars(owner)[hook]
            if replaced or Positionwise not in owner.__bases__:
                return False
    return True


def dtype_of(module: Acts) -> torch.dtype | None:
    """In which a module's numbers are held, and in which the site lets it compute; None where it has no numbers."""
    module = module.module if isinstance(module, Scaled) else module
    for own in module._parameters.values():  # most have some of their own: this is asked at every hook of every pass
        if own is not None and own.is_floating_point():
            return own.dtype
    return next(
        (tensor.dtype for tensor in chain(module.parameters(), module.buffers()) if tensor.is_floating_point()), None
    )


def learn(module: PeftModule, on: bool) -> None:
    """Make what is trained in a module trainable, or not."""
    module.requires_grad_(on)
    if isinstance(module, Mixture) and module.frozen:
        module.experts.requires_grad_(False)


def has_scale(module: PeftModule) -> bool:
    """Whether what a module adds can be multiplied: not a prompt, a side network, or a memory without a gate (a tensor
    `gate` of its own)."""
    if isinstance(module, Mixture):
        return all(has_scale(own) for expert in module.each() for own in expert)
    if isinstance(module, SideNetwork) or opens(module, "prompt"):
        return False
    return not opens(module, "memory") or isinstance(getattr(module, "gate", None), Tensor)
