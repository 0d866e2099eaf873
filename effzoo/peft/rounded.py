"""The same weights in another dtype, or quantised: how a file's base is recognised in it, and what the rounding costs.

Of every floating-point tensor (of a quantised weight the numbers that its codes stand for) a manifest keeps its
precision, the numbers at 64 drawn places, and for each narrower dtype the hash of the tensor rounded to it. A base of
another precision is accepted where it is

    the file's, rounded to a narrower dtype     it has the hash that is kept, which proves every entry
    what the file's was rounded from            rounded or quantised in turn it has the file's hash, which proves it
    another rounding of the same weights        at the 64 places no number is further from the file's than both
                                                roundings may have moved it (codes and a dtype, 4 and 8 bits, ...)

and nothing else is. Weights that were trained, however little, leave the cells of their rounding somewhere.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effzoo.codes import BITS, coded, decoded
from effzoo.errors import AdapterError
from effzoo.peft.fingerprint import (
    Fingerprint,
    content_hash,
    described,
    described_without,
    difference,
    embeddings_left_out,
)
from effzoo.sharding import whole
from effzoo.sites import sites
from effzoo.tensors import is_coded, uncoded

PLACES = 64
NARROWER = {
    torch.float64: (torch.float32, torch.bfloat16, torch.float16),
    torch.float32: (torch.bfloat16, torch.float16),
}
SLACK = 1.01  # of a bound, for what computing it rounds


@dataclass(frozen=True)
class Kept:
    """What a manifest keeps of a tensor.

    precision: "bfloat16", or "4 bits (bfloat16)" with the dtype of the scales.
    shape: of the tensor.
    numbers: float64, at `places` of it.
    margins: how far each number may be from what it was rounded from.
    rounded: {narrower dtype: (the hash of the tensor rounded to it, the norm of what that changes, relative to the
        tensor's)}.
    """

    precision: str
    shape: tuple[int, ...]
    numbers: Tensor
    margins: Tensor
    rounded: dict[str, tuple[str, float]]

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "kind": self.precision,
            "shape": list(self.shape),
            "numbers": _packed(self.numbers),
            "margins": None if _dense(self.precision) else _packed(self.margins),
            "rounded": {name: list(kept) for name, kept in self.rounded.items()},
        }

    @classmethod
    def read(cls, content: Any) -> Kept:
        """From JSON of any origin. Raises KeyError, TypeError, ValueError."""
        precision, shape = content["kind"], tuple(content["shape"])
        if not isinstance(precision, str) or not all(type(size) is int and size >= 0 for size in shape):
            raise TypeError("a kept tensor has a precision and a shape")
        if _dtype(precision) is None or math.prod(shape) >= 2**48:
            raise ValueError(f"{precision!r:.40} of shape {shape!s:.40} is no precision of a tensor")
        numbers = _unpacked(content["numbers"], len(places(shape)))
        margins = (
            _margins(numbers, precision) if content["margins"] is None else _unpacked(content["margins"], len(numbers))
        )
        rounded = {
            name: (str(digest), float(relative)) for name, (digest, relative) in dict(content["rounded"]).items()
        }
        return cls(precision, shape, numbers, margins, rounded)


@dataclass(frozen=True)
class RoundedTensor:
    """One tensor that has another precision than in the file's base.

    tensor: its key.
    theirs, ours: its precisions there and here.
    relative: the norm of the difference by the tensor's; of all entries when they are proved, else an estimate from 64.
    proved: whether every entry is known to be the rounded one.
    """

    tensor: str
    theirs: str
    ours: str
    relative: float
    proved: bool


@dataclass(frozen=True)
class BaseRounding:
    """The difference between the base that an adapter was trained on and this one: tensors of another precision."""

    tensors: tuple[RoundedTensor, ...]

    @property
    def worst(self) -> float:
        """The largest relative difference of a tensor."""
        return max((one.relative for one in self.tensors), default=0.0)

    def __str__(self) -> str:
        if not self.tensors:
            return "the base is the file's, bit by bit"
        width = max(len(one.tensor) for one in self.tensors)
        precisions = max(len(f"{one.theirs} -> {one.ours}") for one in self.tensors)
        proved = sum(one.proved for one in self.tensors)
        count = f"{len(self.tensors)} tensors are rounded, {proved} of them proved in every entry"
        lines = [f"{count}; relative difference at most {self.worst:.2e}"]
        for one in sorted(self.tensors, key=lambda one: -one.relative):
            precision, how = f"{one.theirs} -> {one.ours}", "every entry" if one.proved else f"{PLACES} entries"
            lines.append(f"  {one.tensor:{width}}  {precision:{precisions}}  {one.relative:.2e}  {how}")
        return "\n".join(lines)


@torch.no_grad()
def kept_of(model: nn.Module, without: Collection[str] = ()) -> dict[str, Kept]:
    """What a manifest keeps of a model's base tensors, by key; a quantised weight has the key of a dense one."""
    return {
        key: _kept(key, tensor, precision, margins)
        for key, (tensor, precision, margins) in _floating(model, without).items()
    }


def differing_precision(theirs: Fingerprint, ours: Fingerprint) -> str | None:
    """The first tensor of another precision in the two bases, in words; None where nothing or more differs."""
    if difference(Fingerprint(_facts(theirs), {}), Fingerprint(_facts(ours), {})) is not None:
        return None
    them, us = _precisions(theirs), _precisions(ours)
    if them.keys() - us.keys():
        return None
    return next(
        (f"{key} is {them[key]} in the file's base and {us[key]} here" for key in them if them[key] != us[key]), None
    )


@torch.no_grad()
def compare(theirs: Fingerprint, kept: Mapping[str, Kept], ours: Fingerprint, model: nn.Module) -> BaseRounding:
    """The difference between the base of a file and a model that holds the same weights in another dtype or quantised.

    theirs, kept: of the file.
    ours: the fingerprint of the model, as far as the file speaks of it.

    Raises AdapterError, naming the first tensor or fact, for a base that is no rounding of the same weights.
    """
    if found := difference(Fingerprint(_facts(theirs), _exact(theirs)), Fingerprint(_facts(ours), _exact(ours))):
        raise AdapterError(found)
    base = {key: value for key, value in _floating(model).items() if key in _precisions(ours)}
    for key in [*kept, *(key for key in base if key not in kept)]:
        if key not in base or key not in kept:
            raise AdapterError(f"{key}: there is none {'in this model' if key in kept else 'in the file'}")
    rounded = []
    for key, (tensor, precision, margins) in base.items():
        them = kept[key]
        if them.shape != tuple(tensor.shape):
            raise AdapterError(f"{key}: of shape {list(them.shape)} in the file, {list(tensor.shape)} in this model")
        if them.precision != precision:
            rounded.append(_rounded(key, them, theirs, whole(tensor), precision, margins))
        elif any(theirs.tensors.get(name) != ours.tensors.get(name) for name in _names(key, precision)):
            raise AdapterError(f"{key}: {precision} in the file and in this model, with other values")
    return BaseRounding(tuple(rounded))


def _rounded(
    key: str, them: Kept, theirs: Fingerprint, tensor: Tensor, precision: str, margins: Tensor | None
) -> RoundedTensor:
    if _dense(precision) and precision in them.rounded:  # the file's, rounded to a narrower dtype
        wanted, relative = them.rounded[precision]
        if content_hash(tensor) != wanted:
            raise AdapterError(
                f"{key}: {them.precision} in the file, which rounded to {precision} is not what this model holds"
            )
        return RoundedTensor(key, them.precision, precision, relative, proved=True)
    source = _dtype(them.precision)
    assert source is not None
    # what the file's was rounded from
    if _dense(precision) and _dense(them.precision) and torch.promote_types(tensor.dtype, source) == tensor.dtype:
        back = tensor.to(source)
        if described_without(back, embeddings_left_out(theirs).get(key)) != theirs.tensors.get(key):
            raise AdapterError(
                f"{key}: {them.precision} in the file, which is not what this model holds, rounded from {precision}"
            )
        return RoundedTensor(key, them.precision, precision, _relative(back, tensor), proved=True)
    # what the file's was quantised from
    if _dense(precision) and tensor.dtype == source and (bits := int(them.precision[0])) in BITS:
        codes, scales = coded(tensor, bits)
        if [described(codes), described(scales)] == [theirs.tensors.get(name) for name in _names(key, them.precision)]:
            change = _relative(decoded(codes, scales, tensor.shape, bits), tensor)
            return RoundedTensor(key, them.precision, precision, change, proved=True)
    ours = _kept(key, tensor, precision, margins, further=False)
    gap = (ours.numbers - them.numbers).abs()
    if not bool((gap <= SLACK * (ours.margins + them.margins)).all()):
        raise AdapterError(
            f"{key}: {them.precision} in the file and {precision} in this model, with values that are further "
            "from each other than rounding moves them"
        )
    norm = float(them.numbers.norm())
    return RoundedTensor(key, them.precision, precision, float(gap.norm()) / norm if norm else 0.0, proved=False)


def _floating(model: nn.Module, without: Collection[str] = ()) -> dict[str, tuple[Tensor, str, Tensor | None]]:
    """The floating-point base tensors by key: numbers, precision, and margins unless they follow from the dtype."""
    tensors: dict[str, tuple[Tensor, str, Tensor | None]] = {}
    coded: dict[str, Any] = {path: site for path, site in sites(model) if getattr(site, "bits", None)}
    for path, site in coded.items():
        tensors[f"{path}.weight"] = (site.numbers(), f"{site.bits} bits ({_said(site.scales.dtype)})", site.margins())
    for key, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        path, _, name = key.rpartition(".")
        if tensor.is_floating_point() and ".adapters." not in f".{key}" and not (path in coded and name == "scales"):
            tensors[key] = (tensor.detach(), _said(tensor.dtype), None)
    return {key: value for key, value in tensors.items() if key not in without}


def _kept(key: str, tensor: Tensor, precision: str, margins: Tensor | None, further: bool = True) -> Kept:
    at = places(tuple(tensor.shape)).to(tensor.device)
    tensor = whole(tensor)
    further = further and not is_coded(tensor)
    tensor = uncoded(tensor)
    numbers = tensor.flatten()[at].double().cpu()
    at_places = _margins(numbers, precision) if margins is None else margins.flatten()[at].double().cpu()
    rounded = {}
    for dtype in NARROWER.get(tensor.dtype, ()) if _dense(precision) and further else ():
        back = tensor.to(dtype)
        if math.isfinite(relative := _relative(back, tensor)):
            rounded[_said(dtype)] = (content_hash(back), relative)
    return Kept(precision, tuple(tensor.shape), numbers, at_places, rounded)


def places(shape: tuple[int, ...]) -> Tensor:
    """The numbers of the entries that are kept of a tensor of this shape: all of a small one, else drawn ones."""
    size = math.prod(shape)
    if size <= PLACES:
        return torch.arange(size, device="cpu")
    return torch.randint(size, (PLACES,), generator=torch.Generator().manual_seed(size % 2**32), device="cpu")


def _margins(numbers: Tensor, precision: str) -> Tensor:
    """How far numbers may be from what was rounded to their dtype: half a unit in the last place."""
    dtype = _dtype(precision)
    assert dtype is not None
    info = torch.finfo(dtype)
    return numbers.abs() * (info.eps / 2) + info.tiny * info.eps


def _relative(back: Tensor, tensor: Tensor) -> float:
    exact = tensor.double()
    norm = float(exact.norm())
    return float((back.double() - exact).norm()) / norm if norm else 0.0


def _dense(precision: str) -> bool:
    return " " not in precision


def _dtype(precision: str) -> torch.dtype | None:
    """The floating-point dtype of a precision, or of its scales."""
    dtype = getattr(torch, precision.rpartition("(")[2].removesuffix(")"), None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(key: str, precision: str) -> tuple[str, ...]:
    """The keys under which a fingerprint knows a tensor of some precision."""
    path = key.removesuffix("weight")
    return (key,) if _dense(precision) else (f"{path}codes", f"{path}scales")


def _precisions(of: Fingerprint) -> dict[str, str]:
    """The precisions of the floating-point tensors of a fingerprint, by the key of the dense tensor."""
    precisions = {}
    for key, value in of.tensors.items():
        name, path = value.partition("[")[0], key.rpartition(".")[0]
        codes = of.tensors.get(f"{path}.codes") if key.endswith(".scales") else None
        if codes is not None:
            precisions[f"{path}.weight"] = f"{8 if codes.startswith('int8') else 4} bits ({name})"
        elif _dtype(name) is not None:
            precisions[key] = name
    return precisions


def _exact(of: Fingerprint) -> dict[str, str]:
    """The tensors of a fingerprint that cannot be rounded."""
    return {
        key: value
        for key, value in of.tensors.items()
        if _dtype(value.partition("[")[0]) is None
        and not (key.endswith(".codes") and f"{key.removesuffix('codes')}scales" in of.tensors)
    }


def _facts(of: Fingerprint) -> dict[str, Any]:
    """The facts, where a quantised layer counts as a Linear."""
    return {name: "Linear" if value == "QuantisedLinear" else value for name, value in of.facts.items()}


def _packed(numbers: Tensor) -> str:
    return base64.b64encode(numbers.contiguous().numpy().astype("<f8").tobytes()).decode()


def _unpacked(text: Any, count: int) -> Tensor:
    content = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    if len(content) != 8 * count:
        raise ValueError(f"{count} kept numbers have {8 * count} bytes, got {len(content)}")
    numbers = torch.empty(0, dtype=torch.float64)
    if count:
        numbers = torch.frombuffer(bytearray(content), dtype=torch.float64)
    if not bool(numbers.isfinite().all()):
        raise ValueError("a kept number is not finite")
    return numbers
