"""Kinds that are a predicate: `visible(query, key)` says which keys a query sees, and everything else follows from it.

    out_i = sum over j of p_ij v_j,    p_i = softmax over {j : visible(i, j), j holds a token, j <= i if causal} of q_i
    . k_j / sqrt(d).

From the predicate come the definition (`pattern`, `dense`), the output at a few positions (`forward_at`), decoding
(`step`) and the tiles that are computed (`tilings`): a tile in which no query sees a key is never computed. A kind that
declares a `sight` has its tiles in closed form; for others they are found once per length.
"""

from __future__ import annotations

import abc
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from effzoo.attention import flex, reference, tile_map
from effzoo.attention.band import Sees, Window
from effzoo.attention.core import AttentionCore, Context, Mask, State, append, keep_last, memory_part, take_positions
from effzoo.attention.part import Part, bias_of
from effzoo.attention.tiles import Tiles, by_head
from effzoo.attention.traced import Traced
from effzoo.checked import known
from effzoo.devices import at_hand
from effzoo.errors import IncompatibleError, InputError, OptionError
from effzoo.sites import KeysValues

Softmax = Callable[[Tensor, Tensor, Tensor], Tensor]
FACTS = {
    "head": "the number of the head",
    "length": "the length of the row, up to its last token",
    "places": "how many positions the batch has, padding included",
    "query_global": "whether the query has global attention",
    "key_global": "whether the key has global attention",
}


