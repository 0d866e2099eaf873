"""Known slips: when an output is not that of the definition, which variant of the definition is it?

Each variant is the definition with one thing changed, as it is changed by mistake: the scale, the axis of the softmax,
the edge of a window, the mask. The output is compared with each on inputs with and without padding and causality.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effzoo.attention.core import AttentionCore, Mask
from effzoo.checks.runner import Failed, needs
from effzoo.checks.subject import Subject, draw, live, padding

LENGTH, FAR, NEAR = 13, 64, 1e-9
Dense = Callable[..., Tensor]


@dataclass
class Setting:
    """One call: its tensors, its definition, and what the checked kind gave.

    raw bool[heads, n, n]: which keys a query sees before padding and causality are cut off; None where no mask says it.
    offsets bool[heads, 2 FAR + 1]: the same by i - j, where that is all it depends on; else None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor | None
    causal: bool
    dense: Dense
    raw: Any
    offsets: Any
    out: Tensor
    expected: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.expected = self.dense(self.q, self.k, self.v, self.valid)

    @property
    def triangle(self) -> Tensor:
        n = self.q.shape[2]
        return torch.ones(n, n, dtype=torch.bool).tril(0 if self.causal else n)

    @property
    def keys(self) -> Tensor:
        """Which keys are tokens, bool[batch or 1, 1, 1, n]."""
        n = self.q.shape[2]
        return torch.ones(1, 1, 1, n, dtype=torch.bool) if self.valid is None else self.valid[:, None, None, :]

    @property
    def allowed(self) -> Tensor:
        assert self.raw is not None
        return self.raw & self.triangle & self.keys

    def scores(self) -> Tensor:
        return self.q @ self.k.mT / math.sqrt(self.q.shape[-1])

    def counted(self) -> Tensor:
        """The queries that are compared, bool[batch, heads, n]: those that see a key."""
        batch, heads, n, _ = self.q.shape
        seen = torch.ones(batch, 1, n, dtype=torch.bool) if self.raw is None else self.allowed.any(dim=-1)
        return seen.expand(batch, heads, n)


Variant = Callable[[Setting], Tensor | None]


def softmax(scores: Tensor, allowed: Tensor, dim: int = -1) -> Tensor:
    """Weights over the allowed entries along an axis; 0 where there is none."""
    return scores.masked_fill(~allowed, -math.inf).softmax(dim=dim).nan_to_num(0.0)


def _masked(allowed: Callable[[Setting], Tensor | None]) -> Variant:
    """The definition under another mask."""

    def variant(s: Setting) -> Tensor | None:
        seen = None if s.raw is None else allowed(s)
        return None if seen is None else softmax(s.scores(), seen) @ s.v

    return variant


def _edge(offset: Callable[[Tensor], Tensor]) -> Variant:
    """The definition where offset i - j is taken for another."""

    def allowed(s: Setting) -> Tensor | None:
        if s.offsets is None:
            return None
        n = s.q.shape[2]
        gap = torch.arange(n)[:, None] - torch.arange(n)
        return s.offsets[:, offset(gap).clamp(-FAR, FAR) + FAR] & s.triangle & s.keys

    return _masked(allowed)


def _scaled(factor: Callable[[Setting], float]) -> Variant:
    """The definition with its scores times a factor."""
    return lambda s: s.dense(s.q * factor(s), s.k, s.v, s.valid)


def _weighted(weights: Callable[[Setting], Tensor]) -> Variant:
    return lambda s: None if s.raw is None else weights(s) @ s.v


def _rejoined(x: Tensor) -> Tensor:
    """Heads and positions taken for one another."""
    return x.transpose(1, 2).reshape(x.shape)


def _past(gap: Tensor) -> Tensor:
    return (gap > 0).long()


def _future(gap: Tensor) -> Tensor:
    return (gap < 0).long()


