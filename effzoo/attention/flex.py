"""FlexAttention of torch: a predicate is its `mask_mod`; blocks in which no query sees a key are not computed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from effzoo.attention.part import OneTile, Part, both, capped
from effzoo.attention.tile_map import cached
from effzoo.devices import keeping

if TYPE_CHECKING:
    from effzoo.attention.core import Mask
    from effzoo.attention.predicate import PredicateAttention


@dataclass(frozen=True, eq=False)
class BlockMasked(OneTile):
    """One tile under a block mask of torch. counts: how often a query sees a key, where that is not once."""

    blocks: Any = None
    counts: Callable[..., Tensor] | None = None


def block_masked(core: PredicateAttention, q: Tensor, k: Tensor, mask: Mask, length: Tensor | None) -> BlockMasked:
    """The predicate of a kind with padding and global tokens; length [batch]: of the examples, None without padding."""
    size = q.shape[2], k.shape[2]
    if mask.valid is not None or core.is_global(mask, size[1]) is not None:
        of_mask: BlockMasked = mask.memo(("flex", core.key, size), lambda: _made(core, q, k, mask, length))
        return of_mask
    if isinstance(q, FakeTensor):
        return _made(core, q, k, mask, None)
    of_size: BlockMasked = cached(("flex", core.key, size, str(q.device)), lambda: _made(core, q, k, mask, None))
    return of_size


def _made(core: PredicateAttention, q: Tensor, k: Tensor, mask: Mask, length: Tensor | None) -> BlockMasked:
    from torch.nn.attention.flex_attention import create_block_mask  # takes a while to import

    valid, is_global = mask.valid, core.is_global(mask, k.shape[2])
    if is_global is not None:
        is_global = is_global.expand(q.shape[0], -1)
    places, no = torch.tensor(k.shape[2], device=q.device), torch.zeros((), dtype=torch.bool, device=q.device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        facts = {
            "head": head, "places": places, "length": places if length is None else length[batch],
            "query_global": no if is_global is None else is_global[batch, query],
            "key_global": no if is_global is None else is_global[batch, key],
        }  # fmt: skip
        seen = core.evaluate(query, key, facts.__getitem__)
        return seen if valid is None else both(seen, valid[batch, key])

    counts = False
    if not (isinstance(q, FakeTensor) or torch.compiler.is_compiling()):
        with keeping(), torch.inference_mode(False):
            counts = visible(*torch.zeros(4, dtype=torch.long, device=q.device)).dtype != torch.bool
    batch = None if valid is None and is_global is None else q.shape[0]
    heads = q.shape[1] if "head" in core.reads else None

    def seen_at_all(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(batch, head, query, key) != 0

    blocks = create_block_mask(
        seen_at_all if counts else visible, batch, heads, q.shape[2], k.shape[2], q.device, _compile=q.is_cuda
    )
    return BlockMasked(blocks=blocks, counts=visible if counts else None)


def obstacle(parts: Any) -> str:
    """The reason why it cannot compute these parts; "" if it can."""
    if any(part.tiling is not None and not isinstance(part.tiling, BlockMasked) for part in parts):
        return "it takes kinds that are a predicate, without tiles of their own"
    trained = torch.is_grad_enabled() and any(x.requires_grad for part in parts for x in (part.q, part.k, part.v))
    return (
        "it has no backward pass on the CPU (under torch.no_grad() it runs there)"
        if trained and not parts[0].q.is_cuda
        else ""
    )


def attention(part: Part) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp [g, heads, m, 1] of a part, differentiable by autograd."""
    from torch.nn.attention.flex_attention import AuxRequest

    blocks = part.tiling.blocks if isinstance(part.tiling, BlockMasked) else None
    # it refuses leaves that require gradients, even under no_grad
    q, k, v = (x if torch.is_grad_enabled() else x.detach() for x in (part.q, part.k, part.v))
    out, aux = _run(q.is_cuda)(q, k, v, _scores(part), blocks, part.scale, return_aux=AuxRequest(lse=True))
    return out, aux.lse.unsqueeze(-1)


@functools.cache
def _run(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention import flex_attention

    run: Any = flex_attention.flex_attention
    return torch.compile(run) if compiled else run


def _scores(part: Part) -> Callable[..., Tensor] | None:
    """What becomes of the scores of a part: the cap, and what is added to them: its bias, or below a block mask the
    logarithm of its counts."""
    if isinstance(part.tiling, BlockMasked) and (counts := part.tiling.counts) is not None:
        return lambda x, b, h, q, k: capped(x, part.cap) + counts(b, h, q, k).to(x.dtype).log()
    bias = None if part.bias is None else part.bias.expand(*part.q.shape[:3], part.k.shape[2])
    if bias is None and not part.causal and not part.cap:
        return None

    def score(x: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        x = capped(x, part.cap)
        x = x if bias is None else x + bias[batch, head, query, key]
        return torch.where(key <= query, x, -torch.inf) if part.causal else x

    return score
