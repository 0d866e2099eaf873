"""The contract of an attention kind: which keys a query sees, computed by the one softmax of `kernel.py`.

A kind defines
    projections   the tensors that it takes, which the attention layer makes: queries, keys, values
    forward       the output
    pattern       the definition that `forward` must equal; or `dense`, where no mask says it
    not_causal    why it cannot be causal, if it cannot
    forward_at    the output at a few positions, where that is cheaper than `forward`
    step          decoding with a cache, where it can

It decodes if it has `step`; it takes memory (prefix tuning) if `forward` has the parameter `memory`. Its options are
the keyword-only parameters of its constructor.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from effzoo.attention import kernel, reference, traced
from effzoo.attention.part import Part, bias_of
from effzoo.errors import IncompatibleError, InputError, OptionError, did_you_mean
from effzoo.routing import TokensOverRanks
from effzoo.sites import KeysValues

ProjectionType = Literal["query", "key", "value", "query and key"]
QKV: dict[str, ProjectionType] = {"q": "query", "k": "key", "v": "value"}
DECLARED = ("name", "paper", "cost", "projections", "not_causal", "later_values_matter", "shift_invariant", "scaled")
FORMER = ("key_side", "row_side", "copied_from")  # declarations of an earlier contract, with `supports_...`
RENAMED = {"rows": "forward_at(wanted, ...)", "alone": "attend_memory", "layouts": "tilings", "sight": "window_of"}


@dataclass(frozen=True)
class Context:
    """The attention layer in which a core works.

    backend: a name of `kernel.BACKENDS`.
    score_cap: the bound of the scores, c tanh(s / c), in kinds that are a predicate; 0 for none.
    global_tokens: whether a batch can mark tokens as global; the latents of a Perceiver cannot be marked.
    shared: one dict for all layers of a model, for parameters that they share.
    """

    heads: int
    head_dim: int
    causal: bool = False
    dropout: float = 0.0
    layer: int = 0
    layers: int = 1
    max_length: int = 512
    backend: str = "auto"
    global_tokens: bool = True
    shared: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    score_cap: float = field(default=0.0, kw_only=True, metadata={"added": "0.3"})


@dataclass(frozen=True, eq=False)
class Mask:
    """The positions of one batch: tokens, padding, global tokens. Made once and shared by all layers.

    valid bool[batch, n]: True at tokens, False at padding; None without padding. Of the keys in cross-attention; of the
        past and the new positions together in decoding.
    is_global bool[batch, n]: True at tokens with global attention; None without any.
    most_globals: the largest number of global tokens in an example, if the caller knows it: counting them on an
        accelerator would make the host wait.
    position_ids int[batch or 1, n]: for rotary positions.
    tasks int[batch]: the task of each example, for routers by task.
    start [batch, n, dim]: the embeddings, for routers that read them.
    ids int[batch, n]: the tokens, -1 where there is none (prompt tokens); of the past and the new positions together in
        decoding; None where the input is embeddings.
    decisions: choices that stay the same when a block is computed again (see `decide`); None stores none.
    source: what cross-attention reads in the decoder of an encoder-decoder; None elsewhere.
    scores [heads, 2 s - 1]: what is added to the scores of a key j and a query i of s positions, at j - i + s - 1
        (relative positions); None for nothing.
    tokens: how routers count the tokens of all ranks, beside `over_ranks`.
    documents: takes the documents that share the rows apart (`effzoo.architectures.packing`); None where each row is
        one.
    over_ranks: computes a kind, `over_ranks(core, *projected, mask=, memory=, group=)`, where each rank of a group
        holds a slice of the sequence (`effzoo.parallel`); None where it is here whole.
    """

    valid: Tensor | None = None
    is_global: Tensor | None = None
    most_globals: int | None = field(default=None, kw_only=True)
    position_ids: Tensor | None = None
    tasks: Tensor | None = None
    start: Tensor | None = field(default=None, repr=False)
    decisions: dict[Any, Any] | None = field(default=None, repr=False)
    source: Source | None = field(default=None, repr=False, kw_only=True)
    scores: Tensor | None = field(default=None, repr=False, kw_only=True)
    documents: Any = field(default=None, repr=False, kw_only=True)
    over_ranks: Callable[..., Tensor] | None = field(default=None, repr=False, kw_only=True)
    tokens: TokensOverRanks | None = field(default=None, repr=False, kw_only=True)
    ids: Tensor | None = field(default=None, repr=False, kw_only=True)
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def memo(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, computed once per key: layers share what they derive from the mask."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Mask:
        """The same mask on another device, where hooks of accelerate bring the inputs of a block."""
        there = torch.device(device)
        tensors = {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        source = None if self.source is None else self.source.to(there, non_blocking)
        if all(x.device == there for x in tensors.values()) and source is self.source:
            return self
        moved: dict[str, Any] = {name: x.to(there, non_blocking=non_blocking) for name, x in tensors.items()}
        moved["source"] = source
        return self.memo(("on", there), lambda: replace(self, **moved, _memo={}))

    def decide(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, and its first result again when a reversible block or a checkpoint recomputes the batch.

        For discrete choices (hash buckets), which rounding in a reconstructed input could change. key: the layer.
        """
        if self.decisions is None:
            return make()
        if key not in self.decisions:
            self.decisions[key] = make()
        return self.decisions[key]

    def scores_at(self, queries: Tensor, keys: Tensor) -> Tensor:
        """What is added at positions of queries [..., m, 1] and of keys [..., 1, s]: [..., heads, m, s]."""
        assert self.scores is not None
        place = keys - queries + self.scores.shape[1] // 2
        return self.scores[:, place].movedim(0, -3)

    def key_bias(self, dtype: torch.dtype) -> Tensor | None:
        """Padding as an additive bias [batch, 1, 1, n], or None."""
        if self.valid is None:
            return None
        valid = self.valid
        return self.memo(("key_bias", dtype), lambda: bias_of(valid[:, None, None, :], dtype))


