"""The hooks of a PEFT module: what it may do at the site where it hangs, and the context that it is given.

    composition              hook                            at the site
    parameter, f(theta+phi)  weight(w) -> w', bias(b) -> b'  y = x w'^T + b'
    function, phi(f(x))      before(x, context) -> x'        y = f(x')
                             after(x, y, context) -> y'
    input, f([phi, x])       prompt() -> tokens              in front of every input
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
from effzoo.errors import IncompatibleError, OptionError
from effzoo.sites.extras import Positionwise

KeysValues = tuple[Tensor, Tensor]
FORMER = {  # hooks of an earlier contract, and what to write now
    "rows": "prompt tokens in front of every input are the hook `prompt(self)`",
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
EXTRAS = {  # methods of few modules, by the class of `effzoo/sites/extras.py` from which these also derive
    "packed": "Packed", "unpack": "Packed", "changed": "Counted", "grow": "Growing", "replaces": "Growing",
    "own_outputs": "OwnOutputs", "renew": "OwnOutputs",
}  # fmt: skip
TAKES = {"before": "(self, x, context)", "after": "(self, x, y, context)", "memory": "(self, context)"}


class HookContext:
    """What a hook is given of the call, besides the tensors of its site; None where it is not known.

    valid bool[batch, n]: True at tokens; None without padding.
    mask: of the batch (`effzoo.attention.Mask`); of the keys in cross-attention.
    x [batch, n, dim]: the input of the attention layer.
    keys_values: tokens [..., r, source_dim] -> keys [..., heads, r, head_dim] and values by the projections of the
        attention layer, without rotation.
    rows: of the batch, to which everything else is cut, where adapters are chosen by row.
    past: how many positions of a cache come before those of the call.
    """

    def __init__(
        self,
        valid: Tensor | None = None,
        mask: Any = None,
        x: Tensor | None = None,
        keys_values: Callable[[Tensor], KeysValues] | None = None,
        rows: Sequence[int] | None = None,
        past: int = 0,
    ):
        self._valid, self._mask, self._x, self.keys_values, self.rows = valid, mask, x, keys_values, rows
        self.past = past

    def _part(self, x: Tensor | None) -> Tensor | None:
        return x if x is None or self.rows is None or len(x) == 1 else chosen(x, self.rows)

    @property
    def valid(self) -> Tensor | None:
        return self._part(self._valid)

    @property
    def x(self) -> Tensor | None:
        self._check_whole("input")
        return self.layer_input

    @property
    def layer_input(self) -> Tensor | None:
        """x, of which this rank may have a slice."""
        return self._part(self._x)

    def _check_whole(self, what: str) -> None:
        if self._mask is not None and self._mask.over_ranks is not None:
            raise IncompatibleError(
                f"a hook reads the {what} of all positions, of which this rank has a slice; use a method that computes "
                "each position by itself, or one rank"
            )

    @property
    def mask(self) -> Any:
        mask = self._mask
        if mask is None or self.rows is None:
            return mask
        names = ("valid", "is_global", "position_ids", "tasks", "start", "ids")
        of_rows = {name: self._part(getattr(mask, name)) for name in names}
        decisions = None if mask.decisions is None else mask.decisions.setdefault(("rows", tuple(self.rows)), {})
        return dataclasses.replace(mask, **of_rows, decisions=decisions, _memo={})

    @property
    def task_ids(self) -> Tensor | None:
        """The task of each example, int[batch]."""
        return None if self._mask is None else self._part(self._mask.tasks)

    @property
    def start(self) -> Tensor | None:
        """The embeddings, input of the first block, [batch, n, dim]."""
        self._check_whole("embeddings")
        return None if self._mask is None else self._part(self._mask.start)

    def of_rows(self, rows: Sequence[int]) -> HookContext:
        """The context of some rows of the batch, which are taken when a hook reads them."""
        return HookContext(self._valid, self._mask, self._x, self.keys_values, rows, self.past)


NOWHERE = HookContext()
_at_hand: ContextVar[HookContext] = ContextVar("_at_hand", default=NOWHERE)


class _Traced:
    """The context while torch.compile traces, as it cannot trace a ContextVar."""

    context = NOWHERE


@contextmanager
def calling(context: HookContext) -> Iterator[None]:
    """Inside, hooks are given this context; each thread has its own."""
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
    """The context of the current call."""
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
    """A module that hangs on a site; each hook does nothing unless it is overridden.

    delta_rank: the largest rank of the change of the site's weight; None: no bound.

    `effzoo/sites/extras.py` has what few modules need: smaller files, growing sites, heads of another size.
    """

    delta_rank: int | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, now in FORMER.items():
            if hasattr(cls, name):
                raise OptionError(f"{cls.__name__} defines `{name}`, which is no longer called: {now}")
        for name, extra in EXTRAS.items():
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
        """W', in place of the site's weight W."""
        return weight

    def bias(self, bias: Tensor) -> Tensor:
        """b', in place of the site's bias b."""
        return bias

    def before(self, x: Tensor, context: HookContext) -> Tensor:
        """x', in place of the site's input x."""
        return x

    def after(self, x: Tensor, y: Tensor, context: HookContext) -> Tensor:
        """y', in place of the site's output y for the input x."""
        return y

    def prompt(self) -> Tensor | None:
        """Prompt tokens in front of every input, [r, dim]."""
        return None

    def memory(self, context: HookContext) -> Memory | None:
        """Keys and values that every query of the attention layer also sees.

        `effzoo.activate` can scale a memory with a gate, if the module has a tensor `gate`.
        """
        return None

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """What merging adds to the site's weight and bias, in their dtype, in place of `before` and `after`.

        None if there is no such change. Not needed for `weight` and `bias`, which merging calls.
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
    """A second network next to the blocks (ladder side-tuning), which hangs on the site `side`."""

    def forward(self, states: Sequence[Tensor], mask: Any) -> Tensor:
        """The output in place of the last block's; states [batch, n, width]: before, between and after the blocks."""
        raise NotImplementedError


