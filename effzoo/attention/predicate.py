"""Kinds that are a predicate: `visible(query, key)` says which keys a query sees, and everything else follows from it.

    out_i = sum over j of p_ij v_j,    p_i = softmax over {j : visible(i, j), j holds a token, j <= i if causal} of q_i . k_j / sqrt(d).

From the predicate come the definition (`pattern`, `dense`), single rows (`rows`), decoding (`step`) and the tiles that are computed (`layouts`):
pairs in tiles that no query sees are never computed. A kind that declares how far its queries look (`sight`) has its tiles in closed form;
for others they are found once for a length.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from effzoo.attention import flex, reference, tile_map
from effzoo.attention.band import Chunks, Sees, Window
from effzoo.attention.core import AttentionCore, Context, KeysValues, Mask, State, latest, longer, memory_of, memory_part
from effzoo.attention.part import Layout, Part, bias_of
from effzoo.attention.tiles import Tiles
from effzoo.attention.traced import Traced, number_of
from effzoo.checked import known
from effzoo.devices import at_hand, chosen
from effzoo.errors import IncompatibleError, InputError, OptionError

FACTS = {
    "head": "the number of the head",
    "length": "the length of the row, up to its last token",
    "places": "how many positions the batch has, padding included",
    "query_global": "whether the query has global attention",
    "key_global": "whether the key has global attention",
}


class PredicateAttention(AttentionCore):
    """A kind whose queries see the keys for which `visible` is true. Its options are the keyword-only parameters of its constructor."""

    cost = "n^2"
    max_globals = 16  # room for global tokens in a sequence where they are not counted

    def __init__(self, context: Context):
        super().__init__(context)
        self._reads = _named_facts(type(self))
        self._number = number_of(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._number = number_of(self)

    @abc.abstractmethod
    def visible(self, query: Tensor, key: Tensor, *args: Any, **facts: Any) -> Tensor:
        """True where a query sees a key; integer tensors of positions that broadcast against each other.

        Padding and the causal triangle are cut off by the base class. A kind that needs more names it as a keyword-only parameter, a tensor that
        broadcasts too: `head` (the number of the head), `length` (of the row, up to its last token), `places` (of the batch, padding included),
        `query_global` and `key_global` (whether they are global).
        """

    def sight(self, head: int) -> Window | Chunks | None:
        """How far the queries of a head look, if a closed form says all of `visible` but global tokens; None: the tiles are found."""
        return None

    @property
    def reads(self) -> tuple[str, ...]:
        """The facts that the predicate asks for."""
        return self._reads

    @property
    def by_length(self) -> bool:
        """Whether what a query sees depends on the length of its row."""
        return "length" in self.reads

    @classmethod
    def knows_globals(cls) -> bool:
        return "key_global" in _named_facts(cls)

    @property
    def has_globals(self) -> bool:
        """Whether the predicate knows global tokens."""
        return "key_global" in self.reads

    @property
    def crosses(self) -> bool:
        return self._sights == {Window(None, None)}  # else positions are compared, which say nothing across two sequences

    @property
    def shift_invariant(self) -> bool:  # type: ignore[override]
        return all(isinstance(sight, Window) for sight in self._sights)

    def forward(self, *projected: Tensor, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        q, k, v = projected[:3]
        if self.context.backend == "flex":
            if type(self).layouts is not PredicateAttention.layouts:
                self.layouts(q.shape[2], mask, q.device)  # which refuses lengths that the kind does not take
            under = flex.seen(self, q, k, mask, None if mask.valid is None else lengths(mask.valid))
            out = self.attend(Part(q, k, v, layout=under), memory_part(q, memory))
        elif self.by_length and mask.valid is not None and type(self).layouts is PredicateAttention.layouts:
            return self.rows(torch.arange(q.shape[2], device=q.device)[None], *projected, mask=mask, memory=memory)
        else:
            out = self._over_tiles(q, k, v, mask, memory)
        if not self._marked(mask):
            return out
        where, _ = gathered(mask, self.max_globals)
        q, k, v = self.of_globals(*projected)
        rows = self._rows(where, at(q, where), k, v, mask, memory, _yes(q))
        assert mask.is_global is not None  # a scatter would be as short, but compiled code then reads what it has overwritten (torch 2.13)
        slot = (mask.is_global.cumsum(dim=1) - 1).clamp(min=0)
        return torch.where(mask.is_global[:, None, :, None], at(rows, slot), out)

    def _over_tiles(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, memory: KeysValues | None) -> Tensor:
        """The rows of queries that are not global."""
        columns = self._global_columns(q, k, v, mask)
        if torch.compiler.is_compiling():
            traced = Part(q, k, v, layout=Traced(self._number), given=[self._held(mask)])
            return self.attend(traced, columns, memory_part(q, memory))
        layouts = self.layouts(q.shape[2], mask, q.device)
        order, sizes = [head for heads, _ in layouts for head in heads], [len(heads) for heads, _ in layouts]
        outs = []
        # one split for all heads: slices would each have a gradient of the size of the whole
        for (heads, layout), *of_heads in zip(layouts, *(torch.split(chosen(x, order, 1), sizes, dim=1) for x in (q, k, v)), strict=True):
            part = self.part(of_heads[0], of_heads[1], of_heads[2], layout, mask)
            shared = None if columns is None else replace(columns, q=part.q, k=chosen(columns.k, heads, 1), v=chosen(columns.v, heads, 1))
            outs.append(self.attend(part, shared, memory_part(part.q, memory_of(memory, heads))))
        back = sorted(range(len(order)), key=order.__getitem__)
        return outs[0] if len(outs) == 1 else chosen(torch.cat(outs, dim=1), back, 1)

    def parts(self, q: Tensor, k: Tensor, v: Tensor, *given: Tensor | None) -> Iterator[tuple[list[int], Part]]:
        """Heads that see alike, and their part; given: which keys are held. For compiled code."""
        mask = Mask(given[0])
        for heads, layout in self.layouts(q.shape[2], mask, q.device):
            yield heads, self.part(chosen(q, heads, 1), chosen(k, heads, 1), chosen(v, heads, 1), layout, mask)

    def part(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout | None, mask: Mask) -> Part:
        """Keys that are tokens, without the global ones: those are a part of their own."""
        held = self._held(mask)
        if layout is None:
            bias = None if held is None else mask.memo(("held", self.has_globals, q.dtype), lambda: bias_of(held[:, None, None, :], q.dtype))
            return Part(q, k, v, bias, causal=self.context.causal)
        return Part(q, k, v, layout=layout, given=[held])

    def _held(self, mask: Mask) -> Tensor | None:
        """Keys that are seen through tiles, bool[batch, n]; None for all."""
        if not self._marked(mask):
            return mask.valid
        assert mask.is_global is not None
        return ~mask.is_global if mask.valid is None else mask.valid & ~mask.is_global

    def _marked(self, mask: Mask) -> bool:
        """Whether this batch has global tokens."""
        return self.has_globals and mask.is_global is not None

    def layouts(self, n: int, mask: Mask, device: torch.device) -> list[tuple[list[int], Layout | None]]:
        """Heads that see alike, and the tiles in which they are computed; None: every key (before the query, when causal)."""
        declared = [self.sight(head) for head in range(self.context.heads)]
        if any(sight is None for sight in declared):
            return tile_map.layouts(self, n, device)
        alike = {sight: [head for head, own in enumerate(declared) if own == sight] for sight in declared}

        def cut(sight: Window | Chunks, head: int) -> Tiles | None:
            tiles = sight.cut(n, self.context.causal, self.sees(head, n))
            return None if tiles is None else tiles.to(device)

        make = lambda: [(heads, cut(sight, heads[0])) for sight, heads in alike.items() if sight is not None]  # noqa: E731
        found: list[tuple[list[int], Layout | None]] = mask.memo(("sights", self.key, n), make)
        return found

    def sees(self, head: int, length: int, *, causal: bool | None = None) -> Sees:
        """`visible` of one head in a row of so many tokens, with the causal triangle unless told otherwise, and without global tokens."""
        given: dict[str, Any] = {"head": head, "length": length, "places": length, "query_global": False, "key_global": False}
        cut = self.context.causal if causal is None else causal

        def sees(query: Tensor, key: Tensor) -> Tensor:
            facts = {name: torch.tensor(given[name], device=query.device) for name in self.reads}
            seen = _boolean(self.visible(query, key, **facts), self)
            return seen & (key <= query) if cut else seen

        def real(query: Tensor, key: Tensor) -> Tensor:
            with _disable_current_modes():  # the tiles of a shape are no part of what is traced
                return sees(query, key)

        return real

    def allowed(self, query: Tensor, key: Tensor, mask: Mask, *, places: int | Tensor, query_global: Tensor | None = None) -> Tensor:
        """Which of these keys [batch or 1, 1, 1, s] these queries [batch or 1, 1, m, 1] see, broadcastable to [batch, heads, m, s].

        Padding is not cut off. places: how many positions there are.
        """
        of_batch = places if isinstance(places, Tensor) else torch.full((), places, device=query.device)
        given: dict[str, Callable[[], Tensor]] = {
            "head": lambda: torch.arange(self.context.heads, device=query.device)[:, None, None],
            "length": lambda: of_batch if mask.valid is None else lengths(mask.valid)[:, None, None, None],
            "places": lambda: of_batch,
            "query_global": lambda: _no(query) if query_global is None else query_global,
            "key_global": lambda: _no(query) if mask.is_global is None else mask.is_global[:, None, None, :],
        }
        seen = _boolean(self.visible(query, key, **{name: given[name]() for name in self.reads}), self)
        return seen & (key <= query) if self.context.causal else seen

    def pattern(self, n: int, mask: Mask) -> Tensor:
        return self._seen(n, n, mask)

    def _seen(self, n: int, s: int, mask: Mask) -> Tensor:
        """The definition for n queries and s keys, bool[batch or 1, heads or 1, n, s]."""
        valid = reference.padding(s, mask.valid)
        query, key = (torch.arange(count, device=valid.device) for count in (n, s))
        of_queries = None if mask.is_global is None else mask.is_global[:, None, :, None]
        seen = self.allowed(query[None, None, :, None], key[None, None, None, :], mask, places=s, query_global=of_queries)
        return (valid & seen).expand(-1, -1, n, s)

    def dense(self, *projected: Tensor, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        q, k, v = projected[:3]
        allowed = self._seen(q.shape[2], k.shape[2], mask)
        local = reference.dense(q, k, v, allowed, memory)
        if not self._marked(mask):
            return local
        assert mask.is_global is not None
        return torch.where(mask.is_global[:, None, :, None], reference.dense(*self.of_globals(*projected), allowed, memory), local)

    def rows(self, where: Tensor, *projected: Tensor, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        q, k, v = projected[:3]
        out = self._rows(where, q, k, v, mask, memory, None)
        if not self._marked(mask):
            return out
        assert mask.is_global is not None
        whole = self._rows(where, *self.of_globals(*projected), mask, memory, _yes(q))
        return torch.where(mask.is_global.gather(1, where)[:, None, :, None], whole, out)

    def _rows(self, where: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask, memory: KeysValues | None, query_global: Tensor | None) -> Tensor:
        """The queries at `where` [batch or 1, r], of which q is given, among all keys."""
        n = k.shape[2]
        key = torch.arange(n, device=q.device)[None, None, None, :]
        seen = self.allowed(where[:, None, :, None], key, mask, places=n, query_global=query_global) & reference.padding(n, mask.valid, q.device)
        return self.attend(Part(q, k, v, bias_of(seen, q.dtype)), memory_part(q, memory))

    def of_globals(self, *projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The queries, keys and values of rows of global tokens."""
        return projected[0], projected[1], projected[2]

    def alone(self, *projected: Tensor, mask: Mask, memory: KeysValues, where: Tensor | None = None) -> Tensor:
        q = projected[0]
        if self._marked(mask):
            assert mask.is_global is not None
            is_global = mask.is_global if where is None else mask.is_global.gather(1, where)
            q = torch.where(is_global[:, None, :, None], self.of_globals(*projected)[0], q)
        return self.attend(memory_part(q, memory))

    def step(self, *projected: Tensor, mask: Mask, past: State | None, memory: KeysValues | None = None) -> tuple[Tensor, State]:
        if self.by_length:
            raise IncompatibleError(f"attention {self.name!r}: what a query sees depends on the length, which grows; generate with use_cache=False")
        q, k, v = projected[:3]
        if past is None:
            return self(*projected, mask=mask, memory=memory), self._state(k, v, mask)
        if mask.is_global is not None:
            raise InputError(
                "tokens that follow the prompt cannot be global: keys that they would need are not in the cache; mark them in the prompt"
            )
        new, sights, most = q.shape[2], self._sights, self._most
        k, v = longer(past["k"], k, 2), longer(past["v"], v, 2)
        bias: Tensor | None
        state, columns, last = past, None, past["position"] + new
        if "is_global" in past:
            is_global = longer(past["is_global"], past["is_global"].new_zeros(len(q), new), 1)
            state = {**past, "is_global": latest(is_global, most, 1)}
            columns = Part(q, past["k_global"], past["v_global"], bias_of(past["held"][:, None, None, :], q.dtype))
            bias = bias_of(self._newest(last, new, k.shape[2], mask) & ~is_global[:, None, None, :], q.dtype)
        elif new == 1 and len(sights) == 1 and all(isinstance(sight, Window) and sight.dilation == 1 for sight in sights):  # sees all that is kept
            valid = mask.valid
            bias = None if valid is None else mask.memo(("kept", k.shape[2], q.dtype), lambda: bias_of(valid[:, None, None, -k.shape[2] :], q.dtype))
        else:
            bias = bias_of(self._newest(last, new, k.shape[2], mask), q.dtype)
        out = self.attend(Part(q, k, v, bias), columns, memory_part(q, memory))
        return out, {**state, "k": latest(k, most, 2), "v": latest(v, most, 2), "position": last}

    @property
    def _sights(self) -> set[Window | Chunks | None]:
        """How far queries look, of all heads."""
        return {self.sight(head) for head in range(self.context.heads)}

    def _newest(self, last: Tensor, new: int, keys: int, mask: Mask) -> Tensor:
        """Which of so many keys, of which the newest stands at `last` [batch, 1], the newest queries see."""
        key = last + torch.arange(1 - keys, 1, device=last.device)
        seen = self.allowed(key[:, None, -new:, None], key[:, None, None, :], Mask(mask.valid), places=last[:, None, None, :] + 1)
        return seen if mask.valid is None else seen & mask.valid[:, None, None, -keys:]

    def _state(self, k: Tensor, v: Tensor, mask: Mask) -> State:
        """What decoding needs of a prompt: the keys and values that later queries can see, and those of the global tokens."""
        most = self._most
        state = {"k": latest(k, most, 2), "v": latest(v, most, 2), "position": torch.full((len(k), 1), k.shape[2] - 1, device=k.device)}
        if mask.is_global is not None:
            where, held = gathered(mask, self.max_globals)
            state |= {"is_global": latest(mask.is_global, most, 1), "k_global": at(k, where), "v_global": at(v, where), "held": held}
        return state

    @property
    def _most(self) -> int | None:
        """How many keys before it a later query can see; None: all."""
        kept = [None if sight is None else sight.kept for sight in self._sights]
        return None if None in kept else max(one for one in kept if one is not None)

    def _global_columns(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Part | None:
        """Every query sees the global keys, gathered to the front of [batch, globals] and padded with a bias."""
        if not self._marked(mask):
            return None
        where, held = gathered(mask, self.max_globals)
        seen = held[:, None, None, :]
        if self.context.causal:
            seen = seen & (where[:, None, None, :] <= torch.arange(q.shape[2], device=q.device)[:, None])
        bias = mask.memo(("global columns", q.dtype), lambda: bias_of(seen, q.dtype))
        places = mask.memo("global places", lambda: where.masked_fill(~held, k.shape[2]))
        return Part(q, at(k, where), at(v, where), bias, where=places)

    @property
    def key(self) -> tuple[Any, ...]:
        """What the tiles depend on: the kind, its options, and the tensors that its predicate may read."""
        plain = (int, float, str, bool, tuple, type(None))
        options = tuple((name, value) for name, value in sorted(vars(self).items()) if not name.startswith("_") and isinstance(value, plain))
        tensors = tuple((id(x), x._version) for x in (*self.parameters(), *self.buffers()))
        return (type(self), self.context.causal, self.context.heads, options, tensors)


def lengths(valid: Tensor) -> Tensor:
    """The length of each row of valid [batch, n], up to its last token, [batch]."""
    return (valid * torch.arange(1, valid.shape[1] + 1, device=valid.device)).amax(dim=1)


def gathered(mask: Mask, room: int) -> tuple[Tensor, Tensor]:
    """Positions of the global tokens of each example, [batch, most globals], and which of these slots hold one.

    room: how many slots there are where nobody has said how many globals a row has at most, and to count them would be to wait for an accelerator, or
    to make a shape that compiled code does not know.
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


def at(x: Tensor, where: Tensor) -> Tensor:
    """Rows `where` [batch, g] of x [batch, heads, n, d] -> [batch, heads, g, d]."""
    return x.gather(2, where[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _named_facts(cls: type[PredicateAttention]) -> tuple[str, ...]:
    """The facts that the predicate of a kind asks for."""
    parameters = list(inspect.signature(cls.visible).parameters.values())[3:]
    names = tuple(parameter.name for parameter in parameters)
    if unknown := [name for name in names if name not in FACTS]:
        raise OptionError(
            f"attention {cls.name!r}: visible(query, key) may name the facts {', '.join(FACTS)} as further parameters, got {', '.join(unknown)}"
        )
    return names


def _boolean(seen: Any, core: PredicateAttention) -> Tensor:
    if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
        got = f"a tensor of {seen.dtype}" if isinstance(seen, Tensor) else repr(seen)
        raise InputError(f"attention {core.name!r}: visible(query, key) is a boolean tensor (True = the query sees the key), got {got}")
    return seen


def _no(x: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.bool, device=x.device)


def _yes(x: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=x.device)
