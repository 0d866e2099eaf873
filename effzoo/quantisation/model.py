"""Quantising a model: which of its sites, and what that saves and costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from effzoo.codes import check_bits
from effzoo.errors import IncompatibleError, TargetError, did_you_mean, listing
from effzoo.peft.attach import roles
from effzoo.peft.merging import check_nothing_merged
from effzoo.peft.state import transition
from effzoo.quantisation.linear import QuantisedLinear
from effzoo.sites import Linear, sites, unwrap


@dataclass(frozen=True)
class Footprint:
    """What quantising gave.

    bits: of a code.
    matrices: how many.
    before, after: bytes of the whole model, parameters and buffers.
    dense, codes: bytes of these matrices alone, as they were and as they are, scales included.
    error: the largest ||W - Q|| / ||W|| of a matrix.
    """

    bits: int
    matrices: int
    before: int
    after: int
    dense: int
    codes: int
    error: float

    def __str__(self) -> str:
        return (
            f"{self.matrices} matrices in {self.bits} bits\n"
            f"  matrices  {self.codes:,} bytes instead of {self.dense:,} ({self.dense / self.codes:.2f} times less)\n"
            f"  model     {self.after:,} bytes instead of {self.before:,}\n"
            f"  error     at most {self.error:.2%} of a matrix's norm"
        )


@torch.no_grad()
def quantise(model: nn.Module, bits: int = 8, *, targets: Sequence[str] | str | None = None) -> Footprint:
    """Store the weights of linear sites as codes of 8 or 4 bits, in place (QLoRA's base).

    bits: 8, integers with a scale per output; 4, NormalFloat with a scale per 64 entries
        (`effzoo/codes.py`).
    targets: patterns of roles; None for every projection and feed-forward matrix of the blocks. Embeddings, norms,
        biases, the head and what belongs to an attention kind itself (Linformer's E and F) stay as they are, and so
        does what is attached.

    Adapters train on top, and gradients flow through. What is quantised cannot be trained or merged into any more;
    `dequantise` gives dense weights back, those of the codes. Codes and scales are in the state dict in place of the
    weight, so an adapter that was trained on this base loads on this base alone.

    This saves memory, not time: each product first makes its weight (on one CPU core, 768 wide, forward and backward
    take 6 % longer with 8 bits and 17 % with 4 at 512 positions, 1 % and 4 % at 2,048), and what is computed is as wide
    as before. Until all is done the dense weights are kept as well.

    Raises OptionError (bits), TargetError for targets that match no linear site, IncompatibleError when everything is
    quantised already, AdapterError where an adapter is merged that could not be taken out again; the model is then
    unchanged.
    """
    check_bits(bits)
    model = unwrap(model)
    dense = _dense(model, (targets,) if isinstance(targets, str) else targets)
    check_nothing_merged(model, "quantising", lambda path: path in dense)
    before, matrices, error = size(model), sum(_bytes(site.weight) for site in dense.values()), 0.0
    codes = 0
    with transition(model):
        for site in dense.values():
            weight = site.weight.detach()
            quantised = QuantisedLinear.made_of(site, bits)
            norm = weight.double().norm().item()
            error = max(error, (weight.double() - quantised.numbers().double()).norm().item() / norm if norm else 0.0)
            codes += _bytes(quantised.codes) + _bytes(quantised.scales)
    return Footprint(bits, len(dense), before, size(model), matrices, codes, error)


def weight_by_weight(model: nn.Module, bits: int) -> Callable[[str], None]:
    """What `quantise` does, one weight at a time: to be called with the key of each tensor once it holds its numbers.

    So a model whose weights are read one after the other is never dense as a whole. Raises as `quantise` does.
    """
    check_bits(bits)
    dense = _dense(model, None)

    def code(key: str) -> None:
        path, _, name = key.rpartition(".")
        if name == "weight" and path in dense:
            QuantisedLinear.made_of(dense.pop(path), bits)

    return code


def _dense(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, Linear]:
    """The linear sites whose weights are to be quantised, by path; None for those of the blocks."""
    linear = {path: site for path, site in sites(model) if isinstance(site, Linear) and ".core." not in f".{path}."}
    for pattern in patterns or ():
        if not any(fnmatchcase(site.role, pattern) for site in linear.values()):
            known = {role for role in roles(model) if any(site.role == role for site in linear.values())}
            raise TargetError(
                f"quantise: target {pattern!r} matches no linear site{did_you_mean(pattern, known)} "
                f"Roles: {listing(sorted(known))}."
            )
    if patterns is None:
        wanted = {path: site for path, site in linear.items() if site.layer is not None}
    else:
        wanted = {path: site for path, site in linear.items() if any(fnmatchcase(site.role, p) for p in patterns)}
    dense = {path: site for path, site in wanted.items() if not isinstance(site, QuantisedLinear)}
    if not dense:
        reason = "has no linear sites in blocks" if not wanted else f"is quantised already ({len(wanted)} matrices)"
        raise IncompatibleError(f"{type(model).__name__} {reason}; nothing was changed")
    return dense


@torch.no_grad()
def dequantise(model: nn.Module) -> int:
    """Give every quantised site a dense, frozen weight again, that of its codes, in place; how many there were.

    The outputs stay; the weights from before `quantise` are not known any more.
    """
    quantised = [site for _, site in sites(model) if isinstance(site, QuantisedLinear)]
    with transition(model):
        for site in quantised:
            site.dense()
    return len(quantised)


def size(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of a model; what is shared counts once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
