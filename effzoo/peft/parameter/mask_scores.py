"""Masks from scores: the largest entries of many tensors, the straight-through gradient, the schedule, packed bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from effzoo.checked import known
from effzoo.devices import at_hand
from effzoo.errors import IncompatibleError, OptionError

# everything but the heads, which every adapter trains whole
NETWORK = ("embed.*", "latents", "attn.*", "mlp.*", "cross.*", "final.*")
MATRICES = ("attn.*", "mlp.*", "cross.*")  # of these the matrices are pruned: embeddings, norms and biases stay


def check_choice(method: str, name: str, value: str, choices: Sequence[str]) -> str:
    """One of the choices."""
    if value not in choices:
        raise OptionError(f"{method}: {name} is one of {', '.join(choices)}, got {value!r}")
    return value


def count(share: float, total: int) -> int:
    """How many entries a share is: rounded, at least one."""
    return max(1, round(share * total))


def top_mask(scores: Tensor, k: int) -> Tensor:
    """The k largest scores as a mask of their shape; of equal scores the first count, so there are exactly k."""
    flat = scores.detach().flatten()
    if not has_values(flat):
        return torch.ones_like(scores, dtype=torch.bool)  # a model without memory: which ones is not known
    diverged = "scores by which entries are chosen hold NaN: the training before has diverged; lower the learning rate"
    if at_hand(flat) and bool(flat.isnan().any()):
        raise IncompatibleError(diverged)
    flat = known(flat, ~flat.isnan().any(), diverged)
    threshold = flat.kthvalue(flat.numel() - k + 1).values
    mask, equal = flat > threshold, flat == threshold
    return (mask | (equal & (equal.cumsum(0) <= k - mask.sum()))).view_as(scores)


def top(scores: Sequence[Tensor], k: int) -> Tensor:
    """The numbers int64[k], ascending, of the k largest scores over all tensors."""
    together = torch.cat([part.detach().flatten() for part in scores])
    return (
        top_mask(together, k).nonzero().flatten() if has_values(together) else torch.arange(k, device=together.device)
    )


def top_masks(scores: Sequence[Tensor], share: float, scope: str) -> list[Tensor]:
    """The largest share of each tensor ("tensor"), or of all together ("global")."""
    if scope == "tensor":
        return [top_mask(part, count(share, part.numel())) for part in scores]
    sizes = [part.numel() for part in scores]
    mask = top_mask(torch.cat([part.detach().flatten() for part in scores]), count(share, sum(sizes)))
    return [flat.view_as(part) for flat, part in zip(torch.split(mask, sizes), scores, strict=True)]


def straight_through(mask: Tensor, scores: Tensor) -> Tensor:
    """The mask, exactly; backward, the identity to the scores (Bengio et al. 2013, arXiv:1308.3432)."""
    return mask.to(scores) + (scores - scores.detach())


def through(progress: float, begin: float, end: float) -> float:
    """The share of [begin, end] that is done."""
    return float(progress >= end) if begin == end else min(1.0, max(0.0, (progress - begin) / (end - begin)))


def cubic(done: float, first: float, last: float) -> float:
    """v_f + (v_i - v_f) (1 - t)^3 (Zhu & Gupta 2017, arXiv:1710.01878, eq. 1)."""
    return last + (first - last) * (1 - done) ** 3


def check_window(method: str, begin: float, end: float) -> tuple[float, float]:
    """0 <= begin <= end <= 1."""
    if not 0 <= begin <= end <= 1:
        raise OptionError(
            f"{method}: begin and end are shares of the training with 0 <= begin <= end <= 1, got {begin} and {end}"
        )
    return begin, end


def pack_bits(mask: Tensor) -> Tensor:
    """A mask as uint8[ceil(n / 8)], the first entry in the lowest bit."""
    flat = nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(dim=1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask of this shape that `pack_bits` packed. ValueError for another number of bits."""
    n = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != (-(-n // 8),):
        raise ValueError(f"{n} bits are {-(-n // 8)} bytes (uint8), got {bits.dtype} of shape {tuple(bits.shape)}")
    flat = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return flat.flatten()[:n].bool().view(*shape)


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values, and not a shape alone (on the meta device, or in a plan)."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)
