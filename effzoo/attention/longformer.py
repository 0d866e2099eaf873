"""Longformer attention: a sliding window, dilated on some heads, and a few global tokens (Beltagy et al. 2020,
arXiv:2004.05150, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from effzoo.annotations import Count
from effzoo.attention.band import Window
from effzoo.attention.core import QKV, Context, Mask, ProjectionType
from effzoo.attention.predicate import PredicateAttention
from effzoo.devices import table
from effzoo.errors import OptionError
from effzoo.registry import attention


@attention.register("longformer", "sliding_window")
class Longformer(PredicateAttention):
    """Token i sees the tokens |i - j| <= window / 2 and the global tokens; a global token sees all tokens.

    out_i = sum over j in S_i of p_ij v_j,    p_i = softmax over S_i of q_i . k_j / sqrt(d)

    S_i = {j : |i - j| <= dilation window / 2, dilation divides i - j} and {j : j global}   for a token i
    S_i = {every j}, with q_global, k_global and v_global for q, k and v                    for a global token i

    When causal, S_i is cut to j <= i. Cost O(n window + n globals).

    window: even; the whole width, as in HF Longformer (the paper's width is one side of it). One number, or one per
        layer: the paper has smaller windows in lower layers.
    dilation: 1 for none; one number, or one per head (the paper: 2 for two heads of the upper layers).
    global_projections: whether global tokens have projections of their own; None: in encoders. Without them: the
        ablation of section 5, Mistral, ModernBERT.
    max_globals: room for the global tokens of an example under torch.compile and on an accelerator, where they are not
        counted; more are an error there. No limit in eager code on the CPU.

    A decoder caches the last dilation window / 2 keys and the global ones; only tokens of the prompt can be global.
    """

    paper = "Beltagy et al. 2020, Longformer, arXiv:2004.05150, sections 3.1 and 3.2"
    projections: Mapping[str, ProjectionType] = {**QKV, "q_global": "query", "k_global": "key", "v_global": "value"}
    cost = "n * window"

    def __init__(
        self,
        context: Context,
        *,
        window: Count | Sequence[Count] = 512,
        dilation: Count | Sequence[Count] = 1,
        global_projections: bool | None = None,
        max_globals: Count = 16,
    ):
        super().__init__(context)
        windows = [window] * context.layers if isinstance(window, int) else list(window)
        dilations = [dilation] * context.heads if isinstance(dilation, int) else list(dilation)
        if len(windows) != context.layers:
            raise OptionError(
                f"longformer has {len(windows)} windows for {context.layers} layers; give one number, or one per layer"
            )
        if any(w <= 0 or w % 2 for w in windows):
            raise OptionError(
                f"longformer windows are even and positive (the whole width), got {window}; try "
                f"{max(2, 2 * (max(windows) // 2))}"
            )
        if len(dilations) != context.heads or min(dilations) < 1:
            raise OptionError(
                "longformer dilation is 1 (none) or more, one number or one for each of "
                f"{context.heads} heads, got {dilation}"
            )
        if max(dilations) > max(2, context.max_length):
            raise OptionError(
                f"longformer dilation is at most max_length, {context.max_length}, got {dilation}; "
                "beyond it a token sees itself alone"
            )
        self.reach, self.dilations, self.max_globals = windows[context.layer] // 2, tuple(dilations), max_globals
        if global_projections is None:
            global_projections = context.global_tokens and not context.causal
        if not global_projections:
            self.projections = QKV

    def uses(self, mask: Mask) -> tuple[str, ...]:
        return tuple(self.projections if mask.is_global is not None else QKV)

    def visible(self, query: Tensor, key: Tensor, *, head: Tensor, query_global: Tensor, key_global: Tensor) -> Tensor:
        dilation = self.dilations[0] if len(set(self.dilations)) == 1 else table(self.dilations, query.device)[head]
        gap = query - key
        return ((gap.abs() <= self.reach * dilation) & (gap % dilation == 0)) | query_global | key_global

    def window_of(self, head: int) -> Window:
        return Window(self.reach, self.reach, self.dilations[head])

    def of_globals(self, *projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = projected[3:] or projected  # q_global, k_global, v_global, if there are any
        return q, k, v
