"""What the sparse methods share: the largest entries of many tensors, straight-through masks, hard-concrete gates, packed bits, sparse changes.

Entries of many tensors are numbered through, site after site and weight before bias, so that one selection can span the whole network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from effzoo.errors import IncompatibleError, OptionError
from effzoo.sites import PeftModule, Site

NETWORK = ("embed.*", "latents", "attn.*", "mlp.*", "cross.*", "final.*")  # everything but the heads, which every adapter trains whole
MATRICES = ("attn.*", "mlp.*", "cross.*")  # of these the matrices are pruned: embeddings, norms and biases stay
KEY_BIAS = "softmax does not change when one number is added to all scores of a query, so key biases have none"

Spans = Mapping[str, tuple[int, int]]  # of the parameters of a site: number of the first entry, how many


def check_share(method: str, name: str, value: float) -> float:
    """A share in (0, 1]."""
    if not 0 < value <= 1:
        raise OptionError(f"{method}: {name} is a share in (0, 1], got {value}; {name}=0.1 means one entry in ten")
    return value


def check_choice(method: str, name: str, value: str, choices: Sequence[str]) -> str:
    """One of the choices."""
    if value not in choices:
        raise OptionError(f"{method}: {name} is one of {', '.join(choices)}, got {value!r}")
    return value


def count(share: float, total: int) -> int:
    """How many entries a share is: rounded, at least one."""
    return max(1, round(share * total))


def top_mask(scores: Tensor, k: int) -> Tensor:
    """Which are the k largest scores, as a mask of their shape; of equal scores the first count, so that there are exactly k."""
    flat = scores.detach().flatten()
    if bool(flat.isnan().any()):
        raise IncompatibleError("scores by which entries are chosen hold NaN: the training before has diverged; lower the learning rate")
    threshold = flat.kthvalue(flat.numel() - k + 1).values
    mask = flat > threshold
    mask[(flat == threshold).nonzero().flatten()[: k - int(mask.sum())]] = True
    return mask.view_as(scores)


def top(scores: Sequence[Tensor], k: int) -> Tensor:
    """The numbers int64[k], ascending, of the k largest scores over all tensors."""
    return top_mask(torch.cat([part.detach().flatten() for part in scores]), k).nonzero().flatten()


def top_masks(scores: Sequence[Tensor], share: float, scope: str) -> list[Tensor]:
    """The largest share of each tensor (`tensor`), or of all together (`global`)."""
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
        raise OptionError(f"{method}: begin and end are shares of the training with 0 <= begin <= end <= 1, got {begin} and {end}")
    return begin, end


def drawn_gate(alpha: Tensor, low: float, high: float, temperature: float) -> Tensor:
    """Hard concrete: u ~ U(1e-4, 1 - 1e-4), s = sigma((logit u + alpha) / temperature), z = clip(s (high - low) + low, 0, 1).

    Louizos et al. 2018, arXiv:1712.01312, eq. 10-11.
    """
    u = torch.rand_like(alpha) * (1 - 2e-4) + 1e-4
    return stretched(torch.sigmoid((u.logit() + alpha) / temperature), low, high)


def still_gate(alpha: Tensor, low: float, high: float) -> Tensor:
    """The gate in evaluation: clip(sigma(alpha) (high - low) + low, 0, 1) (Louizos et al. 2018, eq. 13)."""
    return stretched(torch.sigmoid(alpha), low, high)


def stretched(s: Tensor, low: float, high: float) -> Tensor:
    return (s * (high - low) + low).clamp(0, 1)


def open_probability(alpha: Tensor, low: float, high: float, temperature: float) -> Tensor:
    """P(z != 0) = sigma(alpha - temperature log(-low / high)) (Louizos et al. 2018, eq. 12)."""
    return torch.sigmoid(alpha - temperature * math.log(-low / high))


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


def numbered(found: Mapping[str, Site]) -> tuple[dict[str, dict[str, tuple[int, int]]], int]:
    """The numbers of the entries of every site, {path: {parameter: (first, how many)}}, and how many there are in all."""
    spans: dict[str, dict[str, tuple[int, int]]] = {}
    total = 0
    for path, site in found.items():
        spans[path] = {}
        for key, parameter in site.base().items():
            spans[path][key] = (total, parameter.numel())
            total += parameter.numel()
    return spans, total


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values, and not a shape alone (on the meta device, or in a plan)."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


class Selection(nn.Module):
    """Chosen entries of many tensors: their numbers, ascending, and what is added to them. One, shared by all sites; empty until `choose`."""

    indices: Tensor | None
    values: nn.Parameter | None

    def __init__(self, total: int):
        super().__init__()
        self.total = total
        self.register_buffer("indices", None)
        self.register_parameter("values", None)
        self._bounds: dict[tuple[int, int], tuple[int, int]] = {}
        self._of: tuple[Tensor | None, int] = (None, 0)  # the indices, and their version, that the bounds were looked up in

    def choose(self, numbers: Tensor, values: Tensor) -> None:
        """Take these entries; the values become a new parameter."""
        self.indices = numbers.to(torch.int32 if self.total < 2**31 else torch.int64)
        self.values = nn.Parameter(values.detach().clone())

    def bounds(self, first: int, size: int) -> tuple[int, int]:
        """Which of the chosen entries lie in first ... first + size - 1."""
        assert self.indices is not None
        if not has_values(self.indices):  # a model without memory, to be counted: the share of this site, were they drawn at random
            return round(len(self.indices) * first / self.total), round(len(self.indices) * (first + size) / self.total)
        if self._of[0] is not self.indices or self._of[1] != self.indices._version:  # looked up once for every content: it waits for the device
            self._of, self._bounds = (self.indices, self.indices._version), {}
        if (first, size) not in self._bounds:
            ends = torch.tensor([first, first + size], device=self.indices.device, dtype=self.indices.dtype)
            low, high = torch.searchsorted(self.indices, ends).tolist()
            self._bounds[first, size] = (low, high)
        return self._bounds[first, size]

    def added(self, tensor: Tensor, first: int) -> Tensor:
        """The tensor, whose entries are numbered from `first`, with the values added; itself when none is chosen in it."""
        assert self.indices is not None and self.values is not None
        size, flat = tensor.numel(), tensor.reshape(-1)
        if torch._C._functorch.is_batchedtensor(self.indices):  # another adapter for every row: the slices would differ
            local = self.indices.long() - first
            place = torch.where((local >= 0) & (local < size), local, size)
            padded = torch.cat([flat, flat.new_zeros(1)])
            return padded.scatter_add(0, place, self.values.to(flat))[:size].view_as(tensor)
        low, high = self.bounds(first, size)
        if low == high:
            return tensor
        return flat.index_add(0, self.indices[low:high] - first, self.values[low:high].to(flat)).view_as(tensor)


class SparseDelta(PeftModule):
    """theta' = theta + phi, phi the chosen entries that lie in this site; the others are theta, bit by bit.

    Weight decay acts on phi: it pulls towards theta, not towards 0. Subclasses have a dense change before the entries are chosen.
    """

    delta_rank = None

    def __init__(self, chosen: Selection, spans: Spans, owner: bool):
        super().__init__()
        self.chosen, self.spans, self.owner = chosen, dict(spans), owner

    def dense(self, key: str) -> Tensor | None:
        """The change of the weight or bias while nothing is chosen yet."""
        return None

    def weight(self, weight: Tensor) -> Tensor:
        return self._changed(weight, "weight")

    def bias(self, bias: Tensor) -> Tensor:
        return self._changed(bias, "bias")

    def _changed(self, tensor: Tensor, key: str) -> Tensor:
        if self.chosen.indices is not None:
            return self.chosen.added(tensor, self.spans[key][0])
        change = self.dense(key)
        assert change is not None
        return tensor + change.to(tensor)

    def changed(self, weight: Tensor | None, bias: Tensor | None) -> int:
        """How many entries of the site merging may change."""
        if self.chosen.indices is None:
            return sum(size for _, size in self.spans.values())
        ends = [self.chosen.bounds(first, size) for first, size in self.spans.values()]
        return sum(high - low for low, high in ends)

    def packed(self) -> dict[str, Tensor] | None:
        if self.chosen.indices is None or self.chosen.values is None:
            return None
        return {"indices": self.chosen.indices, "values": self.chosen.values} if self.owner else {}

    def unpack(self, tensors: dict[str, Tensor]) -> None:
        if not self.owner:
            return
        indices, values, chosen = tensors["indices"], tensors["values"], self.chosen
        assert chosen.indices is not None and chosen.values is not None
        if indices.ndim != 1 or indices.shape != values.shape or (indices.numel() and (indices.min() < 0 or indices.max() >= chosen.total)):
            raise ValueError(f"expected as many indices below {chosen.total} as values, got {tuple(indices.shape)} and {tuple(values.shape)}")
        if bool((indices[1:] <= indices[:-1]).any()):
            raise ValueError("the indices must ascend")
        if values.shape == chosen.values.shape:  # the same objects, for an optimizer
            chosen.values.data.copy_(values)
            chosen.indices.copy_(indices)
        else:
            chosen.choose(indices.to(chosen.indices.device), values.to(chosen.values))


def in_order(modules: Mapping[str, PeftModule]) -> dict[str, SparseDelta]:
    """The modules by path, in the order of the numbers of their entries."""
    sparse = {path: module for path, module in modules.items() if isinstance(module, SparseDelta)}
    return dict(sorted(sparse.items(), key=lambda item: min(first for first, _ in item[1].spans.values())))


def selection_of(modules: Mapping[str, PeftModule]) -> Selection:
    """The one selection that the modules of an adapter share."""
    module = next(iter(modules.values()))
    assert isinstance(module, SparseDelta)
    return module.chosen
