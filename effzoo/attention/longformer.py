"""Longformer attention: a sliding window, dilated on some heads, and a few global tokens (Beltagy et al. 2020,
arXiv:2004.05150, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from effzoo.annotations import Count
from effzoo.attention.band import Window
from effzoo.attention.core import QKV, Context, Mask, Side
from effzoo.attention.predicate import PredicateAttention
from effzoo.devices import table
from effzoo.errors import OptionError
from effzoo.registry import attention


@attention.register("longformer", "sliding_window")
class Longformer(PredicateAttention):
    """Token i sees |i - j| <= window / 2 and the global tokens; global tokens see everything, with projections of their
    own.

    Local rows:   softmax over {j : |i - j| <= dilation window / 2, dilation divides i - j} and {j : j global} of q_i .
    k_j / sqrt(d).
    Global rows:  softmax over all j of q_global_i . k_global_j / sqrt(d), applied to v_global.
    With causal attention every set is cut to j <= i. A global key is counted once, with the local projections, for
    local rows.
    Cost O(n window + n globals).

    window: even, positive; the whole width, as in HF Longformer (the paper's and allenai's one-sided width is half
        of it). One number, or one per layer: the paper goes from small windows in low layers to large ones in high
        layers.
    dilation: 1 for none; one number, or one per head (2 on two heads of the upper layers in the paper; give a spec
        per layer for that).
    global_projections: whether global rows have projections of their own (without: section 5's ablation; Mistral,
        ModernBERT); None: in encoders, as decoders mark no token unless asked to, and what no batch reaches would be
        counted and trained for nothing.
    max_globals: room for the global tokens that a batch marks in a sequence, under torch.compile, where shapes must
        be known, and on an accelerator, where to count them would be to wait; more are an error there. In eager code
        on the CPU there is no limit.

    Decoding keeps the last dilation window / 2 keys and the global ones; tokens that follow the prompt cannot be
    global.
    """

    paper = "Beltagy et al. 2020, Longformer, arXiv:2004.05150, sections 3.1 and 3.2"
    projections: Mapping[str, Side] = {**QKV, "q_global": "query", "k_global": "key", "v_global": "value"}
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
        if not (context.global_tokens and not context.causal if global_projections is None else global_projections):
            self.projections = QKV

    def uses(self, mask: Mask) -> tuple[str, ...]:
        return tuple(self.projections if mask.is_global is not None else QKV)

    def visible(self, query: Tensor, key: Tensor, *, head: Tensor, query_global: Tensor, key_global: Tensor) -> Tensor:
        dilation = self.dilations[0] if len(set(self.dilations)) == 1 else table(self.dilations, query.device)[head]
        gap = query - key
        return ((gap.abs() <= self.reach * dilation) & (gap % dilation == 0)) | query_global | key_global

    def sight(self, head: int) -> Window:
        return Window(self.reach, self.reach, self.dilations[head])

    def of_globals(self, *projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = projected[3:] or projected
        return q, k, v
