"""The same weights in another dtype, or quantised: what a file keeps of its base to tell, and what the rounding costs.

Of every floating-point tensor (of a quantised weight the numbers that its codes stand for) a manifest keeps its kind,
the numbers at 64 drawn places, and for each narrower dtype the hash of the tensor rounded to it. So a base of another
kind is

    the file's, rounded to a narrower dtype    when it has the hash that is kept                           every entry
    is proved what the file's was rounded from           when it has the file's hash, or codes, rounded in turn
    every entry is proved another rounding of the same weights       when at the places kept no number is further from
    the       64 entries of each tensor (codes and a dtype, 4 and 8 bits, ...)     file's than both may have been moved
    by their rounding

and nothing else is accepted. Weights that were trained on, however little, leave the cells of their rounding somewhere.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effzoo.errors import AdapterError
from effzoo.peft.fingerprint import (
    Fingerprint,
    content_hash,
    described,
    described_without,
    difference,
    embeddings_left_out,
)
from effzoo.sites import sites

PLACES = 64
NARROWER = {
    torch.float64: (torch.float32, torch.bfloat16, torch.float16),
    torch.float32: (torch.bfloat16, torch.float16),
}
SLACK = 1.01  # of a bound, for what computing it rounds
CODERS: dict[int, tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Callable[[Tensor, Tensor, torch.Size], Tensor]]] = {}
"""bits -> (weight -> codes and scales, codes and scales and shape -> weight); `effzoo.quantise` puts its own here."""


@dataclass(frozen=True)
class Kept:
    """What a manifest keeps of a tensor.

    kind: "bfloat16", or "4 bits (bfloat16)" with the dtype of the scales.
    shape: of the tensor.
    numbers, margins: float64, at `places` of it: the numbers, and how far each may be from what it was rounded from.
    rounded: narrower dtype -> the hash of the tensor rounded to it, and the norm of what that changes, in parts of
        the tensor's.
    """

    kind: str
    shape: tuple[int, ...]
    numbers: Tensor
    margins: Tensor
    rounded: dict[str, tuple[str, float]]

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "numbers": _packed(self.numbers),
            "margins": None if _dense(self.kind) else _packed(self.margins),
            "rounded": {name: list(found) for name, found in self.rounded.items()},
        }

    @classmethod
    def read(cls, content: Any) -> Kept:
        """From JSON of any origin. Raises KeyError, TypeError, ValueError."""
        kind, shape = content["kind"], tuple(content["shape"])
        if not isinstance(kind, str) or not all(type(size) is int and size >= 0 for size in shape):
            raise TypeError("a kept tensor has a kind and a shape")
        if _dtype(kind) is None or math.prod(shape) >= 2**48:
            raise ValueError(f"{kind!r:.40} of shape {shape!s:.40} is no kind of tensor")
        numbers = _unpacked(content["numbers"], len(places(shape)))
        margins = _margins(numbers, kind) if content["margins"] is None else _unpacked(content["margins"], len(numbers))
        rounded = {
            name: (str(digest), float(relative)) for name, (digest, relative) in dict(content["rounded"]).items()
        }
        return cls(kind, shape, numbers, margins, rounded)


@dataclass(frozen=True)
class RoundedTensor:
    """One tensor that is held in another way than in the file's base.

    theirs, ours: its kinds there and here.
    relative: the norm of the difference, in parts of the tensor's; of all entries when they are proved, else an
        estimate from 64 of them.
    proved: whether every entry is known to be the rounded one.
    """

    tensor: str
    theirs: str
    ours: str
    relative: float
    proved: bool


@dataclass(frozen=True)
class BaseRounding:
    """What lies between the base that an adapter was trained on and this one: the tensors that are held in another
    way."""

    rows: tuple[RoundedTensor, ...]

    @property
    def worst(self) -> float:
        """The largest relative difference of a tensor."""
        return max((row.relative for row in self.rows), default=0.0)

    def __str__(self) -> str:
        if not self.rows:
            return "the base is the file's, bit by bit"
        width = max(len(row.tensor) for row in self.rows)
        kinds = max(len(f"{row.theirs} -> {row.ours}") for row in self.rows)
        proved = sum(row.proved for row in self.rows)
        lines = [
            f"{len(self.rows)} tensors are rounded, {proved} of them proved in every entry; relative difference "
            f"at most {self.worst:.2e}"
        ]
        for row in sorted(self.rows, key=lambda row: -row.relative):
            how = "every entry" if row.proved else f"{PLACES} entries"
            lines.append(f"  {row.tensor:{width}}  {f'{row.theirs} -> {row.ours}':{kinds}}  {row.relative:.2e}  {how}")
        return "\n".join(lines)


@torch.no_grad()
def kept_of(model: nn.Module, without: Collection[str] = ()) -> dict[str, Kept]:
    """What a manifest keeps of the base tensors of a model, by key; a quantised weight under the key that it has as a
    dense one."""
    return {key: _kept(key, tensor, kind, margins) for key, (tensor, kind, margins) in _held(model, without).items()}


def differing_kind(theirs: Fingerprint, ours: Fingerprint) -> str | None:
    """The first tensor that the two bases hold in another way, in words, when they compute the same apart from that and
    from values; else None."""
    if difference(Fingerprint(_facts(theirs), {}), Fingerprint(_facts(ours), {})) is not None:
        return None
    them, us = _kinds(theirs), _kinds(ours)
    if them.keys() - us.keys():
        return None
    return next(
        (f"{key} is {them[key]} in the file's base and {us[key]} here" for key in them if them[key] != us[key]), None
    )


@torch.no_grad()
def compare(theirs: Fingerprint, kept: Mapping[str, Kept], ours: Fingerprint, model: nn.Module) -> BaseRounding:
    """What lies between the base of a file and a model that holds the same weights in another way.

    theirs, kept: of the file.
    ours: the fingerprint of the model, as far as the file speaks of it.

    Raises AdapterError, naming the first tensor or fact, for a base that is no rounding of the same weights.
    """
    if found := difference(Fingerprint(_facts(theirs), _exact(theirs)), Fingerprint(_facts(ours), _exact(ours))):
        raise AdapterError(found)
    held = {key: value for key, value in _held(model).items() if key in _kinds(ours)}
    for key in [*kept, *(key for key in held if key not in kept)]:
        if key not in held or key not in kept:
            raise AdapterError(f"{key}: there is none {'in this model' if key in kept else 'in the file'}")
    rows = []
    for key, (tensor, kind, margins) in held.items():
        them = kept[key]
        if them.shape != tuple(tensor.shape):
            raise AdapterError(f"{key}: of shape {list(them.shape)} in the file, {list(tensor.shape)} in this model")
        if them.kind != kind:
            rows.append(_rounded(key, them, theirs, tensor, kind, margins))
        elif any(theirs.tensors.get(name) != ours.tensors.get(name) for name in _names(key, kind)):
            raise AdapterError(f"{key}: {kind} in the file and in this model, with other values")
    return BaseRounding(tuple(rows))


def _rounded(
    key: str, them: Kept, theirs: Fingerprint, tensor: Tensor, kind: str, margins: Tensor | None
) -> RoundedTensor:
    if _dense(kind) and kind in them.rounded:  # the file's, rounded to a narrower dtype
        wanted, relative = them.rounded[kind]
        if content_hash(tensor) != wanted:
            raise AdapterError(f"{key}: {them.kind} in the file, which rounded to {kind} is not what this model holds")
        return RoundedTensor(key, them.kind, kind, relative, proved=True)
    source = _dtype(them.kind)
    assert source is not None
    # what the file's was rounded from
    if _dense(kind) and _dense(them.kind) and torch.promote_types(tensor.dtype, source) == tensor.dtype:
        back = tensor.to(source)
        if described_without(back, embeddings_left_out(theirs).get(key)) != theirs.tensors.get(key):
            raise AdapterError(
                f"{key}: {them.kind} in the file, which is not what this model holds, rounded from {kind}"
            )
        return RoundedTensor(key, them.kind, kind, _relative(back, tensor), proved=True)
    # what the file's was quantised from
    if _dense(kind) and tensor.dtype == source and (bits := int(them.kind[0])) in CODERS:
        coded, decoded = CODERS[bits]
        codes, scales = coded(tensor)
        if [described(codes), described(scales)] == [theirs.tensors.get(name) for name in _names(key, them.kind)]:
            return RoundedTensor(
                key, them.kind, kind, _relative(decoded(codes, scales, tensor.shape), tensor), proved=True
            )
    own = _kept(key, tensor, kind, margins, further=False)
    apart = (own.numbers - them.numbers).abs()
    if not bool((apart <= SLACK * (own.margins + them.margins)).all()):
        raise AdapterError(
            f"{key}: {them.kind} in the file and {kind} in this model, with values that are further "
            "apart than rounding moves them"
        )
    norm = float(them.numbers.norm())
    return RoundedTensor(key, them.kind, kind, float(apart.norm()) / norm if norm else 0.0, proved=False)


def _held(model: nn.Module, without: Collection[str] = ()) -> dict[str, tuple[Tensor, str, Tensor | None]]:
    """The floating-point base tensors by key: numbers, kind, and margins where they do not follow from the dtype."""
    found: dict[str, tuple[Tensor, str, Tensor | None]] = {}
    coded: dict[str, Any] = {path: site for path, site in sites(model) if getattr(site, "bits", None)}
    for path, site in coded.items():
        found[f"{path}.weight"] = (site.numbers(), f"{site.bits} bits ({_said(site.scales.dtype)})", site.margins())
    for key, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        path, _, name = key.rpartition(".")
        if tensor.is_floating_point() and ".adapters." not in f".{key}" and not (path in coded and name == "scales"):
            found[key] = (tensor.detach(), _said(tensor.dtype), None)
    return {key: value for key, value in found.items() if key not in without}


def _kept(key: str, tensor: Tensor, kind: str, margins: Tensor | None, further: bool = True) -> Kept:
    at = places(tuple(tensor.shape)).to(tensor.device)
    numbers = tensor.flatten()[at].double().cpu()
    own = _margins(numbers, kind) if margins is None else margins.flatten()[at].double().cpu()
    rounded = {}
    for dtype in NARROWER.get(tensor.dtype, ()) if _dense(kind) and further else ():
        back = tensor.to(dtype)
        if math.isfinite(relative := _relative(back, tensor)):
            rounded[_said(dtype)] = (content_hash(back), relative)
    return Kept(kind, tuple(tensor.shape), numbers, own, rounded)


def places(shape: tuple[int, ...]) -> Tensor:
    """The numbers of the entries that are kept of a tensor of this shape: all of a small one, else drawn ones."""
    size = math.prod(shape)
    if size <= PLACES:
        return torch.arange(size, device="cpu")
    return torch.randint(size, (PLACES,), generator=torch.Generator().manual_seed(size % 2**32), device="cpu")


def _margins(numbers: Tensor, kind: str) -> Tensor:
    """How far numbers may be from what was rounded to their dtype: half a unit in the last place."""
    dtype = _dtype(kind)
    assert dtype is not None
    info = torch.finfo(dtype)
    return numbers.abs() * (info.eps / 2) + info.tiny * info.eps


def _relative(back: Tensor, tensor: Tensor) -> float:
    exact = tensor.double()
    norm = float(exact.norm())
    return float((back.double() - exact).norm()) / norm if norm else 0.0


def _dense(kind: str) -> bool:
    return " " not in kind


def _dtype(kind: str) -> torch.dtype | None:
    """The floating-point dtype of a kind, or of its scales."""
    found = getattr(torch, kind.rpartition("(")[2].removesuffix(")"), None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(key: str, kind: str) -> tuple[str, ...]:
    """The keys under which a fingerprint knows a tensor of some kind."""
    path = key.removesuffix("weight")
    return (key,) if _dense(kind) else (f"{path}codes", f"{path}scales")


def _kinds(of: Fingerprint) -> dict[str, str]:
    """The kinds of the floating-point tensors of a fingerprint, by the key of the dense tensor."""
    found = {}
    for key, value in of.tensors.items():
        name, path = value.partition("[")[0], key.rpartition(".")[0]
        codes = of.tensors.get(f"{path}.codes") if key.endswith(".scales") else None
        if codes is not None:
            found[f"{path}.weight"] = f"{8 if codes.startswith('int8') else 4} bits ({name})"
        elif _dtype(name) is not None:
            found[key] = name
    return found


def _exact(of: Fingerprint) -> dict[str, str]:
    """The tensors of a fingerprint that cannot be rounded."""
    return {
        key: value
        for key, value in of.tensors.items()
        if _dtype(value.partition("[")[0]) is None
        and not (key.endswith(".codes") and f"{key.removesuffix('codes')}scales" in of.tensors)
    }


def _facts(of: Fingerprint) -> dict[str, Any]:
    """The facts, but for how a weight is held."""
    return {name: "Linear" if value == "QuantisedLinear" else value for name, value in of.facts.items()}


def _packed(numbers: Tensor) -> str:
    return base64.b64encode(numbers.contiguous().numpy().astype("<f8").tobytes()).decode()


def _unpacked(text: Any, count: int) -> Tensor:
    content = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    if len(content) != 8 * count:
        raise ValueError(f"{count} kept numbers have {8 * count} bytes, got {len(content)}")
    numbers = (
        torch.frombuffer(bytearray(content), dtype=torch.float64) if count else torch.empty(0, dtype=torch.float64)
    )
    if not bool(numbers.isfinite().all()):
        raise ValueError("a kept number is not finite")
    return numbers
