"""Attention sinks: a sliding window and the first positions (Xiao et al. 2024, StreamingLLM, arXiv:2309.17453)."""

from __future__ import annotations

import torch
from torch import Tensor

from effzoo.annotations import Count, Whole
from effzoo.attention.band import Window
from effzoo.attention.core import Context, Mask, State, memory_part
from effzoo.attention.part import Part, bias_of
from effzoo.attention.predicate import Columns, PredicateAttention, added, known_size
from effzoo.registry import attention
from effzoo.sites import KeysValues


@attention.register("streaming", "sinks")
class Streaming(PredicateAttention):
    """Token i sees the keys at a distance below `window` and the first `sinks` positions, the attention sinks.

    out_i = sum over j in S_i of p_ij v_j,    p_i = softmax over S_i of q_i . k_j / sqrt(d)

    S_i = {j : |i - j| < window} and {j : j < sinks}; when causal, cut to j <= i. Cost O(n (window + sinks)).

    window: keys on one side, that of the token itself included. A causal token sees `window` keys and the sinks.
    sinks: positions at the beginning that every token sees (the paper: 4); 0 for the window alone.

    A decoder caches window + sinks keys, whatever the length. Positions stay those of the text, so that a step equals
    the forward pass; the paper's decoder counts them in its cache (section 3.2), and so runs beyond the length that the
    positions were trained for.
    """

    paper = (
        "Xiao et al. 2024, Efficient streaming language models with attention sinks (StreamingLLM), arXiv:2309.17453, "
        "section 3.2"
    )
    cost = "n * window"
    shift_invariant = False  # sinks are counted from the front

    def __init__(self, context: Context, *, window: Count = 512, sinks: Whole = 4):
        super().__init__(context)
        self.window, self.sinks = window, sinks

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        return ((query - key).abs() < self.window) | (key < self.sinks)

    def window_of(self, head: int) -> Window:
        return Window(self.window - 1, self.window - 1)

    def columns(self, mask: Mask, n: int, device: torch.device) -> Columns | None:
        if self.sinks == 0:
            return None

        def make() -> Columns:
            sinks = torch.arange(min(self.sinks, n), device=device)[None]
            filled = torch.ones_like(sinks, dtype=torch.bool) if mask.valid is None else mask.valid[:, : sinks.shape[1]]
            query, sink = torch.arange(n, device=device)[:, None], sinks[:, None, None, :]
            outside = query >= sink + self.window
            if not self.context.causal:
                outside = outside | (sink >= query + self.window)
            return Columns(sinks.masked_fill(~filled, n), filled[:, None, None, :] & outside, key)

        key = ("sinks", self.sinks, self.window, self.context.causal, known_size(n))
        made: Columns = mask.memo(key, make)
        return made

    def step(
        self, *projected: Tensor, mask: Mask, past: State | None, memory: KeysValues | None = None
    ) -> tuple[Tensor, State]:
        q, k, v = projected
        if past is None:
            state = self._state(k, v, mask)
            return self(q, k, v, mask=mask, memory=memory), {**state, **self._sinks(state, k, v)}
        near, state = self._near(q, k, v, mask, past)
        state |= self._sinks(past, k, v)
        sinks = torch.arange(state["k_sinks"].shape[2], device=q.device)
        seen = (sinks <= state["position"] - near.k.shape[2])[:, None, None, :]  # the others are near
        if mask.valid is not None:
            seen = seen & mask.valid[:, None, None, : len(sinks)]
        bias = bias_of(seen, q.dtype)
        if mask.scores is not None:
            place = torch.arange(mask.scores.shape[1] // 2 + 1, device=q.device)[None]
            bias = added(bias, mask, place[:, -q.shape[2] :], sinks[None])
        of_sinks = Part(q, state["k_sinks"], state["v_sinks"], bias)
        return self.attend(near, of_sinks if len(sinks) else None, memory_part(q, memory)), state

    def _sinks(self, past: State, k: Tensor, v: Tensor) -> State:
        """Keys and values of the first positions, with those of the new ones that are still among them."""
        have = past["k_sinks"].shape[2] if "k_sinks" in past else 0
        state = {}
        for name, new in (("k_sinks", k), ("v_sinks", v)):
            first = new[:, :, : max(0, self.sinks - have)]
            state[name] = torch.cat([past[name], first], dim=2) if name in past else first
        return state
