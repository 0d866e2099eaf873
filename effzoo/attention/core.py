"""The contract of an attention kind: a plan over the one softmax of `kernel.py`.

A kind says at most six things: its `projections` (the tensors it eats; the layer builds them), `forward`, the
definition that must equal (`pattern`, or `dense`), why it is `not_causal`, and, where it pays, `rows` and `step`. What
it can do follows from that: it decodes if it has a `step`, it takes memory if `forward` does. Its options are the
keyword-only parameters of its constructor.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from effzoo.attention import kernel, reference, traced
from effzoo.attention.part import Part, bias_of
from effzoo.errors import IncompatibleError, InputError, OptionError, did_you_mean
from effzoo.sites import KeysValues

Side = Literal["query", "key", "value", "query and key"]
QKV: dict[str, Side] = {"q": "query", "k": "key", "v": "value"}
# what a class says of a kind
DECLARED = ("name", "paper", "cost", "projections", "not_causal", "later_values_matter", "shift_invariant")
FORMER = ("key_side", "row_side", "copied_from")  # and `supports_...`: what it said in an earlier contract


@dataclass(frozen=True)
class Context:
    """What a core knows of the layer it works in."""

    heads: int
    head_dim: int
    causal: bool = False
    dropout: float = 0.0
    layer: int = 0
    layers: int = 1
    max_length: int = 512
    backend: str = "auto"
    global_tokens: bool = True  # whether a batch can mark some: the latents of a Perceiver have no places to be marked
    # one dict for all layers of a model
    shared: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, eq=False)
class Mask:
    """What is true of the positions of one batch, made once and shared by all layers.

    valid [batch, n]: True where there is a token; None when every position holds one. In cross-attention it speaks of
        the keys, in decoding of the past and the new positions together.
    is_global [batch, n]: True where a token has global attention; None when none has.
    most_globals: how many global tokens a row has at most, where that is known without looking; to look, code would
        wait for an accelerator.
    positions [batch or 1, n]: position ids, for blocks with rotary positions.
    tasks [batch]: the number of each example's task, for routers that read it.
    start [batch, n, dim]: the embeddings, for routers that read them.
    decisions: where choices that must not change when a block is computed again are kept (see `decide`); None keeps
        nothing.
    """

    valid: Tensor | None = None
    is_global: Tensor | None = None
    most_globals: int | None = field(default=None, kw_only=True)
    positions: Tensor | None = None
    tasks: Tensor | None = None
    start: Tensor | None = field(default=None, repr=False)
    decisions: dict[Any, Any] | None = field(default=None, repr=False)
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def memo(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()` at the first call with this key, then the same again: masks that layers share are built once."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def decide(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, but the same again when a reversible block or a checkpoint computes this batch a second time.

        For discrete choices (hash buckets), which rounding in a reconstructed input could flip. `key` names the layer.
        """
        if self.decisions is None:
            return make()
        if key not in self.decisions:
            self.decisions[key] = make()
        return self.decisions[key]

    def key_bias(self, dtype: torch.dtype) -> Tensor | None:
        """Padding as an additive bias [batch, 1, 1, n], or None."""
        if self.valid is None:
            return None
        valid = self.valid
        return self.memo(("key_bias", dtype), lambda: bias_of(valid[:, None, None, :], dtype))


State = dict[str, Tensor]  # what one layer keeps of the positions it has seen; every tensor starts with the batch axis


class Cache:
    """What the layers of a causal model keep of the positions seen so far, so that decoding computes new positions
    only."""

    def __init__(self) -> None:
        self.length = 0  # positions seen, prompt rows included
        self.rows = 0  # of which prompt rows
        self.states: dict[int, State] = {}  # by layer

    def reorder(self, index: Tensor) -> None:
        """Take the rows `index` of the batch (beam search; an index may repeat)."""
        for state in self.states.values():
            state.update({name: tensor.index_select(0, index) for name, tensor in state.items()})


@dataclass(eq=False)
class _Room:
    """A tensor that is longer than what is written in it, and up to where that is."""

    whole: Tensor
    filled: int


# where what `longer` gave lies, and where it ends
_rooms: MutableMapping[Tensor, tuple[_Room, int]] = WeakTensorKeyDictionary()