SCALE = "the scores are q k^T / sqrt(d), with d the width of one head"
MASK = "mask.valid is True at tokens and speaks of the keys: mask.valid[:, None, None, :]"
CAUSAL = "a causal query i sees the keys j <= i: where self.context.causal, tril() of the allowed keys, itself included"
EDGE = "compare the first and the last key that a query in the middle sees with the formula: < and <=, one side or both"
HEADS = "the tensors are [batch, heads, n, head_dim]; look for a reshape without a transpose, and a flip or roll"
SOFTMAX = "the weights of a query over the keys that it sees sum to 1: mask with -inf, then softmax(dim=-1), then v"
VARIANTS: list[tuple[str, str, Variant]] = [
    ("without 1 / sqrt(d)", SCALE, _scaled(lambda s: s.q.shape[-1] ** 0.5)),
    ("with 1 / d in place of 1 / sqrt(d)", SCALE, _scaled(lambda s: s.q.shape[-1] ** -0.5)),
    ("with sqrt(d) in place of 1 / sqrt(d)", SCALE, _scaled(lambda s: s.q.shape[-1])),
    ("scaled by the width of all heads together", SCALE, _scaled(lambda s: s.q.shape[1] ** -0.5)),
    ("scaled by 1 / sqrt(n), the length", SCALE, _scaled(lambda s: (s.q.shape[-1] / s.q.shape[2]) ** 0.5)),
    ("scaled by 1 / sqrt(heads)", SCALE, _scaled(lambda s: (s.q.shape[-1] / s.q.shape[1]) ** 0.5)),
    ("with 2 / sqrt(d)", SCALE, _scaled(lambda s: 2.0)),
    ("with the scores negated", SCALE, _scaled(lambda s: -1.0)),
    ("without the scores: the plain mean of what a query sees", SCALE, _scaled(lambda s: 0.0)),
    ("with the softmax over the queries", SOFTMAX, _weighted(lambda s: softmax(s.scores(), s.allowed, -2))),
    ("with the softmax over the queries", SOFTMAX, _weighted(lambda s: s.scores().softmax(-2) * s.allowed)),
    ("with the softmax over the heads", SOFTMAX, _weighted(lambda s: s.scores().softmax(1) * s.allowed)),
    ("masked behind the softmax, so that the weights do not sum to 1", SOFTMAX,
     _weighted(lambda s: s.scores().softmax(-1) * s.allowed)),
    ("masked behind the softmax, so that the weights do not sum to 1", SOFTMAX,
     _weighted(lambda s: softmax(s.scores(), s.keys) * s.allowed)),
    ("with hidden scores set to 0 in place of -inf", SOFTMAX,
     _weighted(lambda s: (s.scores() * s.allowed).softmax(-1))),
    ("without the softmax", SOFTMAX, _weighted(lambda s: s.scores() * s.allowed)),
    ("with exp in place of the softmax: nothing is divided by the sum", SOFTMAX,
     _weighted(lambda s: s.scores().exp() * s.allowed)),
    ("with a sigmoid in place of the softmax", SOFTMAX, _weighted(lambda s: s.scores().sigmoid() * s.allowed)),
    ("with the softmax taken twice", SOFTMAX,
     _weighted(lambda s: softmax(softmax(s.scores(), s.allowed), s.allowed))),
    ("with the causal triangle off", CAUSAL, _masked(lambda s: s.raw & s.keys)),
    ("with the causal triangle one too wide: a query sees the next key", CAUSAL,
     _masked(lambda s: s.raw & s.keys & _tri(s, 1))),
    ("with the causal triangle one too narrow: a query does not see itself", CAUSAL,
     _masked(lambda s: s.raw & s.keys & _tri(s, -1))),
    ("with the causal triangle turned over: a query sees the future", CAUSAL,
     _masked(lambda s: s.raw & s.keys & s.triangle.T)),
    ("with the causal triangle always on", CAUSAL, _masked(lambda s: s.raw & s.keys & _tri(s, 0, always=True))),
    ("with padding seen: mask.valid is not used", MASK, _masked(lambda s: s.raw & s.triangle)),
    ("with the mask inverted: padding is seen, and tokens are not", MASK,
     _masked(lambda s: s.raw & s.triangle & (s.keys if s.valid is None else ~s.keys))),
    ("with the padding of the queries in place of that of the keys", MASK,
     _masked(lambda s: s.raw & s.triangle & s.keys.mT)),
    ("with the padding of the first example for all", MASK, _masked(lambda s: s.raw & s.triangle & s.keys[:1])),
    ("with the allowed keys inverted: a query sees what it must not", MASK,
     _masked(lambda s: ~s.raw & s.triangle & s.keys)),
    ("with a window that is 1 wider at both ends", EDGE, _edge(lambda gap: gap - gap.sign())),
    ("with a window that is 1 narrower at both ends", EDGE, _edge(lambda gap: gap + gap.sign())),
    ("with a window that reaches 1 further back", EDGE, _edge(lambda gap: gap - _past(gap))),
    ("with a window that reaches 1 less far back", EDGE, _edge(lambda gap: gap + _past(gap))),
    ("with a window that reaches 1 further ahead", EDGE, _edge(lambda gap: gap + _future(gap))),
    ("with a window that reaches 1 less far ahead", EDGE, _edge(lambda gap: gap - _future(gap))),
    ("with a window of twice the width", EDGE, _edge(lambda gap: gap.sign() * ((gap.abs() + 1) // 2))),
    ("with a window of half the width", EDGE, _edge(lambda gap: 2 * gap)),
    ("with a window that is open ahead: the distance is taken without abs()", EDGE,
     _edge(lambda gap: gap.clamp(min=0))),
    ("with a window that is open to the back: the distance is taken without abs()", EDGE,
     _edge(lambda gap: gap.clamp(max=0))),
    ("with the window to one side, the past", EDGE, _edge(lambda gap: torch.where(gap >= 0, gap, FAR))),
    ("with the window to one side, the future", EDGE, _edge(lambda gap: torch.where(gap <= 0, gap, -FAR))),
    ("with what a query sees moved by one key back", EDGE, _edge(lambda gap: gap - 1)),
    ("with what a query sees moved by one key ahead", EDGE, _edge(lambda gap: gap + 1)),
    ("without the query's own position", EDGE,
     _masked(lambda s: s.allowed & ~torch.eye(s.q.shape[2], dtype=torch.bool))),
    ("of full attention: every key is seen", EDGE, _masked(lambda s: s.triangle & s.keys & torch.ones_like(s.raw))),
    ("with the heads of the values in another order", HEADS, lambda s: s.dense(s.q, s.k, s.v.flip(1), s.valid)),
    ("with the heads of the keys in another order", HEADS, lambda s: s.dense(s.q, s.k.flip(1), s.v, s.valid)),
    ("with the heads of the queries in another order", HEADS, lambda s: s.dense(s.q.flip(1), s.k, s.v, s.valid)),
    ("with the heads of the output in another order", HEADS, lambda s: s.expected.flip(1)),
    ("with heads and positions of the output mixed by a reshape", HEADS, lambda s: _rejoined(s.expected)),
    ("with heads and positions of the values mixed by a reshape", HEADS,
     lambda s: s.dense(s.q, s.k, _rejoined(s.v), s.valid)),
    ("with one head's weights for all", HEADS, _weighted(lambda s: softmax(s.scores(), s.allowed)[:, :1])),
    ("with the mean of the heads' weights for all", HEADS,
     _weighted(lambda s: softmax(s.scores(), s.allowed).mean(1, keepdim=True))),
    ("with queries and keys exchanged", SOFTMAX, lambda s: s.dense(s.k, s.q, s.v, s.valid)),
    ("with keys and values exchanged", SOFTMAX, lambda s: s.dense(s.q, s.v, s.k, s.valid)),
    ("with the keys for values", SOFTMAX, lambda s: s.dense(s.q, s.k, s.k, s.valid)),
    ("with the queries for values", SOFTMAX, lambda s: s.dense(s.q, s.k, s.q, s.valid)),
    ("with the queries for keys", SOFTMAX, lambda s: s.dense(s.q, s.q, s.v, s.valid)),
    ("taken twice", "the output is the weighted mean of the values, once", lambda s: 2 * s.expected),
    ("with the values added to it", "the residual is added by the block, not here", lambda s: s.expected + s.v),
    ("with the queries added to it", "the residual is added by the block, not here", lambda s: s.expected + s.q),
    ("with a mean over the heads", HEADS, lambda s: s.expected.mean(1, keepdim=True).expand_as(s.expected)),
    ("with the order of the positions turned over", HEADS, lambda s: s.expected.flip(2)),
]  # fmt: skip


def _tri(s: Setting, diagonal: int, always: bool = False) -> Tensor:
    n = s.q.shape[2]
    return torch.ones(n, n, dtype=torch.bool).tril(diagonal if s.causal or always else n)


def named(settings: list[Setting]) -> tuple[str, str] | None:
    """The variant that the outputs equal in all settings, and its cause; None when they equal the definition or no
    known variant."""
    plain = [s for s in settings if s.valid is None]
    return _named(settings) or _named(plain)  # what happens to padding may be another matter


def _named(settings: list[Setting]) -> tuple[str, str] | None:
    wrong = [differs(s, s.expected) for s in settings]
    if not any(wrong):
        return None
    for name, cause, variant in VARIANTS:
        outs = [variant(s) for s in settings]
        if any(out is None for out in outs):
            continue
        found = [differs(s, out) for s, out in zip(settings, outs, strict=True)]
        if not any(found) and all(same is False for same, other in zip(found, wrong, strict=True) if other):
            return name, cause
    return None


def differs(s: Setting, wanted: Tensor | None) -> bool | None:
    """Whether the checked output is another at the queries that count; None where the variant leaves no key to nearly
    all of them, or the output is not finite there, of which other checks speak."""
    assert wanted is not None
    whole = s.counted()
    counted = whole & (wanted != 0).any(dim=-1)
    found, wanted = s.out[counted], wanted[counted]
    if 8 * int(counted.sum()) < int(whole.sum()) or not torch.isfinite(found).all():
        return None
    return bool((found - wanted).abs().max() > NEAR * (1 + float(wanted.abs().max()))) if found.numel() else None


@needs("every_length")
def is_no_known_slip(subject: Subject) -> None:
    """The output is not that of a variant of the definition that is known as a mistake

    Take the line of the formula that the reason names, compute it on two positions by hand, and compare.
    """
    settings = list(_settings(subject))
    found = named(settings) if settings else None
    if found is not None:
        name, cause = found
        worst = max(float((s.out - s.expected)[s.counted()].abs().max()) for s in settings)
        of = subject.reference.text if subject.reference is not None else "its definition"
        raise Failed(f"the output equals that of {of} {name} (and is off by {worst:.2g}); {cause}")


def _settings(subject: Subject) -> Iterator[Setting]:
    """Calls with and without padding and causality, for kinds that take queries, keys and values."""
    if not subject.defined:
        return
    for where, core in subject.cores():
        causal = where == "causal"
        told = subject.oracle(core)
        if told is None:
            continue
        for valid in (None, padding(LENGTH).flip(0)):  # the first example has padding
            inputs = draw(core, LENGTH, Mask(valid))
            tensors = live(inputs)
            if len(tensors) != 3 or tuple(core.uses(Mask(valid))) != ("q", "k", "v"):
                return
            out = core(*inputs, mask=Mask(valid)).detach()
            raw, offsets = _raw(subject, told, causal)
            dense = _on(told, inputs)
            q, k, v = (x.detach() for x in tensors)
            yield Setting(q, k, v, valid, causal, dense, raw, offsets, out)


def _on(told: Any, inputs: list[Any]) -> Dense:
    """The definition as a function of q, k, v and valid."""

    def dense(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        out: Tensor = told.dense(*(q, k, v, *inputs[3:]), mask=Mask(valid)).detach()
        return out

    return dense


def _raw(subject: Subject, told: Any, causal: bool) -> tuple[Tensor | None, Tensor | None]:
    """`raw` and `offsets` of a setting."""
    free = subject.oracle(subject.core()) if causal else told
    seen = _pattern(free, LENGTH)
    if seen is None:
        return None, None
    heads = told.context.heads
    raw = seen.expand(1, heads, LENGTH, LENGTH)[0]
    triangle = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(0 if causal else LENGTH)
    own = _pattern(told, LENGTH)
    if own is None or not torch.equal(own.expand(1, heads, LENGTH, LENGTH)[0], raw & triangle):
        return None, None
    far = _pattern(free, 2 * FAR + 1)
    if far is None:
        return raw, None
    offsets = far.expand(1, heads, -1, -1)[0, :, FAR].flip(-1)  # of key FAR - gap
    gap = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    return raw, offsets if torch.equal(offsets[:, gap + FAR], raw) else None


def _pattern(core: Any, n: int) -> Tensor | None:
    if type(core).pattern is AttentionCore.pattern:
        return None
    seen: Tensor = core.pattern(n, Mask())
    return seen
