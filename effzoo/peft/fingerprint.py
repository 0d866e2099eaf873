"""What a model computes, in words and hashes: two models with equal fingerprints give equal outputs in evaluation.

Tensors alone do not say it: the same weights with other heads, another epsilon, activation, attention or hash seed are
another function. So a fingerprint has facts, which an error can name with both values, and a hash of every tensor,
buffers that no state dict holds included. What acts in training only (dropout, recomputing), and what only names
things, is left out.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effzoo.errors import AdapterError, OptionError
from effzoo.peft.parameter.tokens import numbers_of
from effzoo.sharding import class_of, whole
from effzoo.sites import unwrap
from effzoo.tensors import is_coded

NOT_THE_FUNCTION = {  # attributes of modules, and why they do not count
    "config": "the model itself says what of it counts (`computes`)",
    "role": "a name", "layer": "a number for targets; what depends on it (hash rotations) is a tensor",
    "backend": "the same result by another way",
    "max_length": "what depends on it is an option of the attention, or a tensor",
    "device": "where, not what", "dtype": "of the tensors, which say it themselves",
    "FeedForward.chunk": "the same result, fewer positions at a time",
    "max_globals": "a limit: more global tokens are an error", "Side.narrow": "for networks of adapters",
    "sizes": "as `config`", "roster": "of adapters", "again": "computed twice, to the same bits",
    "weighted": "of the loss", "later_values_matter": "an explanation", "projections": "they are sites",
    "bits": "of the codes, which say it themselves", "Embedding.added": "which tokens are called new",
}  # fmt: skip
# what releases have added, and adds nothing where it is so: files of earlier ones have no fact for it
ADDED_PARTS = ("Stream",)  # sites without a weight
ADDED: dict[str, Any] = {"Block.reads": False}
WITHOUT = " without rows "  # as files say it of embeddings
_NOWHERE = object()
_OF_ANY_MODULE = vars(nn.Module())
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.Dropout)


@dataclass(frozen=True)
class Fingerprint:
    """What a model computes.

    facts: name -> a value that JSON can hold.
    tensors: key -> dtype, shape and hash, as in "float32[16, 16] 0123456789abcdef".
    """

    facts: dict[str, Any]
    tensors: dict[str, str]

    @property
    def digest(self) -> str:
        """One hash of all of it."""
        return hashlib.sha256(json.dumps([self.facts, self.tensors], sort_keys=True).encode()).hexdigest()


def fingerprint(
    model: nn.Module, *, without: Collection[str] = (), embeddings: Mapping[str, str] | None = None
) -> Fingerprint:
    """The fingerprint of a model without its adapters.

    model: any module; those that have a method `computes` (Transformer, Perceiver) give facts of their own.
    without: keys of tensors to leave out.
    embeddings: by key of a table, the tokens whose embeddings to leave out, as in "5-7+9".

    Raises AdapterError for what is no model.
    """
    model, embeddings = unwrap(model), embeddings or {}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    tensors = {
        key: described(value)
        for key, value in named
        if not _of_adapter(key) and key not in without and key not in embeddings
    }
    tensors |= {key: described_without(value, embeddings[key]) for key, value in named if key in embeddings}
    return Fingerprint(facts(model), tensors)


def embeddings_left_out(fingerprint: Fingerprint) -> dict[str, str]:
    """`embeddings` of the call that gave a fingerprint."""
    return {key: value.partition(WITHOUT)[2] for key, value in fingerprint.tensors.items() if WITHOUT in value}


def described_without(tensor: Tensor, embeddings: str | None) -> str:
    """`described`, of all embeddings but these."""
    if embeddings is None:
        return described(tensor)
    return f"{described(_without(tensor, embeddings))}{WITHOUT}{embeddings}"


def _without(tensor: Tensor, embeddings: str) -> Tensor:
    """All embeddings but these; the tensor itself where they are none of it."""
    try:
        named = numbers_of(embeddings, len(tensor))
    except OptionError:
        return tensor
    kept = torch.ones(len(tensor), dtype=torch.bool, device=tensor.device)
    kept[named] = False
    return whole(tensor.detach())[kept]


def facts(model: nn.Module) -> dict[str, Any]:
    """The facts of a fingerprint: what the model says of itself; class and attributes of every module inside."""
    model = unwrap(model)
    found: dict[str, Any] = {"class": class_of(model).__name__}
    computes: Any = getattr(model, "computes", None)
    if callable(computes):
        found |= {name: _plain(value) for name, value in computes().items()}
    for path, module in model.named_modules():
        kind = class_of(module).__name__
        if path and not _of_adapter(f"{path}.") and not isinstance(module, CONTAINERS) and kind not in ADDED_PARTS:
            found[path] = kind
            found |= {f"{path}.{name}": value for name, value in _attributes(module).items()}
    return found


def difference(theirs: Fingerprint, ours: Fingerprint) -> str | None:
    """The first difference between a stored fingerprint and a model's, in words with both values; None for none."""
    for them, us in ((theirs.facts, ours.facts), (theirs.tensors, ours.tensors)):
        for name in (*them, *(name for name in us if name not in them)):
            if name.rpartition(".")[2] == "projections":
                continue
            if name not in us:
                return f"{name}: {_shown(them[name])} in the file, nothing of that name in this model"
            if name not in them:
                return f"{name}: nothing of that name in the file, {_shown(us[name])} in this model"
            if them[name] != us[name]:
                return f"{name}: {_shown(them[name])} in the file, {_shown(us[name])} in this model"
    return None


