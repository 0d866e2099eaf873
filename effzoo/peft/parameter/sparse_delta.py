"""theta' = theta + phi on chosen entries of the whole network: their numbers, their values, and the methods that
choose.

The entries of all tensors are numbered through, site after site and weight before bias, so that one choice can span the
whole network.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from effzoo.peft.parameter.mask_scores import has_values
from effzoo.peft.training_hooks import TrainingHooks
from effzoo.sites import Counted, Packed, PeftModule, Site

Spans = Mapping[str, tuple[int, int]]  # of the parameters of a site: number of the first entry, how many


def numbered(found: Mapping[str, Site]) -> tuple[dict[str, dict[str, tuple[int, int]]], int]:
    """{path: {parameter: (number of its first entry, how many)}} of every site, and how many entries there are."""
    spans: dict[str, dict[str, tuple[int, int]]] = {}
    total = 0
    for path, site in found.items():
        spans[path] = {}
        for key, parameter in site.base().items():
            spans[path][key] = (total, parameter.numel())
            total += parameter.numel()
    return spans, total


class ChosenEntries(nn.Module):
    """Chosen entries of many tensors: their numbers, ascending, and what is added to them; empty until `choose`.

    All sites of an adapter share one.
    """

    indices: Tensor | None
    values: nn.Parameter | None

    def __init__(self, total: int):
        super().__init__()
        self.total = total
        self.register_buffer("indices", None)
        self.register_parameter("values", None)
        self._bounds: dict[tuple[int, int], tuple[int, int]] = {}
        # the indices, and their version, that the bounds were looked up in
        self._of: tuple[Tensor | None, int] = (None, 0)

    def choose(self, numbers: Tensor, values: Tensor) -> None:
        """Take these entries; the values become a new parameter."""
        self.indices = numbers.to(torch.int32 if self.total < 2**31 else torch.int64)
        self.values = nn.Parameter(values.detach().clone())

    def bounds(self, first: int, size: int) -> tuple[int, int]:
        """Which of the chosen entries lie in first ... first + size - 1."""
        assert self.indices is not None
        # a model without memory, to be counted: the share of this site, were they drawn at random
        if not has_values(self.indices):
            return round(len(self.indices) * first / self.total), round(len(self.indices) * (first + size) / self.total)
        # looked up once for every content: it waits for the device
        if self._of[0] is not self.indices or self._of[1] != self.indices._version:
            self._of, self._bounds = (self.indices, self.indices._version), {}
        if (first, size) not in self._bounds:
            ends = torch.tensor([first, first + size], device=self.indices.device, dtype=self.indices.dtype)
            low, high = torch.searchsorted(self.indices, ends).tolist()
            self._bounds[first, size] = (low, high)
        return self._bounds[first, size]

    def added(self, tensor: Tensor, first: int) -> Tensor:
        """The tensor, whose entries are numbered from `first`, with the values added; itself where none is chosen."""
        assert self.indices is not None and self.values is not None
        size, flat = tensor.numel(), tensor.reshape(-1)
        if torch._C._functorch.is_batchedtensor(self.indices):  # adapters differ by example, and so would the slices
            local = self.indices.long() - first
            place = torch.where((local >= 0) & (local < size), local, size)
            padded = torch.cat([flat, flat.new_zeros(1)])
            return padded.scatter_add(0, place, self.values.to(flat))[:size].view_as(tensor)
        low, high = self.bounds(first, size)
        if low == high:
            return tensor
        return flat.index_add(0, self.indices[low:high] - first, self.values[low:high].to(flat)).view_as(tensor)


class SparseDelta(Packed, Counted, PeftModule):
    """theta' = theta + phi, phi the chosen entries that lie in this site; the others are theta, bit by bit.

    Weight decay acts on phi: it pulls towards theta, not towards 0. Subclasses have a dense change before the entries
    are chosen.
    """

    delta_rank = None

    def __init__(self, entries: ChosenEntries, spans: Spans, owner: bool):
        super().__init__()
        self.chosen, self.spans, self.owner = entries, dict(spans), owner

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
        if (
            indices.ndim != 1
            or indices.shape != values.shape
            or (indices.numel() and (indices.min() < 0 or indices.max() >= chosen.total))
        ):
            raise ValueError(
                f"expected as many indices below {chosen.total} as values, got {tuple(indices.shape)} "
                f"and {tuple(values.shape)}"
            )
        if bool((indices[1:] <= indices[:-1]).any()):
            raise ValueError("the indices must ascend")
        if values.shape == chosen.values.shape:  # the same objects, for an optimizer
            chosen.values.data.copy_(values)
            chosen.indices.copy_(indices)
        else:
            chosen.choose(indices.to(chosen.indices.device), values.to(chosen.values))


def in_order(modules: Mapping[str, PeftModule]) -> dict[str, SparseDelta]:
    """The modules by path, in the order in which their entries are numbered."""
    sparse = {path: module for path, module in modules.items() if isinstance(module, SparseDelta)}
    return dict(sorted(sparse.items(), key=lambda item: min(first for first, _ in item[1].spans.values())))


def shared_entries(modules: Mapping[str, PeftModule]) -> ChosenEntries:
    """The chosen entries that the modules of an adapter share."""
    module = next(iter(modules.values()))
    assert isinstance(module, SparseDelta)
    return module.chosen


class SparseMethod(TrainingHooks):
    """A method whose modules share their chosen entries; sites without parameters have nothing to choose."""

    def prepare(self, model: nn.Module, found: Mapping[str, Site]) -> None:
        spans, total = numbered(found)
        self.spans = {id(found[path]): own for path, own in spans.items() if own}
        self.entries = ChosenEntries(total)

    def make(self, site: Site) -> SparseDelta | None:
        spans = self.spans.get(id(site))
        return None if spans is None else self.sparse(site, spans, owner=id(site) == next(iter(self.spans)))

    def sparse(self, site: Site, spans: Spans, owner: bool) -> SparseDelta:
        """The module of one site.

        owner: whether a file keeps the chosen entries there.
        """
        return SparseDelta(self.entries, spans, owner)
