"""Kinds that are a predicate: `visible(query, key)` says which keys a query sees; everything else follows from it.

    out_i = sum_j p_ij v_j,    p_i = softmax of q_i . k_j / sqrt(d) over {j : visible(i, j)},

where padding is cut off, and j > i when causal. From the predicate come the definition (`pattern`, `dense`), the output
at a few positions (`forward_at`), decoding (`step`) and the tiles that are computed (`tilings`): a tile in which no
query sees a key is never computed. A kind that declares `window_of` has its tiles in closed form; for others they are
searched once per length.
"""

from __future__ import annotations

import abc
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from effzoo.attention import flex, reference, tile_map
from effzoo.attention.band import Predicate, Window
from effzoo.attention.core import AttentionCore, Context, Mask, State, append, keep_last, memory_part, take_positions
from effzoo.attention.part import Part, bias_of, both
from effzoo.attention.tiles import ByHead, Scored, Tiles, by_head
from effzoo.attention.traced import Traced
from effzoo.checked import known
from effzoo.devices import at_hand
from effzoo.errors import IncompatibleError, InputError, OptionError
from effzoo.sites import KeysValues

Softmax = Callable[[Tensor, Tensor, Tensor], Tensor]
FACTS = {
    "head": "the number of the head",
    "length": "the length of the example, up to its last token",
    "places": "the number of positions of the batch, padding included",
    "query_global": "whether the query has global attention",
    "key_global": "whether the key has global attention",
}


class Columns(NamedTuple):
    """Keys that queries see beside their tiles.

    positions int[batch or 1, slots]: where they stand; the number of keys in a slot without a key.
    seen bool[batch or 1, 1, n or 1, slots]: which queries see them so.
    key: what tells them from other columns of the same batch.
    """

    positions: Tensor
    seen: Tensor
    key: tuple[Any, ...]