class Mixture(PeftModule):
    """Several experts at one site: the site computes an output with each, and `mix` combines them.

    experts: the modules of each expert, by method; {} for an expert that changes nothing here.
    frozen: whether the experts are not trained.
    """

    def __init__(self, experts: Sequence[nn.ModuleDict], frozen: bool = False):
        super().__init__()
        self.experts, self.frozen = nn.ModuleList(experts), frozen

    def expert_modules(self) -> list[tuple[PeftModule, ...]]:
        """The modules of each expert."""
        experts = cast("Iterable[Any]", self.experts)
        return [tuple(expert.values()) for expert in experts]

    @staticmethod
    def at_the_output(modules: Sequence[PeftModule]) -> bool:
        """Whether these change the output alone, so that the site's product is the same."""
        return not any(opens(module, "weight", "bias", "before") for module in modules)

    def mix(self, site: nn.Module, x: Tensor, plain: Tensor, outs: Sequence[Tensor], context: HookContext) -> Tensor:
        """The output of the experts' `outs`. x: the site's input; plain: its output without experts."""
        raise NotImplementedError

    def memories(self, context: HookContext) -> list[Memory]:
        """The memories of the experts."""
        return []


class Scaled:
    """A module at a scale s: at each hook, s times what it adds there.

        theta + s (theta' - theta),   x + s (x' - x),   y + s (y' - y),   a gate times s

    A prompt, or a memory without a gate, has no scale: it adds nothing that could be multiplied.
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
        several = memories(self.module, context)
        return [dataclasses.replace(one, gate=None if one.gate is None else self.scale * one.gate) for one in several]

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        change = self.module.delta(weight, bias)
        if change is None:
            return None
        return self.scale * change[0], None if change[1] is None else self.scale * change[1]

    def expert_modules(self) -> list[tuple[PeftModule, ...]]:
        return cast(Mixture, self.module).expert_modules()

    def mix(self, site: nn.Module, x: Tensor, plain: Tensor, outs: Sequence[Tensor], context: HookContext) -> Tensor:
        return self.between(plain, cast(Mixture, self.module).mix(site, x, plain, outs, context))


Acts = PeftModule | Scaled


def is_mixture(module: Acts) -> bool:
    """Whether a module is a mixture, at a scale or not."""
    return isinstance(module.module if isinstance(module, Scaled) else module, Mixture)


def memories(module: Acts, context: HookContext) -> list[Memory]:
    """The memories of a module: one, none, or those of experts."""
    if isinstance(module, (Scaled, Mixture)):
        return module.memories(context)
    memory = module.memory(context)
    return [] if memory is None else [memory]


def opens(module: Acts, *hooks: str) -> bool:
    """Whether a module, or an expert of a mixture, overrides one of the hooks; a mixture overrides `after`."""
    if isinstance(module, Scaled):
        return opens(module.module, *hooks)
    if isinstance(module, Mixture):
        return "after" in hooks or any(opens(one, *hooks) for expert in module.expert_modules() for one in expert)
    cls, instance = type(module), vars(module)  # either may have been patched
    return any(hook in instance or getattr(cls, hook) is not getattr(PeftModule, hook) for hook in hooks)


def positionwise(module: PeftModule) -> bool:
    """Whether the classes that define a module's `before` and `after` are `Positionwise`; a mixture is not, as its
    router may read a whole example."""
    if isinstance(module, Mixture):
        return False
    for hook in ("before", "after"):
        if opens(module, hook):
            owner = next(cls for cls in type(module).__mro__ if hook in vars(cls))
            # `effzoo.plan` wraps hooks
            patch = inspect.unwrap(vars(module)[hook]) if hook in vars(module) else None
            replaced = patch is not None and getattr(patch, "__func__", None) is not vars(owner)[hook]
            if replaced or Positionwise not in owner.__bases__:
                return False
    return True


def dtype_of(module: Acts) -> torch.dtype | None:
    """The dtype of a module's parameters or buffers, in which it computes; None without any."""
    module = module.module if isinstance(module, Scaled) else module
    for parameter in module._parameters.values():  # the fast way for most modules: this is called at every hook
        if parameter is not None and parameter.is_floating_point():
            return parameter.dtype
    return next(
        (tensor.dtype for tensor in chain(module.parameters(), module.buffers()) if tensor.is_floating_point()), None
    )


def learn(module: PeftModule, on: bool) -> None:
    """Make the parameters of a module trainable, or not; experts that are frozen stay so."""
    module.requires_grad_(on)
    if isinstance(module, Mixture) and module.frozen:
        module.experts.requires_grad_(False)


def has_scale(module: PeftModule) -> bool:
    """Whether a module can be scaled: not a prompt, a side network, or a memory without a tensor `gate`."""
    if isinstance(module, Mixture):
        return all(has_scale(one) for expert in module.expert_modules() for one in expert)
    if isinstance(module, SideNetwork) or opens(module, "prompt"):
        return False
    return not opens(module, "memory") or isinstance(getattr(module, "gate", None), Tensor)
