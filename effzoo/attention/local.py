"""Local attention in chunks: every query sees its own chunk and its neighbours (Kitaev et al. 2020, Reformer; as in
Trax and HF Reformer)."""

from __future__ import annotations

from torch import Tensor

from effzoo.annotations import Count, Whole
from effzoo.attention.band import Window
from effzoo.attention.core import Context, Mask, State
from effzoo.attention.predicate import PredicateAttention
from effzoo.errors import IncompatibleError
from effzoo.registry import attention
from effzoo.sites import KeysValues


@attention.register("local", "chunked")
class Local(PredicateAttention):
    """A query sees the keys of its own chunk, of look_back chunks before it and of look_forward chunks after it.

    out_i = sum over j in S_i of p_ij v_j,    p_i = softmax over S_i of q_i . k_j / sqrt(d)

    S_i = {j : -look_forward <= i // chunk - j // chunk <= look_back}

    When causal, S_i is cut to j <= i. Cost O(n chunk). Reformer alternates these layers with `lsh` (a spec per layer).

    chunk: positions of a chunk.
    look_back: chunks before its own that a query sees.
    look_forward: chunks after its own that a query sees.
    circular: the first chunks also see the last ones, and the last the first, as in HF and Trax; for equality with
        these alone, as it lets padding matter.

    A decoder caches at most (look_back + 1) chunk keys.
    """

    paper = (
        "Kitaev et al. 2020, Reformer: the efficient transformer, arXiv:2001.04451; local layers of its released "
        "code (Trax)"
    )
    cost = "n * chunk"

    def __init__(
        self,
        context: Context,
        *,
        chunk: Count = 64,
        look_back: Whole = 1,
        look_forward: Whole = 0,
        circular: bool = False,
    ):
        super().__init__(context)
        self.chunk, self.before, self.after, self.circular = chunk, look_back, look_forward, circular

    def visible(self, query: Tensor, key: Tensor, *, places: Tensor) -> Tensor:
        gap = query // self.chunk - key // self.chunk
        if not self.circular:
            return (gap <= self.before) & (gap >= -self.after)
        chunks = (places + self.chunk - 1) // self.chunk
        return (gap % chunks <= self.before) | (-gap % chunks <= self.after)

    def step(
        self, *projected: Tensor, mask: Mask, past: State | None, memory: KeysValues | None = None
    ) -> tuple[Tensor, State]:
        if self.circular and self.after:
            raise IncompatibleError(
                "local: a ring with look_forward shows the last chunks the first ones, and which chunks are last "
                "changes with every token; "
                "decode with circular=false, or without a cache (use_cache=False)"
            )
        return super().step(*projected, mask=mask, past=past, memory=memory)

    def window_of(self, head: int) -> Window | None:
        hidden = self.context.causal and not self.after  # looking back alone, the causal triangle hides the ring
        return Window(self.before, self.after, chunk=self.chunk) if hidden or not self.circular else None
