"""Initial values of parameters that are drawn only where nothing else is written into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_FILLS = (
    torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default, torch.ops.aten.zero_.default,
    torch.ops.aten.fill_.Scalar,
)  # fmt: skip


class Undrawn(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, filling a parameter as a whole is put off, until another operation wants it or `draw` is called.

    Memory that is not written to is not taken: a model costs nothing before its weights are read into it. What is
    filled twice is drawn once, and what is `written` never, so random numbers differ from those of a model that draws
    everything. An initialisation of any kind is right: where an operation reads a parameter, it is drawn first.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fills: dict[int, tuple[Tensor, Callable[[], Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS and isinstance(args[0], nn.Parameter) and kwargs.get("generator") is None:
            tensor, *rest = args
            self._fills[id(tensor)] = tensor, lambda: func(tensor, *rest, **kwargs)
            return tensor
        for value in pytree.tree_leaves((args, kwargs)):
            self.draw(value)
        return func(*args, **kwargs)

    def holds(self, tensor: object) -> bool:
        """Whether a parameter is still to be drawn."""
        return id(tensor) in self._fills

    def written(self, tensor: object) -> None:
        """Forget what a parameter was to be filled with: it holds other numbers, or soon will."""
        self._fills.pop(id(tensor), None)

    @torch.no_grad()
    def draw(self, tensor: object) -> None:
        """Fill a parameter, if it is still to be drawn."""
        if id(tensor) in self._fills:
            _, fill = self._fills.pop(id(tensor))
            fill()