class PredicateAttention(AttentionCore):
    """A kind whose queries see the keys for which `visible` is true. Its options are the keyword-only parameters of its
    constructor."""

    cost = "n^2"
    max_globals = 16  # room for global tokens in a sequence where they are not counted

    def __init__(self, context: Context):
        super().__init__(context)
        self.reads = _named_facts(type(self))  # the facts that the predicate asks for

    @abc.abstractmethod
    def visible(self, query: Tensor, key: Tensor, *args: Any, **facts: Any) -> Tensor:
        """True where a query sees a key; integer tensors of positions that broadcast against each other.

        Padding and the causal triangle are cut off by the base class. A kind that needs more names it as a keyword-only
        parameter, a tensor that broadcasts too: `head` (the number of the head), `length` (of the row, up to its last
        token), `places` (of the batch, padding included),
        `query_global` and `key_global` (whether they are global).
        """

    def sight(self, head: int) -> Window | None:
        """How far the queries of a head look, if a closed form says all of `visible` but global tokens; None: the tiles
        are found."""
        return None

    @property
    def by_length(self) -> bool:
        """Whether what a query sees depends on the length of its row."""
        return "length" in self.reads

    @classmethod
    def knows_globals(cls) -> bool:
        return "key_global" in _named_facts(cls)

    @property
    def crosses(self) -> bool:
        # else positions are compared, which say nothing across two sequences
        return self._sights == {Window(None, None)}

    @property
    def shift_invariant(self) -> bool:  # type: ignore[override]
        return all(sight is not None and sight.chunk == 1 for sight in self._sights)

    def forward(self, *projected: Tensor, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        q, k, v = projected[:3]
        own_tiles = type(self).tilings is not PredicateAttention.tilings
        if self.context.backend == "flex":
            if own_tiles:
                self.tilings(q.shape[2], mask, q.device)  # which refuses lengths that the kind does not take
            under = flex.seen(self, q, k, mask, None if mask.valid is None else lengths(mask.valid))
            out = self.attend(Part(q, k, v, layout=under), memory_part(q, memory))
        elif self.by_length and mask.valid is not None and not own_tiles:
            return self.forward_at(
                torch.arange(q.shape[2], device=q.device)[None], *projected, mask=mask, memory=memory
            )
        else:
            held = self._held(mask)
            traced = torch.compiler.is_compiling()
            part = (
                Part(q, k, v, layout=Traced(self._number), given=[held]) if traced else self.part(q, k, v, held, mask)
            )
            out = self.attend(part, self._global_columns(q, k, v, mask), memory_part(q, memory))
        is_global = self.is_global(mask)
        if is_global is None:
            return out
        where, _ = gathered(mask, self.max_globals)
        q, k, v = self.of_globals(*projected)
        rows = self._attend_at(where, k.shape[2], mask, memory)(take_positions(q, where), k, v)
        # a scatter would be as short, but compiled code then reads what it has overwritten (torch 2.13)
        slot = (is_global.cumsum(dim=1) - 1).clamp(min=0)
        return torch.where(is_global[:, None, :, None], take_positions(rows, slot), out)

    def part(self, q: Tensor, k: Tensor, v: Tensor, held: Tensor | None, mask: Mask | None = None) -> Part:
        """The keys that are `held` in their tiles; compiled code knows no more of the mask."""
        mask = Mask(held) if mask is None else mask
        layout = by_head(self.tilings(q.shape[2], mask, q.device), q.shape[2], self.context.causal)
        if layout is not None:
            return Part(q, k, v, layout=layout, given=[held])
        bias = (
            None
            if held is None
            else mask.memo(("held", held is mask.valid, q.dtype), lambda: bias_of(held[:, None, None, :], q.dtype))
        )
        return Part(q, k, v, bias, causal=self.context.causal)

    def _held(self, mask: Mask) -> Tensor | None:
        """Keys that are seen through tiles, bool[batch, n], as they are tokens and not global; None for all."""
        is_global = self.is_global(mask)
        if is_global is None:
            return mask.valid
        return ~is_global if mask.valid is None else mask.valid & ~is_global

    def is_global(self, mask: Mask, where: Tensor | None = None) -> Tensor | None:
        """Which tokens are global, of all or of those at `where` [batch or 1, r]; None if none is."""
        is_global = mask.is_global if "key_global" in self.reads else None
        return (
            is_global if is_global is None or where is None else is_global.gather(1, where.expand(len(is_global), -1))
        )

    def tilings(self, n: int, mask: Mask, device: torch.device) -> Sequence[tuple[list[int], Tiles | None]]:
        """Heads that see alike, and the tiles in which they are computed; None: every key (before the query, when
        causal)."""
        declared = [self.sight(head) for head in range(self.context.heads)]
        if any(sight is None for sight in declared):
            return tile_map.tilings(self, n, device)
        alike = {sight: [head for head, own in enumerate(declared) if own == sight] for sight in declared}

        def made() -> list[tuple[list[int], Tiles | None]]:
            return [
                (heads, sight.cut(n, self.context.causal, self.sees(heads[0], n)))
                for sight, heads in alike.items()
                if sight is not None
            ]

        return tile_map.remembered((self.key, *declared, n), made, device)

    def seen(self, query: Tensor, key: Tensor, fact: Callable[[str], Tensor], causal: bool | None = None) -> Tensor:
        """`visible` with the facts that it asks for, and with the causal triangle unless told otherwise."""
        seen = self.visible(query, key, **{name: fact(name) for name in self.reads})
        if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
            got = f"a tensor of {seen.dtype}" if isinstance(seen, Tensor) else repr(seen)
            raise InputError(
                f"attention {self.name!r}: visible(query, key) is a boolean tensor (True = the query "
                f"sees the key), got {got}"
            )
        return seen & (key <= query) if (self.context.causal if causal is None else causal) else seen

    def sees(self, head: int, length: int, *, causal: bool | None = None) -> Sees:
        """`visible` of one head in a row of so many tokens, with the causal triangle unless told otherwise, and without
        global tokens."""
        given: dict[str, Any] = {
            "head": head,
            "length": length,
            "places": length,
            "query_global": False,
            "key_global": False,
        }

        def sees(query: Tensor, key: Tensor) -> Tensor:
            with _disable_current_modes():  # the tiles of a shape are no part of what is traced
                return self.seen(query, key, lambda name: torch.tensor(given[name], device=query.device), causal)

        return sees

    def allowed(
        self, query: Tensor, key: Tensor, mask: Mask, *, places: int | Tensor, query_global: Tensor | None = None
    ) -> Tensor:
        """Which of these keys [batch or 1, 1, 1, s] these queries [batch or 1, 1, m, 1] see, broadcastable to [batch,
        heads, m, s].

        Padding is not cut off. places: how many positions there are.
        """
        of_batch = places if isinstance(places, Tensor) else torch.full((), places, device=query.device)
        no = torch.zeros((), dtype=torch.bool, device=query.device)
        given: dict[str, Callable[[], Tensor]] = {
            "head": lambda: torch.arange(self.context.heads, device=query.device)[:, None, None],
            "length": lambda: of_batch if mask.valid is None else lengths(mask.valid)[:, None, None, None],
            "places": lambda: of_batch,
            "query_global": lambda: no if query_global is None else query_global,
            "key_global": lambda: no if mask.is_global is None else mask.is_global[:, None, None, :],
        }
        return self.seen(query, key, lambda name: given[name]())

    def pattern(self, n: int, mask: Mask) -> Tensor:
        marked = mask.is_global if mask.valid is None else mask.valid
        return self._seen(torch.arange(n, device=None if marked is None else marked.device)[None], n, mask)

    def _seen(self, where: Tensor, s: int, mask: Mask) -> Tensor:
        """The definition: which of s keys the queries at `where` [batch or 1, r] see, bool[batch or 1, heads or 1, r,
        s]."""
        is_global, key = self.is_global(mask, where), torch.arange(s, device=where.device)[None, None, None, :]
        of_queries = None if is_global is None else is_global[:, None, :, None]
        seen = self.allowed(where[:, None, :, None], key, mask, places=s, query_global=of_queries)
        return (seen & reference.padding(s, mask.valid, where.device)).expand(-1, -1, where.shape[1], s)

    def dense(self, *projected: Tensor, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        q, k = projected[:2]
        allowed = self._seen(torch.arange(q.shape[2], device=q.device)[None], k.shape[2], mask)
        return self._either(self.is_global(mask), lambda q, k, v: reference.dense(q, k, v, allowed, memory), *projected)

    def forward_at(self, wanted: Tensor, *projected: Any, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        return self._either(
            self.is_global(mask, wanted), self._attend_at(wanted, projected[1].shape[2], mask, memory), *projected
        )

    def attend_memory(self, *projected: Any, mask: Mask, memory: KeysValues, wanted: Tensor | None = None) -> Tensor:
        return self._either(
            self.is_global(mask, wanted), lambda q, k, v: self.attend(memory_part(q, memory)), *projected
        )

    def _attend_at(self, where: Tensor, s: int, mask: Mask, memory: KeysValues | None) -> Softmax:
        """Attention of the queries at `where` [batch or 1, r] to what they see of s keys: a function of these queries,
        and of all keys and values."""
        seen = self._seen(where, s, mask)
        return lambda q, k, v: self.attend(Part(q, k, v, bias_of(seen, q.dtype)), memory_part(q, memory))

    def _either(self, is_global: Tensor | None, softmax: Softmax, *projected: Tensor) -> Tensor:
        """The rows of a softmax, those of global tokens with the projections that these have."""
        out = softmax(*projected[:3])
        return (
            out
            if is_global is None
            else torch.where(is_global[:, None, :, None], softmax(*self.of_globals(*projected)), out)
        )

    def of_globals(self, *projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The queries, keys and values of rows of global tokens."""
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
        new, sights, columns = q.shape[2], self._sights, None
        most = _most(sights)
        k, v = append(past["k"], k, 2), append(past["v"], v, 2)
        valid, kept, last = mask.valid, k.shape[2], past["position"] + new
        state = {**past, "k": keep_last(k, most, 2), "v": keep_last(v, most, 2), "position": last}
        bias: Tensor | None = None
        if "is_global" in past:
            is_global = append(past["is_global"], past["is_global"].new_zeros(len(q), new), 1)
            state["is_global"] = keep_last(is_global, most, 1)
            columns = Part(q, past["k_global"], past["v_global"], bias_of(past["held"][:, None, None, :], q.dtype))
            bias = bias_of(self._newest(last, new, kept, mask) & ~is_global[:, None, None, :], q.dtype)
        # else all that is kept is seen
        elif new > 1 or len(sights) > 1 or not all(sight is not None and sight.plain for sight in sights):
            bias = bias_of(self._newest(last, new, kept, mask), q.dtype)
        elif valid is not None:
            bias = mask.memo(("kept", kept, q.dtype), lambda: bias_of(valid[:, None, None, -kept:], q.dtype))
        return self.attend(Part(q, k, v, bias), columns, memory_part(q, memory)), state

    @property
    def _sights(self) -> set[Window | None]:
        """How far queries look, of all heads."""
        return {self.sight(head) for head in range(self.context.heads)}

    def _newest(self, last: Tensor, new: int, keys: int, mask: Mask) -> Tensor:
        """Which of so many keys, of which the newest stands at `last` [batch, 1], the newest queries see."""
        key = last + torch.arange(1 - keys, 1, device=last.device)
        seen = self.allowed(
            key[:, None, -new:, None], key[:, None, None, :], Mask(mask.valid), places=last[:, None, None, :] + 1
        )
        return seen if mask.valid is None else seen & mask.valid[:, None, None, -keys:]

    def _state(self, k: Tensor, v: Tensor, mask: Mask) -> State:
        """What decoding needs of a prompt: the keys and values that later queries can see, and those of the global
        tokens."""
        most = _most(self._sights)
        state = {
            "k": keep_last(k, most, 2),
            "v": keep_last(v, most, 2),
            "position": torch.full((len(k), 1), k.shape[2] - 1, device=k.device),
        }
        if mask.is_global is not None:
            where, held = gathered(mask, self.max_globals)
            state |= {
                "is_global": keep_last(mask.is_global, most, 1),
                "k_global": take_positions(k, where),
                "v_global": take_positions(v, where),
                "held": held,
            }
        return state

    def _global_columns(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Part | None:
        """Every query sees the global keys, gathered to the front of [batch, globals] and padded with a bias."""
        if self.is_global(mask) is None:
            return None
        where, held = gathered(mask, self.max_globals)
        seen = held[:, None, None, :]
        if self.context.causal:
            seen = seen & (where[:, None, None, :] <= torch.arange(q.shape[2], device=q.device)[:, None])
        bias = mask.memo(("global columns", q.dtype), lambda: bias_of(seen, q.dtype))
        places = mask.memo("global places", lambda: where.masked_fill(~held, k.shape[2]))
        return Part(q, take_positions(k, where), take_positions(v, where), bias, where=places)

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


def lengths(valid: Tensor) -> Tensor:
    """The length of each row of valid [batch, n], up to its last token, [batch]."""
    return (valid * torch.arange(1, valid.shape[1] + 1, device=valid.device)).amax(dim=1)


def gathered(mask: Mask, room: int) -> tuple[Tensor, Tensor]:
    """Positions of the global tokens of each example, [batch, most globals], and which of these slots hold one.

    room: how many slots there are where nobody has said how many globals a row has at most, and to count them would be
        to wait for an accelerator, or to make a shape that compiled code does not know.
    """
    is_global = mask.is_global
    assert is_global is not None

    def make() -> tuple[Tensor, Tensor]:
        count, most = is_global.sum(dim=1), mask.most_globals
        if most is None and at_hand(count):
            most = max(int(count.max()), 1)
        else:
            most = min(room if most is None else most, is_global.shape[1])
            told = f"more than {most} global tokens in a sequence; raise longformer[max_globals=...]"
            count = known(count, (count <= most).all(), told)
        where = is_global.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        return where, torch.arange(most, device=where.device) < count[:, None]

    found: tuple[Tensor, Tensor] = mask.memo("gathered", make)
    return found


def _most(sights: set[Window | None]) -> int | None:
    """How many keys before it a later query can see; None: all."""
    kept = [None if sight is None else sight.kept for sight in sights]
    return None if None in kept else max(one for one in kept if one is not None)


def _named_facts(cls: type[PredicateAttention]) -> tuple[str, ...]:
    """The facts that the predicate of a kind asks for."""
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
