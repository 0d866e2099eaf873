"""What the parts of a transformer layer cost: by formula, counted, and in time (Vaswani et al. 2017, arXiv:1706.03762,
table 1).

For a sequence of n positions, d = dim and d_h hidden units of the feed-forward, with a multiplication and an addition
as two operations:

    projections     q, k, v and output       8 n d^2
    attention       Q K^T and P V            4 n^2 d
    feed-forward    up and down              4 n d d_h
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effzoo.attention import Context, Mask
from effzoo.blocks.block import Block, Slots
from effzoo.errors import IncompatibleError, OptionError
from effzoo.measure.timing import interleaved
from effzoo.spec import parse_one

PROJECTIONS, ATTENTION, FEED_FORWARD = PARTS = ("projections", "attention", "feed-forward")
WHOLE = "whole layer"


def operations(n: int, dim: int, mlp: int | None = None, *, batch: int = 1) -> dict[str, int]:
    """Operations of each part in one forward pass, by the formulas above.

    Norms, activations, softmax, biases and residual sums are O(n d) and O(n^2), and left out.

    mlp: d_h; None is 4 dim.

    Raises OptionError for sizes below 1.
    """
    mlp = 4 * dim if mlp is None else mlp
    if min(n, dim, mlp, batch) < 1:
        raise OptionError(f"sizes are at least 1, got n={n}, dim={dim}, mlp={mlp}, batch={batch}")
    return {
        PROJECTIONS: batch * 8 * n * dim**2,
        ATTENTION: batch * 4 * n**2 * dim,
        FEED_FORWARD: batch * 4 * n * dim * mlp,
    }


def shares(parts: Mapping[str, float]) -> dict[str, float]:
    """Each part over the sum of the three parts."""
    total = sum(parts[name] for name in PARTS)
    return {name: parts[name] / total for name in PARTS}


def layer(
    dim: int, heads: int, mlp: int | None = None, *, attention: str = "full", longest: int = 512, backend: str = "auto"
) -> Block:
    """A block of the library in evaluation, with fresh weights.

    mlp: d_h; None is 4 dim.

    Raises OptionError where heads do not divide dim.
    """
    if min(dim, heads) < 1 or dim % heads:
        raise OptionError(f"heads divide dim, and both are at least 1; got dim={dim} and heads={heads}")
    slots = Slots(dim=dim, mlp=4 * dim if mlp is None else mlp)
    return Block(
        slots, parse_one(attention), Context(heads=heads, head_dim=dim // heads, max_length=longest, backend=backend)
    ).eval()


@torch.no_grad()
def counted(block: Block, x: Tensor) -> dict[str, int]:
    """Operations of each part for x [batch, n, dim], as torch counts the matrix products that the block really runs.

    The counter does not know the fused attention kernel of the CPU: build the block with backend="reference", or on the
    device "meta", where nothing is computed.

    Raises IncompatibleError where it counted no attention.
    """
    # takes a twentieth of the time that torch itself takes to import
    from torch.utils.flop_counter import FlopCounterMode

    projections: list[nn.Module] = [getattr(block.attn, name) for name in (*block.attn.core.projections, "o")]
    seen: dict[nn.Module, int] = {}
    with FlopCounterMode(display=False) as counter:

        def enter(module: nn.Module, *_: Any) -> None:
            seen[module] = -counter.get_total_flops()

        def leave(module: nn.Module, *_: Any) -> None:
            seen[module] += counter.get_total_flops()

        hooks = [module.register_forward_pre_hook(enter) for module in (*projections, block.mlp)]
        hooks += [module.register_forward_hook(leave) for module in (*projections, block.mlp)]
        try:
            block(x, Mask())
        finally:
            for hook in hooks:
                hook.remove()
    counts = {PROJECTIONS: sum(seen[module] for module in projections), FEED_FORWARD: seen[block.mlp]}
    rest = counter.get_total_flops() - sum(counts.values())
    if not rest:
        raise IncompatibleError(
            "torch counts no operations of the fused attention kernel; build the block with backend='reference'"
        )
    return {PROJECTIONS: counts[PROJECTIONS], ATTENTION: rest, FEED_FORWARD: counts[FEED_FORWARD]}


def seconds(block: Block, x: Tensor, *, rounds: int = 101, limit: float = 2.0) -> dict[str, float]:
    """Seconds of each part and of the whole layer in a forward pass without gradients, medians over rounds in turns.

    Attention is the core between its projections: Q K^T, softmax and P V.

    x: [batch, n, dim].
    limit: seconds after which no further round is begun, from the third on.
    """
    attention, mask, o = block.attn, Mask(), block.attn.o
    assert o is not None
    names = attention.core.projections
    with torch.no_grad():
        projected = [attention.project(name, x, mask) for name in names]

        def projections() -> object:
            return [getattr(attention, name)(x) for name in names], o(x)

        cases = {
            PROJECTIONS: projections,
            ATTENTION: lambda: attention.core(*projected, mask=mask),
            FEED_FORWARD: lambda: block.mlp(x),
            WHOLE: lambda: block(x, mask),
        }
        return {name: times.median for name, times in interleaved(cases, rounds=rounds, seconds=limit).items()}
