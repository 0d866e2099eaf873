"""Attaching an adapter to a model of shapes: which tensors it would have, before any of them exists."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from effzoo.errors import AdapterError, EffzooError
from effzoo.peft.attach import attach, attached
from effzoo.peft.training import enter, hooked
from effzoo.sharding import as_written
from effzoo.spec import Spec

M = TypeVar("M", bound=nn.Module)


def rehearse(
    model: M,
    specs: tuple[Spec, ...],
    name: str,
    *,
    begun: Mapping[str, str],
    finished: bool,
    most: int,
    dtype: torch.dtype | None = None,
    num_labels: int | None = None,
) -> tuple[M, set[str]]:
    """A copy of the model on the meta device with the adapter attached, and keys whose shapes only the data know.

    specs, name: of the adapter.
    begun: {method: stage} in which it is.
    finished: whether it is.
    most: calls of torch that it may take; what needs more is refused.
    dtype, num_labels: as in `attach`.

    The second result holds the beginnings of these keys. Raises what `attach` raises, and AdapterError for anything
    else that goes wrong. Nothing as large as a tensor is allocated.
    """
    try:
        shapes = skeleton(model)
        with torch.device("meta"), _AtMost(most):
            attach(shapes, specs, name=name, dtype=dtype, num_labels=num_labels)
            enter(shapes, name, begun)
            unknown: set[str] = set()
            for method, modules in hooked(shapes, "finish", name) if finished else ():
                try:
                    method.finish(modules)
                # what it keeps depends on values (`nonzero`); never more than it had before
                except NotImplementedError:
                    unknown |= {f"{path}.adapters.{method.name}." for path in modules}
    except EffzooError:
        raise
    except Exception as error:
        spec = "|".join(map(str, specs))
        raise AdapterError(
            f"the spec {spec:.200} cannot be attached ({type(error).__name__}: {error!s:.200}); save the adapter again"
        ) from error
    attached(shapes)[name].finished = finished
    return shapes, unknown


def skeleton(model: M) -> M:
    """A copy of a model whose tensors have shapes and no content."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    with _Shapes(), as_written(model):
        return copy.deepcopy(model, {id(tensor): _shape(tensor) for _, tensor in named})


def _shape(tensor: Tensor) -> Tensor:
    shape = tensor.detach().to("meta")
    return nn.Parameter(shape, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape


class _Shapes(TorchFunctionMode):
    """`copy.deepcopy` of any other tensor (what a module keeps of its last batch) gives its shape."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not Tensor.__deepcopy__:
            return function(*args, **(kwargs or {}))
        tensor, memo = args
        return memo.setdefault(id(tensor), _shape(tensor))


class _AtMost(TorchFunctionMode):
    """Refuses to go on after so many calls of torch: a spec that asks for a million modules."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.most -= 1
        if self.most < 0:
            raise AdapterError("the spec asks for far more tensors than the file holds; save the adapter again")
        return function(*args, **(kwargs or {}))