def described(tensor: Tensor) -> str:
    """Dtype, shape and hash of a tensor; of all of it, where it is split over processes."""
    tensor = whole(tensor)
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} {content_hash(tensor)}"


def content_hash(tensor: Tensor) -> str:
    """16 digits of the hash of a tensor's dtype, shape and bytes. Raises AdapterError for one on the meta device."""
    if tensor.is_meta:
        raise AdapterError(
            f"a tensor of shape {tuple(tensor.shape)} is on the meta device, which holds shapes alone; give the "
            "model its weights first"
        )
    digest = begun_hash(tensor.dtype, tensor.shape)
    if is_coded(tensor):
        flat: Any = tensor
        names, rest = flat.__tensor_flatten__()
        parts = {name: content_hash(getattr(tensor, name)) for name in names}
        digest.update(json.dumps([type(tensor).__name__, parts, _plain(rest)], sort_keys=True).encode())
    else:
        digest.update(bytes_of(tensor))
    return ended_hash(digest)


def begun_hash(dtype: torch.dtype, shape: Sequence[int]) -> Any:
    """The hash of a tensor that its bytes are still to go into, in order (`bytes_of`)."""
    return hashlib.sha256(f"{dtype}{tuple(shape)}".encode())


def bytes_of(tensor: Tensor) -> Any:
    """The bytes of a tensor, or of some of its rows."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def ended_hash(digest: Any) -> str:
    """The digits that stand in a fingerprint."""
    return str(digest.hexdigest()[:16])


def _of_adapter(key: str) -> bool:
    return ".adapters." in f".{key}"


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module keeps of its constructor's arguments, and its other public attributes; no tensors and modules."""
    try:
        initial: Any = class_of(module)
        names = dict.fromkeys(list(inspect.signature(initial.__init__).parameters)[1:])
    except ValueError:  # written in C
        names = {}
    if not class_of(module).__module__.startswith("torch."):
        names |= dict.fromkeys(name for name in vars(module) if not name.startswith("_") and name not in _OF_ANY_MODULE)
    attributes: dict[str, Any] = {}
    for name in names:
        value = getattr(module, name, None)
        if "dropout" in name or {name, f"{class_of(module).__name__}.{name}"} & NOT_THE_FUNCTION.keys():
            continue
        if value is None or isinstance(value, (Tensor, nn.Module)):
            continue
        if value is ADDED.get(f"{class_of(module).__name__}.{name}", _NOWHERE):
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [
                field.name
                for field in dataclasses.fields(value)
                if field.compare
                and "dropout" not in field.name
                # files of earlier releases have no fact for it
                and not ("added" in field.metadata and getattr(value, field.name) == field.default)
            ]
            value = {field: getattr(value, field) for field in fields if field not in NOT_THE_FUNCTION}
        attributes[name] = _plain(value)
    return attributes


def _plain(value: Any) -> Any:
    """The value as JSON gives it back; what JSON cannot hold is named."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, Tensor):
        return described(value)
    if isinstance(value, functools.partial):
        return {"function": _plain(value.func), **{key: _plain(entry) for key, entry in value.keywords.items()}}
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    return getattr(value, "__name__", type(value).__name__)


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
