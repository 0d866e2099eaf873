"""Running a model on shapes: weights and activations without memory, masks and positions with their values.

Inside `Shadows` weights are fake tensors of torch, and so is what is computed from them: shape, strides, dtype and
storage identity as on the CPU, without memory. What is computed from inputs alone (ids, masks, positions) has values up
to a size, because models branch on them: is there padding, how many tokens are global? A branch on an unknown value is
an error.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from effzoo.devices import kind_of

M = TypeVar("M", bound=nn.Module)
KNOWN_BYTES = 2**24  # integers and booleans up to this size keep their values,
KNOWN_FLOATS = 2**20  # and floating-point tensors up to this one
_BY_VALUE = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


def key(tensor: Tensor) -> int:
    """The identity of a tensor's storage, while it lives: views of one storage have the same."""
    return int(tensor.untyped_storage()._cdata)


def size(tensor: Tensor) -> int:
    """Bytes of the whole storage, which a view keeps alive."""
    return int(tensor.untyped_storage().nbytes())


class LiveBytes:
    """Bytes of the storages that exist, and their peak, without those that existed before."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def see(self, tensor: Tensor) -> None:
        storage, name = tensor.untyped_storage(), key(tensor)
        if name in self._storages:
            return
        nbytes = int(storage.nbytes())

        def gone(_: Any) -> None:
            del self._storages[name]
            self.live -= nbytes

        self._storages[name] = weakref.ref(storage, gone)
        self.live += nbytes
        self.peak = max(self.peak, self.live)

    def known_before(self, tensors: Sequence[Tensor]) -> None:
        """Leave these tensors out."""
        for tensor in tensors:
            self.see(tensor)
        self.live = self.peak = 0


class Shadows(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The dispatch mode. live_bytes, if set, counts every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.live_bytes: LiveBytes | None = None
        self.weights: set[int] = set()  # storages of parameters
        self.half_copies: dict[int, weakref.ref[Any]] = {}  # storages that were cast from them
        # real storages into which a fake was written: their values are lost
        self._overwritten: dict[int, weakref.ref[Any]] = {}
        self._fakes: dict[int, weakref.ref[Any]] = {}  # fake storages that stand for those

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].device  # asked as often as all other operations together
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        out = self._known(func, args, kwargs) if all(map(self._has_value, given)) else self._shapes(func, args, kwargs)
        for tensor in _tensors(out) if self.live_bytes is not None else ():
            if key(tensor) not in self._fakes:
                self.live_bytes.see(tensor)  # type: ignore[union-attr]
        if (
            func is torch.ops.aten._to_copy.default
            and key(given[0]) in self.weights
            and out.element_size() < given[0].element_size()
        ):
            _remember(out, self.half_copies)
        return out

    def _has_value(self, tensor: Tensor) -> bool:
        return (
            not isinstance(tensor, FakeTensor) and tensor.device.type != "meta" and key(tensor) not in self._overwritten
        )

    def _shapes(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation on fakes; a known mask that selects from a fake becomes indices, whose number is known."""
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], [index for mask in args[1] for index in self._as_indices(mask)])
        for position, argument in enumerate(func._schema.arguments):
            if _writes(argument):
                for tensor in _tensors(args[position] if position < len(args) else kwargs.get(argument.name)):
                    if not isinstance(tensor, FakeTensor):
                        _remember(tensor, self._overwritten)
        if self._overwritten:
            args, kwargs = pytree.tree_map_only(Tensor, self._twin, (args, kwargs))
        out = self._fake(func, args, kwargs)
        # statistics in the dtype of the kernels; torch's shapes for the CPU have that of the input
        if func is torch.ops.aten.native_layer_norm.default:
            wide = (
                torch.promote_types(args[0].dtype, torch.float32)
                if kind_of(args[0]) == "cuda"
                else args[0 if args[2] is None else 2].dtype
            )
            out = (out[0], *(statistic.to(wide) for statistic in out[1:]))
        return out

    def _fake(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What `with self.fake: func(...)` gives, without the way through torch's dispatcher, which takes as long."""
        return self.fake.dispatch(func, (), args, kwargs)

    def _twin(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor) or key(tensor) not in self._overwritten:
            return tensor
        fake = self.stand_in(tensor)  # torch's own stand-in for a number may know its value
        _remember(fake, self._fakes)
        return fake

    def _as_indices(self, index: Any) -> tuple[Any, ...]:
        selects = isinstance(index, Tensor) and index.dtype == torch.bool and self._has_value(index)
        return index.nonzero(as_tuple=True) if selects else (index,)

    def _known(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation whose inputs have values: for real, unless the result is large."""
        writes = any(map(_writes, func._schema.arguments))
        if (
            not writes
            and not func.is_view
            and not any(tag in func.tags for tag in _BY_VALUE)
            and func is not torch.ops.aten.lift_fresh.default
        ):
            shapes = self._fake(func, args, kwargs)
            if not all(map(_small, _tensors(shapes))):
                return shapes
        return func(*args, **kwargs)

    def stand_in(self, tensor: Tensor, dtype: torch.dtype | None = None, device: str = "cpu") -> Tensor:
        """A tensor without memory, of the same shape and strides; a Parameter for a Parameter.

        dtype: of a floating-point one; None: the same.
        device: "cpu" for a fake tensor, "meta" for torch's meta tensor, with which modules can be built.
        """
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        with nullcontext() if device == "meta" else self.fake:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device=device)
        return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    def copied(
        self,
        model: M,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        kinds: Mapping[int, torch.dtype] = MappingProxyType({}),
    ) -> M:
        """A copy of a model whose parameters and floating-point buffers are stand-ins; small integer buffers keep their
        values, on the CPU.

        dtype: of the floating-point ones, but for those that `kinds` names by their id.
        """
        memo: dict[int, Any] = {}
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if tensor.is_floating_point() or not self._has_value(tensor) or not _small(tensor):
                memo[id(tensor)] = self.stand_in(tensor, kinds.get(id(tensor), dtype), device)
            elif tensor.device.type != "cpu":
                memo[id(tensor)] = tensor.cpu()
        return copy.deepcopy(model, memo)


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors in tuples, lists and dictionaries; torch's pytree takes longer than some of the operations."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _small(tensor: Tensor) -> bool:
    return size(tensor) <= (KNOWN_FLOATS if tensor.is_floating_point() else KNOWN_BYTES)


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _remember(tensor: Tensor, table: dict[int, weakref.ref[Any]]) -> None:
    """Enter a storage into a table for as long as it lives."""
    name = key(tensor)
    if name not in table:
        table[name] = weakref.ref(tensor.untyped_storage(), lambda _: table.pop(name))
