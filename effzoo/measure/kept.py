"""What autograd keeps for the backward pass, counted in a forward pass that runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from effzoo.plans.saved import Record
from effzoo.plans.shadow import key


def kept(model: nn.Module, inputs: Mapping[str, Tensor], run: Callable[[], object]) -> dict[str, int]:
    """Bytes that autograd saves in a forward pass, by cause (`effzoo.plan`), without parameters, buffers and inputs.

    run: the forward pass of the model on these inputs. The model cannot be used afterwards: its modules are wrapped.
    """
    casts = _Casts(model.parameters())
    record = Record([*model.parameters(), *model.buffers(), *inputs.values()], casts.storages)
    record.follow(model)
    with casts, record:
        result = run()
        by_cause: dict[str, int] = {}
        for saved in record.storages.values():
            by_cause[saved.cause] = by_cause.get(saved.cause, 0) + saved.bytes
    del result
    return dict(sorted(by_cause.items(), key=lambda item: -item[1]))


class _Casts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Half copies of weights, which autocast makes: their storages, while they live."""

    def __init__(self, weights: Iterable[Tensor]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = {key(weight) for weight in weights}
        self.storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if (
            func is torch.ops.aten._to_copy.default
            and key(args[0]) in self.weights
            and out.element_size() < args[0].element_size()
        ):
            name = key(out)
            self.storages[name] = weakref.ref(out.untyped_storage(), lambda _: self.storages.pop(name, None))
        return out