class PredicateAttention(AttentionCore):
    """softmax(q k^T / sqrt(d)) v over the keys for which `visible` is true.

    The options of a kind are the keyword-only parameters of its constructor.
    """

    cost = "n^2"
    counts_keys: bool = False  # whether `visible` says how often a key counts
    max_globals = 16  # room for global tokens in an example where they are not counted

    def __init__(self, context: Context):
        super().__init__(context)
        self.reads = _named_facts(type(self))  # the facts that the predicate takes

    @abc.abstractmethod
    def visible(self, query: Tensor, key: Tensor, *args: Any, **facts: Any) -> Tensor:
        """True where the query sees the key: integer positions that broadcast against each other -> bool. Of a kind
        with `counts_keys`, how often the key counts in the softmax, as whole numbers, 0 for one that is not seen.

        Padding and the causal triangle are cut off elsewhere. Facts that a kind needs are keyword-only parameters,
        tensors that broadcast too:

        head: number of the head.
        length: of the example, up to its last token.
        places: number of positions of the batch, padding included.
        query_global, key_global: whether the token has global attention.
        """

    def window_of(self, head: int) -> Window | None:
        """The window of a head, if it says all of `visible` but the columns; None: the tiles are searched."""
        return None

    @property
    def by_length(self) -> bool:
        """Whether what a query sees depends on the length of its example."""
        return "length" in self.reads

    @classmethod
    def takes_cap(cls) -> bool:
        return True

    @classmethod
    def knows_globals(cls) -> bool:
        return "key_global" in _named_facts(cls)

    @property
    def adds_scores(self) -> bool:
        own = [getattr(type(self), name) for name in ("forward", "part")]
        return own == [PredicateAttention.forward, PredicateAttention.part]

    @property
    def crosses(self) -> bool:
        # other predicates compare positions, which mean nothing across two sequences
        return self._windows == {Window(None, None)}

    @property
    def shift_invariant(self) -> bool:  # type: ignore[override]
        return all(window is not None and window.chunk == 1 for window in self._windows)

    def forward(self, *projected: Any, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        q, k, v = projected[:3]
        n, own = q.shape[2], [getattr(type(self), name) for name in ("tilings", "part")]
        own_tiles = own != [PredicateAttention.tilings, PredicateAttention.part]
        if self.context.backend == "flex" and mask.scores is not None:
            raise IncompatibleError("backend 'flex' takes predicates, without what relative positions add; use 'auto'")
        if self.context.backend == "flex":
            if own[0] is not PredicateAttention.tilings:
                self.tilings(n, mask, q.device)  # which refuses lengths that the kind does not take
            tiling = flex.block_masked(self, q, k, mask, None if mask.valid is None else lengths(mask.valid))
            out = self.attend(Part(q, k, v, tiling=tiling), memory_part(q, memory))
        elif mask.scores is not None and torch.compiler.is_compiling():
            raise IncompatibleError(
                "relative positions are not compiled, as their table would not learn; run them eagerly"
            )
        elif self.by_length and mask.valid is not None and not own_tiles:
            every = torch.arange(n, device=q.device)[None]
            return self.forward_at(every, *projected, mask=mask, memory=memory)
        else:
            inputs = self.tile_inputs(mask, q.shape[0], n)
            if torch.compiler.is_compiling():
                part = Part(q, k, v, tiling=Traced(self._number), inputs=inputs)
            else:
                part = self.part(q, k, v, *inputs, mask=mask)
            out = self.attend(part, self._beside(q, k, v, mask), memory_part(q, memory))
        is_global = self.is_global(mask, n)
        if is_global is None:
            return out
        is_global, (positions, _) = is_global.expand(q.shape[0], -1), self.slots(mask, n)
        q, k, v = self.of_globals(*projected)
        at_globals = take_positions(q, positions.expand(q.shape[0], -1))
        out_global = self._attend_at(positions, k.shape[2], mask, memory)(at_globals, k, v)
        # a scatter would be as short, but compiled code then reads what it has overwritten (torch 2.13)
        slot = (is_global.cumsum(dim=1) - 1).clamp(min=0)
        return torch.where(is_global[:, None, :, None], take_positions(out_global, slot), out)

    def tile_inputs(self, mask: Mask, batch: int, n: int) -> list[Tensor | None]:
        """What `part` takes besides queries, keys and values: the keys that are seen through tiles, bool[batch, n]."""
        key_mask = self.key_mask(mask, n)
        return [None if key_mask is None else key_mask.expand(batch, -1)]

    def part(self, q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor | None, mask: Mask | None = None) -> Part:
        """The keys that are seen through tiles; mask: None in compiled code."""
        (key_mask,) = inputs
        mask = Mask(key_mask) if mask is None else mask
        tiling = by_head(self.tilings(q.shape[2], mask, q.device), q.shape[2], self.context.causal)
        if mask.scores is not None:
            return self._scored(q, k, v, key_mask, mask.scores, tiling)
        if tiling is not None:
            return Part(q, k, v, tiling=tiling, inputs=[key_mask])
        bias = None
        if key_mask is not None:
            # a layer with global tokens and one without see different keys
            without = () if self.is_global(mask, k.shape[2]) is None else self.globals_key
            bias = mask.memo(("key mask", *without, q.dtype), lambda: bias_of(key_mask[:, None, None, :], q.dtype))
        return Part(q, k, v, bias, causal=self.context.causal)

    def _scored(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scores: Tensor, tiling: Tiles | ByHead | None
    ) -> Part:
        """`part` with what is added to the scores by distance [heads, 2 n - 1]."""
        scores = scores.to(q.dtype)
        if tiling is not None:
            return Part(q, k, v, tiling=Scored(tiling), inputs=[key_mask, scores])
        n = k.shape[2]
        bias = scores.unfold(1, n, 1).flip(1)[None]  # row i begins at the distance of key 0, -i
        if self.context.causal:
            later = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
            bias = bias.masked_fill(later, -math.inf)
        if key_mask is not None:
            bias = bias.masked_fill(~key_mask[:, None, None, :], -math.inf)
        return Part(q, k, v, bias)

    def key_mask(self, mask: Mask, n: int) -> Tensor | None:
        """Keys that are seen through tiles, bool[batch or 1, n]: tokens that are not global; None for all."""
        is_global = self.is_global(mask, n)
        if is_global is None:
            return mask.valid
        return ~is_global if mask.valid is None else mask.valid & ~is_global

    def is_global(self, mask: Mask, n: int, positions: Tensor | None = None) -> Tensor | None:
        """Which of n tokens are global, bool[batch or 1, n], or [.., r] of those at positions [batch or 1, r]; None for
        none."""
        is_global = self.globals_of(mask, n)
        if is_global is None or positions is None:
            return is_global
        if positions.shape[0] == 1:
            return is_global.index_select(1, positions[0])
        return is_global.expand(positions.shape[0], -1).gather(1, positions)

    def globals_of(self, mask: Mask, n: int) -> Tensor | None:
        """The global tokens of a batch, bool[batch or 1, n]: those that are marked; None for none."""
        return mask.is_global if "key_global" in self.reads else None

    def room_for_globals(self, mask: Mask) -> int:
        """The most global tokens of an example where they are not counted, in compiled code and on an accelerator."""
        return self.max_globals if mask.most_globals is None else mask.most_globals

    @property
    def globals_key(self) -> tuple[Any, ...]:
        """What `globals_of` depends on besides the mask."""
        return ("global tokens",)

    def slots(self, mask: Mask, n: int) -> tuple[Tensor, Tensor]:
        """Positions of the global tokens of each example, int[batch or 1, slots], and which slots hold one, bool."""
        is_global = self.globals_of(mask, n)
        assert is_global is not None

        def make() -> tuple[Tensor, Tensor]:
            count = is_global.sum(dim=1)
            if mask.most_globals is None and at_hand(count):
                most = max(int(count.max()), 1)
            else:
                most = self.room_for_globals(mask)
                most = min(most, n) if isinstance(n, int) else most
                message = f"more than {most} global tokens in a sequence; raise {self.name}[max_globals=...]"
                count = known(count, (count <= most).all(), message)
            # where n is not known, there may be more slots than positions
            marked = is_global.to(torch.int8) if isinstance(n, int) else F.pad(is_global.to(torch.int8), (0, most))
            positions = marked.argsort(dim=1, descending=True, stable=True)[:, :most].clamp(max=n - 1)
            return positions, torch.arange(most, device=positions.device) < count[:, None]

        made: tuple[Tensor, Tensor] = mask.memo(("slots", *self.globals_key, known_size(n)), make)
        return made

    def tilings(self, n: int, mask: Mask, device: torch.device) -> Sequence[tuple[list[int], Tiles | None]]:
        """Groups of heads that see the same keys, and their tiles; None: every key (before the query, when causal)."""
        windows = [self.window_of(head) for head in range(self.context.heads)]
        if None in windows:
            return tile_map.tilings(self, n, device)
        groups: dict[Window, list[int]] = {}
        for head, window in enumerate(windows):
            assert window is not None
            groups.setdefault(window, []).append(head)

        def make() -> list[tuple[list[int], Tiles | None]]:
            causal = self.context.causal
            return [(heads, window.cut(n, causal, window.predicate(causal))) for window, heads in groups.items()]

        return tile_map.cached_tilings((self.key, *windows, n), make, device)

    def evaluate(self, query: Tensor, key: Tensor, fact: Callable[[str], Tensor], causal: bool | None = None) -> Tensor:
        """`visible` with its facts and the causal triangle; causal: instead of that of the layer."""
        visible = self.visible(query, key, **{name: fact(name) for name in self.reads})
        wanted = (torch.bool, torch.int64, torch.int32) if self.counts_keys else (torch.bool,)
        if not isinstance(visible, Tensor) or visible.dtype not in wanted:
            got = f"a tensor of {visible.dtype}" if isinstance(visible, Tensor) else repr(visible)
            raise InputError(
                f"attention {self.name!r}: visible(query, key) is a boolean tensor (True = the query "
                f"sees the key), or, with counts_keys = True, whole numbers of 0 or more, got {got}"
            )
        return both(visible, key <= query) if (self.context.causal if causal is None else causal) else visible

    def predicate(self, head: int, length: int, *, causal: bool | None = None) -> Predicate:
        """`evaluate` of one head in an example of so many tokens, without padding and global tokens."""
        facts: dict[str, Any] = {
            "head": head, "length": length, "places": length, "query_global": False, "key_global": False,
        }  # fmt: skip

        def predicate(query: Tensor, key: Tensor) -> Tensor:
            with _disable_current_modes():  # the tiles of a shape are no part of what is traced
                return self.evaluate(query, key, lambda name: torch.tensor(facts[name], device=query.device), causal)

        return predicate

    def allowed(
        self, query: Tensor, key: Tensor, mask: Mask, *, places: int | Tensor, query_global: Tensor | None = None
    ) -> Tensor:
        """Which of the keys [batch or 1, 1, 1, s] the queries [batch or 1, 1, m, 1] see, broadcastable to [batch,
        heads, m, s].

        Padding is not cut off. places: number of positions.
        """
        of_batch = places if isinstance(places, Tensor) else torch.full((), places, device=query.device)
        no, is_global = torch.zeros((), dtype=torch.bool, device=query.device), self.is_global(mask, key.shape[-1])
        facts: dict[str, Callable[[], Tensor]] = {
            "head": lambda: torch.arange(self.context.heads, device=query.device)[:, None, None],
            "length": lambda: of_batch if mask.valid is None else lengths(mask.valid)[:, None, None, None],
            "places": lambda: of_batch,
            "query_global": lambda: no if query_global is None else query_global,
            "key_global": lambda: no if is_global is None else is_global[:, None, None, :],
        }
        return self.evaluate(query, key, lambda name: facts[name]())

    def pattern(self, n: int, mask: Mask) -> Tensor:
        marked = mask.is_global if mask.valid is None else mask.valid
        return self.seen_at(torch.arange(n, device=None if marked is None else marked.device)[None], n, mask) != 0

    def seen_at(self, positions: Tensor, s: int, mask: Mask) -> Tensor:
        """Which of s keys the queries at positions [batch or 1, r] see, bool[batch or 1, heads or 1, r, s], or how
        often each counts."""
        is_global, key = self.is_global(mask, s, positions), torch.arange(s, device=positions.device)[None, None, None]
        query_global = None if is_global is None else is_global[:, None, :, None]
        allowed = self.allowed(positions[:, None, :, None], key, mask, places=s, query_global=query_global)
        allowed = both(allowed, reference.padding(s, mask.valid, positions.device))
        return allowed.expand(-1, -1, positions.shape[1], s)

    def dense(self, *projected: Tensor, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        q, k = projected[:2]
        allowed = self.seen_at(torch.arange(q.shape[2], device=q.device)[None], k.shape[2], mask)
        is_global, cap, scores = self.is_global(mask, k.shape[2]), self.context.score_cap, None
        if mask.scores is not None:
            query, key = (torch.arange(x.shape[2], device=q.device) for x in (q, k))
            scores = mask.scores_at(query[:, None], key[None]).to(q.dtype)
        return self._either(
            is_global, lambda q, k, v: reference.dense(q, k, v, allowed, memory, cap, scores), *projected
        )

    def forward_at(self, wanted: Tensor, *projected: Any, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        s = projected[1].shape[2]
        softmax = self._attend_at(wanted, s, mask, memory)
        return self._either(self.is_global(mask, s, wanted), softmax, *projected)

    def attend_memory(self, *projected: Any, mask: Mask, memory: KeysValues, wanted: Tensor | None = None) -> Tensor:
        is_global = self.is_global(mask, projected[1].shape[2], wanted)
        return self._either(is_global, lambda q, k, v: self.attend(memory_part(q, memory)), *projected)

    def _attend_at(self, positions: Tensor, s: int, mask: Mask, memory: KeysValues | None) -> Softmax:
        """Attention of the queries at positions [batch or 1, r] to what they see of s keys, as a function of these
        queries and of all keys and values."""
        allowed, key = self.seen_at(positions, s, mask), torch.arange(s, device=positions.device)
        return lambda q, k, v: self.attend(
            Part(q, k, v, added(bias_of(allowed, q.dtype), mask, positions, key[None])), memory_part(q, memory)
        )

    def _either(self, is_global: Tensor | None, softmax: Softmax, *projected: Tensor) -> Tensor:
        """The softmax of local projections, and at global tokens that of their projections."""
        out = softmax(*projected[:3])
        if is_global is None:
            return out
        return torch.where(is_global[:, None, :, None], softmax(*self.of_globals(*projected)), out)

    def of_globals(self, *projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of global tokens, and the keys and values that they see."""
        return projected[0], projected[1], projected[2]

    def step(
        self, *projected: Tensor, mask: Mask, past: State | None, memory: KeysValues | None = None
    ) -> tuple[Tensor, State]:
        if self.by_length:
            raise IncompatibleError(
                f"attention {self.name!r}: what a query sees depends on the length, which grows; "
                "generate with use_cache=False"
            )
        q, k, v = projected[:3]
        if past is None:
            return self(*projected, mask=mask, memory=memory), self._state(k, v, mask)
        if mask.is_global is not None:
            raise InputError(
                "tokens that follow the prompt cannot be global: keys that they would need are not in the cache; "
                "mark them in the prompt"
            )
        near, state = self._near(q, k, v, mask, past)
        global_keys = None
        if "is_global" in past:
            filled = past["filled"][:, None, None, :]
            global_keys = Part(q, past["k_global"], past["v_global"], bias_of(filled, q.dtype))
        return self.attend(near, global_keys, memory_part(q, memory)), state

    def _near(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, past: State) -> tuple[Part, State]:
        """The cached and the new keys but those of global tokens, and the next state."""
        new, windows, most = q.shape[2], self._windows, self.past_reach
        k, v = append(past["k"], k, 2), append(past["v"], v, 2)
        valid, keys, last = mask.valid, k.shape[2], past["position"] + new
        state = {**past, "k": keep_last(k, most, 2), "v": keep_last(v, most, 2), "position": last}
        bias: Tensor | None = None
        if "is_global" in past:
            is_global = append(past["is_global"], past["is_global"].new_zeros(q.shape[0], new), 1)
            state["is_global"] = keep_last(is_global, most, 1)
            bias = bias_of(both(self._allowed_last(last, new, keys, mask), ~is_global[:, None, None, :]), q.dtype)
        # a single query under one plain window sees every key in the cache
        elif new > 1 or len(windows) > 1 or not all(window is not None and window.plain for window in windows):
            bias = bias_of(self._allowed_last(last, new, keys, mask), q.dtype)
        elif valid is not None:
            bias = mask.memo(("cached keys", keys, q.dtype), lambda: bias_of(valid[:, None, None, -keys:], q.dtype))
        if mask.scores is not None:
            if "is_global" in past:
                raise IncompatibleError("a decoder with relative positions keeps no global tokens; leave them out")
            end = mask.scores.shape[1] // 2 + 1
            place = torch.arange(end, device=q.device)[None]
            none = torch.zeros(1, 1, 1, keys, dtype=q.dtype, device=q.device)
            bias = added(none if bias is None else bias, mask, place[:, -new:], place[:, -keys:])
        return Part(q, k, v, bias), state

    @property
    def past_reach(self) -> int | None:
        """The largest number of positions before it that a query sees, all of which a decoder caches; None: all."""
        past = [None if window is None else window.past for window in self._windows]
        return None if None in past else max(most for most in past if most is not None)

    @property
    def _windows(self) -> set[Window | None]:
        """The windows of all heads."""
        return {self.window_of(head) for head in range(self.context.heads)}

    def _allowed_last(self, last: Tensor, new: int, keys: int, mask: Mask) -> Tensor:
        """Which of the last keys the new queries see; last [batch, 1]: the position of the newest."""
        key = last + torch.arange(1 - keys, 1, device=last.device)
        allowed = self.allowed(
            key[:, None, -new:, None], key[:, None, None, :], Mask(mask.valid), places=last[:, None, None, :] + 1
        )
        return allowed if mask.valid is None else both(allowed, mask.valid[:, None, None, -keys:])

    def _state(self, k: Tensor, v: Tensor, mask: Mask) -> State:
        """The cache after a prompt: keys and values that later queries can see, and those of global tokens."""
        most = self.past_reach
        position = torch.full((k.shape[0], 1), k.shape[2] - 1, device=k.device)
        state = {"k": keep_last(k, most, 2), "v": keep_last(v, most, 2), "position": position}
        if mask.is_global is not None:
            positions, filled = self.slots(mask, k.shape[2])
            state["is_global"], state["filled"] = keep_last(mask.is_global, most, 1), filled
            state["k_global"], state["v_global"] = take_positions(k, positions), take_positions(v, positions)
        return state

    def columns(self, mask: Mask, n: int, device: torch.device) -> Columns | None:
        """Keys that queries see beside their tiles, for n positions: those of the global tokens; None for none."""
        if self.is_global(mask, n) is None:
            return None

        def make() -> Columns:
            positions, filled = self.slots(mask, n)
            seen = filled[:, None, None, :]
            if self.context.causal:
                seen = seen & (positions[:, None, None, :] <= torch.arange(n, device=device)[:, None])
            return Columns(positions.masked_fill(~filled, n), seen, key)

        key = ("columns", *self.globals_key, self.context.causal, known_size(n))
        made: Columns = mask.memo(key, make)
        return made

    def _beside(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Part | None:
        """The columns as a part; None without any."""
        columns = self.columns(mask, k.shape[2], k.device)
        if columns is None:
            return None
        bias = mask.memo((*columns.key, q.dtype), lambda: bias_of(columns.seen, q.dtype))
        places = columns.positions.clamp(max=k.shape[2] - 1)
        bias = added(bias, mask, torch.arange(q.shape[2], device=q.device)[None], places)
        positions = columns.positions.expand(k.shape[0], -1)
        keys, values = (take_positions(x, places.expand(k.shape[0], -1)) for x in (k, v))
        return Part(q, keys, values, bias, positions=positions)

    @property
    def key(self) -> tuple[Any, ...]:
        """What the tiles depend on: the kind, its options, and the tensors that its predicate may read."""
        plain = (int, float, str, bool, tuple, type(None))
        options = tuple(
            (name, value)
            for name, value in sorted(vars(self).items())
            if not name.startswith("_") and isinstance(value, plain)
        )
        tensors = tuple((id(x), x._version) for x in (*self.parameters(), *self.buffers()))
        return (type(self), self.context.causal, self.context.heads, options, tensors)


def added(bias: Tensor, mask: Mask, queries: Tensor, keys: Tensor) -> Tensor:
    """A bias [batch, heads, m, s] and what relative positions add, queries [batch or 1, m], keys [batch or 1, s]."""
    if mask.scores is None:
        return bias
    return bias + mask.scores_at(queries[:, :, None], keys[:, None, :]).to(bias.dtype)


def known_size(n: Any) -> int | None:
    """The number of positions, for a key of `Mask.memo`; None where it is traced and not known: a mask has one."""
    return n if isinstance(n, int) else None


def lengths(valid: Tensor) -> Tensor:
    """The length of each example of valid [batch, n], up to its last token, [batch]."""
    return (valid * torch.arange(1, valid.shape[1] + 1, device=valid.device)).amax(dim=1)


def _named_facts(cls: type[PredicateAttention]) -> tuple[str, ...]:
    """The facts that the predicate of a kind takes."""
    return _facts_of(cls.visible, cls.name)


@functools.lru_cache(maxsize=256)
def _facts_of(visible: Callable[..., Tensor], kind: str) -> tuple[str, ...]:
    names = tuple(inspect.signature(visible).parameters)[3:]
    if unknown := [name for name in names if name not in FACTS]:
        raise OptionError(
            f"attention {kind!r}: visible(query, key) may name the facts {', '.join(FACTS)} as further parameters, "
            f"got {', '.join(unknown)}"
        )
    return names