def longer(past: Tensor, new: Tensor, dim: int) -> Tensor:
    """torch.cat([past, new], dim) in a decoder, without a copy of `past` for each token: `new` is written behind it,
    where `longer` has made room.

    What has been given stays as it was: only one can go on from it in its room, a second one takes a room of its own.
    With gradients it is a copy.
    """
    alike = (
        past.dtype == new.dtype
        and past.shape[:dim] == new.shape[:dim]
        and past.shape[dim + 1 :] == new.shape[dim + 1 :]
    )
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not alike:
        return torch.cat([past, new], dim)
    length, more = past.shape[dim], new.shape[dim]
    room, end = _rooms.get(past, (None, 0))
    stale = room is not None and room.whole.is_inference() and not torch.is_inference_mode_enabled()
    if room is None or room.filled != end or room.whole.shape[dim] < end + more or stale:
        size = list(past.shape)
        size[dim] = length + max(more, length // 2, 64)
        room, end = _Room(past.new_empty(size), length), length
        room.whole.narrow(dim, 0, length).copy_(past)
    room.whole.narrow(dim, end, more).copy_(new)
    room.filled = end + more
    return _in(room, room.filled, length + more, dim)


def latest(x: Tensor, most: int | None, dim: int) -> Tensor:
    """The last places of x, so many at most, behind which `longer` goes on as it does behind x; None: all."""
    if most is None or x.shape[dim] <= most:
        return x
    room, end = _rooms.get(x, (None, 0))
    return x.narrow(dim, x.shape[dim] - most, most) if room is None else _in(room, end, most, dim)


def _in(room: _Room, end: int, length: int, dim: int) -> Tensor:
    """The places of a room before `end`."""
    found = room.whole.narrow(dim, end - length, length)
    _rooms[found] = room, end
    return found


class AttentionCore(nn.Module, abc.ABC):
    """One attention kind.

    projections: the tensors that `forward` takes, in order, and what each is: queries, keys or values, or queries that
        are keys as well. What is no value is compared, and turned by rotary positions; keys and values come from the
        source in cross-attention, and grouped queries share them.
    not_causal: why the kind cannot be causal; empty if it can. An option may change both per instance.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    cost: ClassVar[str] = "n^2"
    projections: Mapping[str, Side] = QKV
    not_causal: str = ""
    # why later tokens may change the value of a causal output, though never through its gradient; an option may say
    later_values_matter: str = ""
    # whether tokens that all stand later give the same, so that padding in front of them changes nothing
    shift_invariant: bool = False

    def __init__(self, context: Context):
        super().__init__()
        self.context = context
        self.gives_rows = self._own("rows")  # whether it computes single rows
        self._takes_memory = self.takes_memory()
        self._number = traced.number_of(self)
        for declared in _unread(type(self)):
            told = (
                f"it declares `{declared}`, which nobody reads{did_you_mean(declared, DECLARED)} What a kind can "
                "do follows from what it has"
            )
            raise OptionError(f"attention {self.name!r}: {told}; it may declare {', '.join(DECLARED)}")
        wrong = (
            [self.projections]
            if not isinstance(self.projections, Mapping)
            else [x for x in self.projections.values() if x not in get_args(Side)]
        )
        if wrong:
            told = (
                f"projections say what each is, 'query', 'key', 'value' or 'query and key', as in {QKV}, got "
                f"{wrong[0]!r}"
            )
            raise OptionError(f"attention {self.name!r}: {told}")
        if context.causal and self.not_causal:
            raise IncompatibleError(
                f"attention {self.name!r} cannot be causal: {self.not_causal}; use it in an encoder"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._number = traced.number_of(self)  # a copy is found by its own

    @abc.abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """forward(*projected, mask=, memory=None): projections, each [batch, heads, n, head_dim] -> [batch, heads, n,
        head_dim].

        mask: of the batch. memory: keys and values [heads, rows, head_dim] that every query sees as well (prefix
            tuning); with an axis of the batch in front, the examples have memories of their own. In cross-attention
            `mask` speaks of the keys.
        """

    def rows(self, where: Tensor, *projected: Tensor, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        """The rows `where` [batch, r] of `forward`, [batch, heads, r, head_dim], given the queries of these rows alone
        and all keys and values."""
        raise IncompatibleError(f"attention {self.name!r} computes all rows together")

    def step(self, *args: Any, **kwargs: Any) -> tuple[Tensor, State]:
        """step(*projected, mask=, past=, memory=None), causal decoding: the rows of the newest m positions, and the
        state for the next call.

        projected: of the new positions alone. past: what the call before returned, None at first. mask.valid covers the
            past and the new positions; mask.is_global the new ones, and only in the first call.
        """
        raise IncompatibleError(
            f"attention {self.name!r} keeps no cache for decoding; generate without one (use_cache=False)"
        )

    def pattern(self, n: int, mask: Mask) -> Tensor:
        """The definition: True where query i may attend key j, broadcastable to bool[batch, heads, n, n].

        Kinds that no mask expresses leave it out and give an anchor test instead.
        """
        raise IncompatibleError(f"attention {self.name!r} has no mask pattern")

    def dense(self, *projected: Tensor, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        """What `forward` must equal: softmax under `pattern` in O(n^2), in the dtype of the input."""
        q, k, v = projected
        return reference.dense(q, k, v, self.pattern(q.shape[2], mask).to(q.device), memory)

    # what follows

    @classmethod
    def takes_memory(cls) -> bool:
        """Whether every query can see a memory beside the keys."""
        return "memory" in inspect.signature(cls.forward).parameters

    @classmethod
    def decodes(cls) -> bool:
        """Whether it keeps a cache for decoding."""
        return cls._own("step") and not cls.not_causal

    @classmethod
    def knows_globals(cls) -> bool:
        """Whether tokens can be global."""
        return False

    def starts_from(self, name: str) -> list[str]:
        """Projections of another kind that `name` can start as a copy of: what it is there (shared queries and keys
        decide what is looked for)."""
        alike = {"query": ["q", "qk"], "key": ["k", "qk"], "value": ["v"], "query and key": ["q"]}
        return [one for one in alike.get(self.projections.get(name, ""), []) if one != name]

    @property
    def crosses(self) -> bool:
        """Whether keys may come from another sequence, of another length."""
        return False

    @classmethod
    def _own(cls, method: str) -> bool:
        """Whether a method belongs to `forward`: what a class above that of `forward` says would compute something
        else."""
        of_method, of_forward = (
            next(parent for parent in cls.__mro__ if name in vars(parent)) for name in (method, "forward")
        )
        return of_method is not AttentionCore and issubclass(of_method, of_forward)

    # what seldom needs to be said

    def initialise(self) -> None:
        """Draw the kind's own parameters; called after the model has initialised the rest."""

    def project(self, name: str, x: Tensor, linear: Callable[[Tensor], Tensor], mask: Mask) -> Tensor:
        """The projection `name` of x [batch, n, dim] by its layer's `linear` site; a kind may compress x first if that
        is the same function."""
        return linear(x)

    def uses(self, mask: Mask) -> tuple[str, ...]:
        """The projections that this batch needs; the layer passes None for the others."""
        return tuple(self.projections)

    def for_globals(self) -> tuple[str, ...]:
        """The projections that only batches with global tokens need."""
        local = self.uses(Mask())
        return tuple(name for name in self.projections if name not in local)

    def alone(self, *projected: Tensor, mask: Mask, memory: KeysValues, where: Tensor | None = None) -> Tensor:
        """Attention of every query to the memory and to nothing else, [batch, heads, n, head_dim]."""
        return self.attend(memory_part(projected[0], memory))

    def check(self, mask: Mask) -> None:
        """Refuse what this kind cannot honour, rather than ignore it."""
        if mask.is_global is not None and not self.knows_globals():
            raise InputError(
                f"attention {self.name!r} has no global tokens; leave global_attention_mask out, or use 'longformer'"
            )

    def check_memory(self) -> None:
        """Refuse a memory that this kind does not take."""
        if not self._takes_memory:
            raise IncompatibleError(
                f"attention {self.name!r} takes no memory, as its forward has no parameter "
                "`memory`: nothing would see the rows"
            )

    @property
    def dropout(self) -> float:
        """The dropout probability of the attention weights now: 0 in evaluation."""
        return self.context.dropout if self.training else 0.0

    def attend(self, *parts: Part | None) -> Tensor:
        """Softmax over the union of the parts' keys; absent parts are None."""
        return self.attended(*parts)[0]

    def attended(self, *parts: Part | None) -> tuple[Tensor, Tensor | None]:
        """`attend`, and the log-sum-exp [batch, heads, n, 1], -inf for a query that attended to nothing."""
        present = [part for part in parts if part is not None]
        return kernel.attended(*present, dropout=self.dropout, backend=self.context.backend)


class CompressedAttention(AttentionCore):
    """Kinds that make fewer rows of keys and values, which every query then reads, wherever it stands: of any source,
    and never causal."""

    not_causal = "it mixes past and future"

    @abc.abstractmethod
    def compressed(self, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of fewer rows, [batch, heads, rows, head_dim], and an additive bias for them or None."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        return self.attend(Part(q, *self.compressed(k, v, mask)), memory_part(q, memory))

    def rows(self, where: Tensor, *projected: Tensor, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        return self(*projected, mask=mask, memory=memory)

    @property
    def crosses(self) -> bool:
        return True


def _unread(cls: type[AttentionCore]) -> list[str]:
    """Declarations that are misspelt, or of an earlier contract: ignored, they would say what is not so."""
    given = {
        name: value
        for parent in cls.__mro__
        if issubclass(parent, AttentionCore)
        for name, value in vars(parent).items()
    }
    plain = [
        name
        for name, value in given.items()
        if name not in DECLARED and isinstance(value, (str, bool, Mapping)) and name[0] != "_"
    ]
    return [
        name
        for name in plain
        if name.startswith("supports_") or name in FORMER or get_close_matches(name, DECLARED, n=1, cutoff=0.8)
    ]


def rows_of(x: Tensor, where: Tensor) -> Tensor:
    """Rows `where` [batch, r] of x [batch, ..., n, d] -> [batch, ..., r, d]."""
    between = x.ndim - 3
    index = where.view(where.shape[0], *[1] * between, where.shape[1], 1)
    return x.gather(-2, index.expand(-1, *x.shape[1:-2], -1, x.shape[-1]))


def memory_part(q: Tensor, memory: KeysValues | None) -> Part | None:
    """The part in which every query, [batch, heads, n, head_dim], sees the memory; None without memory."""
    if memory is None:
        return None
    keys, values = (x.to(q.dtype).expand(q.shape[0], *x.shape[-3:]) for x in memory)
    return Part(q, keys, values)