@dataclass(frozen=True, eq=False)
class Source:
    """What the cross-attention of a decoder reads.

    states [batch, s, dim]: those of the encoder.
    mask: of their positions.
    """

    states: Tensor
    mask: Mask

    def to(self, device: torch.device, non_blocking: bool = False) -> Source:
        """The same on another device."""
        states, mask = self.states.to(device, non_blocking=non_blocking), self.mask.to(device, non_blocking)
        return self if states is self.states and mask is self.mask else Source(states, mask)


State = dict[str, Tensor]  # the cache of one layer; the first axis of each tensor is the batch


class Cache:
    """Past keys and values of each layer of a causal model, so that decoding computes new positions alone."""

    def __init__(self) -> None:
        self.length = 0  # positions so far, prompt tokens included
        self.prompt_tokens = 0
        self.states: dict[int, State] = {}  # by layer
        self.beyond: Tensor | None = None  # whether keys are turned as those of a long text are (longrope)
        self.sources: dict[int, State] = {}  # keys and values of cross-attention, by layer
        self.ids: Tensor | None = None  # the tokens so far, as in `Mask`

    def reorder(self, index: Tensor) -> None:
        """Take these rows of the batch (beam search; an index may repeat)."""
        for state in (*self.states.values(), *self.sources.values()):
            state.update({name: tensor.index_select(0, index) for name, tensor in state.items()})
        self.ids = None if self.ids is None else self.ids.index_select(0, index)


@dataclass(eq=False)
class _Buffer:
    """Memory with room for more positions than are written: `filled` of them."""

    storage: Tensor
    filled: int


# views that `append` has returned -> their buffer, and the position in it at which they end
_buffers: MutableMapping[Tensor, tuple[_Buffer, int]] = WeakTensorKeyDictionary()


