"""What autograd saves for the backward pass, and who saved it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from effzoo.attention.core import AttentionCore
from effzoo.devices import kind_of
from effzoo.plans.shadow import key, size
from effzoo.sites import Mixture, PeftModule, SideNetwork, Site, opens, sites

HALF_COPIES = "half copies of weights"
_PLACES = {  # modules that are no site, by what their own operations save
    "Attention": "attn heads", "Block": "residual", "Embeddings": "embeddings", "FeedForward": "mlp activation",
    "Features": "head", "Experts": "routing",
    "Classification": "head", "TokenClassification": "head", "LanguageModel": "head", "Transformer": "streams",
    "Perceiver": "latents",
}  # fmt: skip
_LOSSES = {"cross_entropy", "mse_loss", "binary_cross_entropy_with_logits", "nll_loss", "log_softmax"}
_DROPOUTS = {"dropout", "dropout_", "feature_dropout", "alpha_dropout", "native_dropout"}
_HOOKS = ("weight", "bias", "before", "after", "prompt", "memory")


@dataclass
class Saved:
    """One storage that is kept for the backward pass: its bytes, who saved it (in order), and how many autograd nodes
    hold it."""

    bytes: int
    causes: dict[str, None] = field(default_factory=dict)
    path: str = ""  # of the module in which it was saved first
    holders: int = 0

    @property
    def cause(self) -> str:
        return " + ".join(self.causes)


class _SavedTensor:
    """Stands for a tensor in the graph; the record is told when the graph frees it."""

    __slots__ = ("record", "storage", "tensor")

    def __init__(self, record: Record, tensor: Tensor):
        self.record, self.tensor = record, tensor.detach()  # with its graph, the graph would never be freed
        # `detach` of a tensor that lost its values has another storage, so the number of this one must stay taken
        self.storage = tensor.untyped_storage()
        record.add(tensor)

    def __del__(self) -> None:
        self.record.release(int(self.storage._cdata))


class Record(TorchFunctionMode):
    """Storages that autograd holds, without those in `excluded` (parameters, buffers, inputs).

    Inside the `with` block a storage counts once, whole, from the first node that saves it or a view of it until the
    last one is gone. What modules keep beside the graph does not count: a checkpoint's or a reversible block's random
    states, the integers of `Mask.decide`.
    """

    def __init__(self, excluded: Iterable[Tensor] = (), half_copies: Container[int] = ()):
        super().__init__()
        self.excluded = {key(tensor): tensor for tensor in excluded}
        self.half_copies = half_copies
        self.failed = ""  # the path of the innermost module that raised
        self.storages: dict[int, Saved] = {}
        self.places: list[tuple[str, str]] = []  # (place, path), the innermost last
        self.operations: list[str] = []
        self._stack = ExitStack()

    def __enter__(self) -> Record:
        super().__enter__()  # type: ignore[no-untyped-call]
        pack = functools.partial(_SavedTensor, self)
        self._stack.enter_context(saved_tensors_hooks(pack, lambda saved: saved.tensor))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.operations.append(getattr(func, "__name__", ""))
        try:
            out = (
                _fused(*args, **(kwargs or {}))
                if func is F.dropout and kind_of(args[0]) == "cuda"
                else func(*args, **(kwargs or {}))
            )
        finally:
            self.operations.pop()
        return out

    def add(self, tensor: Tensor) -> None:
        name = key(tensor)
        if name in self.excluded:
            return
        place, path = self.places[-1] if self.places else ("model", "")
        saved = self.storages.setdefault(name, Saved(size(tensor), path=path))
        saved.holders += 1
        saved.causes[HALF_COPIES if name in self.half_copies else self._cause(place)] = None

    def release(self, name: int) -> None:
        saved = self.storages.get(name)
        if saved is not None:
            saved.holders -= 1
            if not saved.holders:
                del self.storages[name]

    def _cause(self, place: str) -> str:
        if _DROPOUTS.intersection(self.operations):
            return (
                "dropout masks"
                if place in ("dropout masks", "residual", "embeddings", "head")
                else (f"{place} dropout masks")
            )
        return "loss" if _LOSSES.intersection(self.operations) else place

    @contextmanager
    def inside(self, place: str, path: str) -> Iterator[None]:
        self.places.append((place, path))
        try:
            yield
        except Exception:
            self.failed = self.failed or path
            raise
        finally:
            self.places.pop()

    def follow(self, model: nn.Module) -> None:
        """Wrap every module of a model, and every hook of its adapters, so that the record knows which one runs."""
        for path, module in model.named_modules():
            if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and ".adapters." not in f".{path}":
                module.forward = self._wrapped(module.forward, _place(module), path)
        for path, site in sites(model):
            for adapter, methods in site.adapters.items():
                for method, hung in methods.named_children():
                    place = f"adapter {method}", f"{path}.adapters.{adapter}.{method}"
                    for hook in _hooks(hung):
                        setattr(hung, hook, self._wrapped(getattr(hung, hook), *place))

    def _wrapped(self, function: Callable[..., Any], place: str, path: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.inside(place, path):
                return function(*args, **kwargs)

        return wrapped


def _hooks(module: nn.Module) -> list[str]:
    """The methods of an adapter's module that compute something."""
    if isinstance(module, SideNetwork):
        return ["forward"]
    if isinstance(module, Mixture):
        return ["mix", "memories"]
    return [hook for hook in _HOOKS if isinstance(module, PeftModule) and opens(module, hook)]


def _fused(x: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
    """Dropout as CUDA computes it."""
    if inplace or not training or not 0 < p < 1 or not x.numel():
        return F.dropout(x, p, training, inplace)
    return torch.native_dropout(x, p, True)[0]


def _place(module: nn.Module) -> str:
    if isinstance(module, Site):
        return module.role
    if isinstance(module, AttentionCore):
        return "attn core"
    if isinstance(module, nn.Dropout):
        return "dropout masks"
    return _PLACES.get(type(module).__name__, type(module).__name__)