def append(past: Tensor, new: Tensor, dim: int) -> Tensor:
    """torch.cat([past, new], dim) for a decoder: `new` is written into free room behind `past`, which is not copied.

    `past` does not change: the first call writes behind it, a second one copies. With gradients it is torch.cat.
    """
    same_axes = past.shape[:dim] == new.shape[:dim] and past.shape[dim + 1 :] == new.shape[dim + 1 :]
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or past.dtype != new.dtype or not same_axes:
        return torch.cat([past, new], dim)
    length, more = past.shape[dim], new.shape[dim]
    buffer, end = _buffers.get(past, (None, 0))
    stale = buffer is not None and buffer.storage.is_inference() and not torch.is_inference_mode_enabled()
    if buffer is None or buffer.filled != end or buffer.storage.shape[dim] < end + more or stale:
        size = list(past.shape)
        size[dim] = length + max(more, length // 2, 64)
        buffer, end = _Buffer(past.new_empty(size), length), length
        buffer.storage.narrow(dim, 0, length).copy_(past)
    buffer.storage.narrow(dim, end, more).copy_(new)
    buffer.filled = end + more
    return _view(buffer, buffer.filled, length + more, dim)


def keep_last(x: Tensor, most: int | None, dim: int) -> Tensor:
    """The last `most` positions of x, a view to which `append` can append; all of x for None."""
    if most is None or x.shape[dim] <= most:
        return x
    buffer, end = _buffers.get(x, (None, 0))
    return x.narrow(dim, x.shape[dim] - most, most) if buffer is None else _view(buffer, end, most, dim)


def _view(buffer: _Buffer, end: int, length: int, dim: int) -> Tensor:
    """The `length` positions of a buffer before `end`."""
    view = buffer.storage.narrow(dim, end - length, length)
    _buffers[view] = buffer, end
    return view


class AttentionCore(nn.Module, abc.ABC):
    """An attention kind: softmax(q k^T / sqrt(d)) v over the keys that each query sees.

    projections: name -> "query", "key", "value" or "query and key", in the order of `forward`. The layer applies rotary
        positions to all but values; in cross-attention "key" and "value" are made of the other sequence; grouped
        queries share "key" and "value".
    not_causal: the reason why the kind cannot be causal; "" if it can.
    later_values_matter: the reason why a causal output may change with the values of later tokens, though its gradient
        with respect to them is 0; "" if it never does.
    shift_invariant: whether padding in front of the tokens changes nothing.
    scaled: whether q . k counts divided by sqrt(d), so that queries times a factor stand for another divisor.

    `projections`, `not_causal` and `later_values_matter` may depend on the options: set them in the constructor.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    cost: ClassVar[str] = "n^2"
    projections: Mapping[str, ProjectionType] = QKV
    not_causal: str = ""
    later_values_matter: str = ""
    shift_invariant: bool = False
    scaled: bool = True

    def __init__(self, context: Context):
        super().__init__()
        self.context = context
        self.has_forward_at = self._belongs_to_forward("forward_at")
        self._takes_memory = self.takes_memory()
        self._number = traced.number_of(self)
        for old, new in RENAMED.items():
            if hasattr(type(self), old):
                raise OptionError(f"attention {self.name!r}: it defines `{old}`, which is `{new}` now")
        for declared in _unread(type(self)):
            raise OptionError(
                f"attention {self.name!r}: it declares `{declared}`, which nobody reads"
                f"{did_you_mean(declared, DECLARED)} What a kind can do follows from what it has; it may declare "
                f"{', '.join(DECLARED)}"
            )
        sides = self.projections.values() if isinstance(self.projections, Mapping) else [self.projections]
        if wrong := [side for side in sides if side not in get_args(ProjectionType)]:
            raise OptionError(
                f"attention {self.name!r}: projections say what each is, 'query', 'key', 'value' or 'query and key', "
                f"as in {QKV}, got {wrong[0]!r}"
            )
        if context.causal and self.not_causal:
            raise IncompatibleError(
                f"attention {self.name!r} cannot be causal: {self.not_causal}; use it in an encoder"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._number = traced.number_of(self)  # compiled code tells a copy from its original by the number

    @abc.abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The output [batch, heads, n, head_dim]: forward(*projected, mask=, memory=None).

        projected: the declared projections, each [batch, heads, n, head_dim].
        mask: the positions of the batch; of the keys in cross-attention.
        memory: keys and values [heads, m, head_dim] that every query also sees (prefix tuning), [batch, heads, m,
            head_dim] where examples differ. Leave the parameter out if the kind takes none.
        """

    def forward_at(self, wanted: Tensor, *projected: Any, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        """`forward` at the wanted positions alone, [batch, heads, r, head_dim].

        wanted int[batch, r]: the positions whose outputs are wanted.
        projected: queries of the wanted positions; keys and values of all.
        """
        raise IncompatibleError(f"attention {self.name!r} computes the outputs of all positions together")

    def step(self, *args: Any, **kwargs: Any) -> tuple[Tensor, State]:
        """Causal decoding, step(*projected, mask=, past=, memory=None): the output at the m new positions, and the
        state for the next call.

        projected: of the new positions.
        past: the state that the last call returned; None in the first.
        mask: `valid` covers past and new positions; `is_global` the new ones, in the first call alone.
        """
        raise IncompatibleError(
            f"attention {self.name!r} keeps no cache for decoding; generate without one (use_cache=False)"
        )

    def pattern(self, n: int, mask: Mask) -> Tensor:
        """The definition: True where query i sees key j, broadcastable to bool[batch, heads, n, n].

        A kind that no mask expresses (linformer) defines `dense` instead.
        """
        raise IncompatibleError(f"attention {self.name!r} has no mask pattern")

    def dense(self, *projected: Tensor, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        """The definition that `forward` must equal, in O(n^2): softmax(q k^T / sqrt(d)) v under `pattern`."""
        q, k, v = projected
        allowed = self.pattern(q.shape[2], mask).to(q.device)
        return reference.dense(q, k, v, allowed, memory, self.context.score_cap)

    # derived from the above

    @classmethod
    def takes_memory(cls) -> bool:
        """Whether queries can see a memory (prefix tuning) besides the keys."""
        return "memory" in inspect.signature(cls.forward).parameters

    @classmethod
    def takes_cap(cls) -> bool:
        """Whether its scores can be capped."""
        return False

    @classmethod
    def decodes(cls) -> bool:
        """Whether it decodes with a cache."""
        return cls._belongs_to_forward("step") and not cls.not_causal

    @classmethod
    def knows_globals(cls) -> bool:
        """Whether tokens can be global."""
        return False

    def starts_from(self, name: str) -> list[str]:
        """Projections of another kind from which `name` can be copied when attention is swapped.

        Shared queries and keys (`qk`) start as queries, which decide what a token attends to.
        """
        sources = {"query": ["q", "qk"], "key": ["k", "qk"], "value": ["v"], "query and key": ["q"]}
        return [source for source in sources.get(self.projections.get(name, ""), []) if source != name]

    @property
    def adds_scores(self) -> bool:
        """Whether it adds `mask.scores` to the scores of a query and a key."""
        return False

    @property
    def crosses(self) -> bool:
        """Whether keys may come from another sequence, of another length."""
        return False

    @classmethod
    def _belongs_to_forward(cls, method: str) -> bool:
        """Whether a method is defined by the class that defines `forward`, or by a subclass of it: an older one would
        compute something else."""
        of_method, of_forward = (
            next(parent for parent in cls.__mro__ if name in vars(parent)) for name in (method, "forward")
        )
        return of_method is not AttentionCore and issubclass(of_method, of_forward)

    # rarely overridden

    def initialise(self) -> None:
        """Draw the kind's own parameters, after the model has drawn the others."""

    def project(self, name: str, x: Tensor, linear: Callable[[Tensor], Tensor], mask: Mask) -> Tensor:
        """linear(x), the projection `name` of x [batch, n, dim]; a kind may compress x first (linformer)."""
        return linear(x)

    def uses(self, mask: Mask) -> tuple[str, ...]:
        """Names of the projections that a batch needs; `forward` gets None for the others."""
        return tuple(self.projections)

    def for_globals(self) -> tuple[str, ...]:
        """The projections that only batches with global tokens need."""
        local = self.uses(Mask())
        return tuple(name for name in self.projections if name not in local)

    def attend_memory(self, *projected: Any, mask: Mask, memory: KeysValues, wanted: Tensor | None = None) -> Tensor:
        """Attention of every query to the memory alone, [batch, heads, n, head_dim]; wanted: see `forward_at`."""
        return self.attend(memory_part(projected[0], memory))

    def check(self, mask: Mask) -> None:
        """Raise InputError for a mask that this kind would ignore."""
        if mask.is_global is not None and not self.knows_globals():
            raise InputError(
                f"attention {self.name!r} has no global tokens; leave global_attention_mask out, or use 'longformer'"
            )

    def check_memory(self) -> None:
        """Raise IncompatibleError if this kind takes no memory."""
        if not self._takes_memory:
            raise IncompatibleError(
                f"attention {self.name!r} takes no memory, as its forward has no parameter `memory`: no query would "
                "see these keys"
            )

    @property
    def dropout(self) -> float:
        """The dropout probability of attention weights; 0 in evaluation."""
        return self.context.dropout if self.training else 0.0

    def attend(self, *parts: Part | None) -> Tensor:
        """softmax(q k^T / sqrt(d)) v over the keys of all parts together; None for a part that is absent."""
        return self.attended(*parts)[0]

    def attended(self, *parts: Part | None) -> tuple[Tensor, Tensor | None]:
        """`attend`, and the log-sum-exp [batch, heads, n, 1], -inf for a query that attended to nothing."""
        cap = self.context.score_cap
        present = [replace(part, cap=cap) if cap else part for part in parts if part is not None]
        return kernel.attended(*present, dropout=self.dropout, backend=self.context.backend)


class CompressedAttention(AttentionCore):
    """Kinds that compress keys and values along the sequence; every query then attends to all compressed keys.

    out = softmax(q k'^T / sqrt(d)) v',    (k', v') = compressed(k, v)

    Keys may come from another sequence; none of these kinds can be causal.
    """

    not_causal = "it mixes past and future"

    @abc.abstractmethod
    def compressed(self, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compressed keys and values [batch, heads, m, head_dim], and an additive bias [batch, 1, 1, m] or None."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        return self.attend(Part(q, *self.compressed(k, v, mask)), memory_part(q, memory))

    def forward_at(self, wanted: Tensor, *projected: Any, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        return self.forward(*projected, mask=mask, memory=memory)

    @property
    def crosses(self) -> bool:
        return True


def _unread(cls: type[AttentionCore]) -> list[str]:
    """Declarations that are misspelt or of an earlier contract, and so would be ignored."""
    parents = [parent for parent in cls.__mro__ if issubclass(parent, AttentionCore)]
    attributes = {name: value for parent in parents for name, value in vars(parent).items()}
    declared = [name for name, value in attributes.items() if isinstance(value, (str, bool, Mapping))]
    unknown = [name for name in declared if name not in DECLARED and name[0] != "_"]
    return [
        name
        for name in unknown
        if name.startswith("supports_") or name in FORMER or get_close_matches(name, DECLARED, n=1, cutoff=0.8)
    ]


def take_positions(x: Tensor, positions: Tensor) -> Tensor:
    """x [batch, ..., n, d] at these positions int[batch, r] -> [batch, ..., r, d]."""
    index = positions.view(positions.shape[0], *[1] * (x.ndim - 3), positions.shape[1], 1)
    return x.gather(-2, index.expand(-1, *x.shape[1:-2], -1, x.shape[-1]))


def memory_part(q: Tensor, memory: KeysValues | None) -> Part | None:
    """The memory as a part that every query q [batch, heads, n, head_dim] sees; None without memory."""
    if memory is None:
        return None
    keys, values = (x.to(q.dtype).expand(q.shape[0], *x.shape[-3:]) for x in memory)
    return Part(q, keys, values)
